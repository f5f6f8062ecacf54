"""A summary of labels says what pandas says of the whole table, of partial data sets and of object storage too."""

import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from drawn_labels import CLASSES, draw_part, write_labels
from hypothesis import given
from hypothesis import strategies as st
from object_storage import ObjectStorage

from annatac_scale.annotate.histograms import Histogram
from annatac_scale.annotate.labels import Consensus, LabelsFolder
from annatac_scale.annotate.labels_summary import QUANTILES, LabelsSummary, summarize
from annatac_scale.errors import InputError
from annatac_scale.model.labels import LOW_DEPTH, NOVEL

SIZES = {"z": 9000, "none": 0, "a": 700}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("summary") / "labels"
    write_labels(path, SIZES)
    return path


def table_of(labels: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(file) for file in sorted(labels.glob("*.parquet"))])


def quantiles(values: pd.Series) -> list[float]:
    return np.quantile(values.to_numpy(np.float64), QUANTILES, method="inverted_cdf").tolist()


def assert_says_what_pandas_says(found: LabelsSummary, table: pd.DataFrame) -> None:
    assert found.n_cells == len(table)
    assert {one.name: one.n_cells for one in found.labels} == table["label"].value_counts().to_dict()
    for one in found.labels:
        own = table[table["label"] == one.name]
        assert list(one.confidence.values()) == pytest.approx(quantiles(own["confidence"]), abs=3e-4)
    assert list(found.confidence.values()) == pytest.approx(quantiles(table["confidence"]), abs=3e-4)
    for sample in found.samples:
        own = table[table["sample"] == sample.name]
        assert (sample.n_cells, dict(sample.labels)) == (len(own), own["label"].value_counts().to_dict())
        if len(own):
            assert list(sample.n_open.values()) == pytest.approx(quantiles(own["n_open"]), rel=0.006)
        else:
            assert sample.n_open is None
    assert found.sets.n_of_size == table["set_size"].value_counts().sort_index().to_dict()
    pairs = Counter(tuple(sorted(types)) for types in table["set"] if len(types) == 2)
    assert {(first, second): n for first, second, n in found.sets.pairs} == dict(pairs)
    numbers = [n for *_, n in found.sets.pairs]
    assert numbers == sorted(numbers, reverse=True)


def test_a_whole_data_set(labels: Path) -> None:
    found, table = summarize(labels), table_of(labels)
    assert_says_what_pandas_says(found, table)
    assert (found.n_missing, found.n_parts, found.n_parts_there) == (0, 5, 5)
    values = found.to_dict()
    assert values["share_novel"] == pytest.approx((table["label"] == NOVEL).mean())
    assert values["n_low_depth"] == (table["label"] == LOW_DEPTH).sum()
    assert values["consensus"] is None
    assert (values["model"], values["options"]["novel_rate"]) == ("m" * 64, 0.05)


def test_of_a_partial_data_set_the_parts_that_are_there(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels", SIZES)
    (tmp_path / "labels/z-00001.parquet").unlink()
    (tmp_path / "labels/a-00000.parquet").write_bytes(b"PAR1 half of it")
    found = summarize(tmp_path / "labels")
    (tmp_path / "labels/a-00000.parquet").unlink()
    assert_says_what_pandas_says(found, table_of(tmp_path / "labels"))
    assert (found.n_parts_there, found.n_parts, found.n_missing) == (3, 5, 4700)
    assert [sample.n_missing for sample in found.samples] == [4000, 0, 700]
    for file in (tmp_path / "labels").glob("*.parquet"):
        file.unlink()
    with pytest.raises(InputError, match="found none of its 5 parts"):
        summarize(tmp_path / "labels")
    with pytest.raises(InputError, match=r"found no _manifest\.json"):
        summarize(tmp_path / "nowhere")


def test_object_storage_is_read_as_a_disk_is(s3: ObjectStorage, tmp_path: Path) -> None:
    url = f"{s3.bucket()}/labels"
    write_labels(url, SIZES)
    write_labels(tmp_path / "labels", SIZES)
    values = [summarize(place).to_dict() for place in (url, tmp_path / "labels")]
    assert {**values[0], "labels": ""} == {**values[1], "labels": ""}


def test_without_sets_and_of_one_class_there_is_nothing_to_say_of_them(tmp_path: Path) -> None:
    folder = LabelsFolder(tmp_path, write_labels(tmp_path / "x", {"a": 30}).manifest)
    (part,) = folder.manifest.parts
    table = draw_part(folder.manifest, part)
    for name in ("set", "set_size"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.nulls(30, table.schema.field(name).type))
    folder.write(part, table)
    folder.write_manifest(complete=True)
    assert summarize(tmp_path).sets is None


def with_consensus(location: Path, labels: Path) -> pd.DataFrame:
    """A copy that has a consensus besides; returns its table."""
    source = LabelsFolder.open(labels)
    manifest = source.manifest
    columns = (*manifest.columns, "cluster", "consensus", "consensus_share")
    folder = LabelsFolder(location, type(manifest)(**{**vars(manifest), "columns": columns}))
    rng = np.random.default_rng(0)
    tables = []
    for part in manifest.parts:
        n, table = part.n_cells, source.read(part, manifest.columns)
        voted = rng.choice(np.array([*CLASSES, None], object), n)
        share = np.where(pd.isna(voted), np.nan, rng.random(n)).astype(np.float32)
        added = {"cluster": pa.array(["1"] * n), "consensus": pa.array(voted, pa.string())}
        for name, column in {**added, "consensus_share": pa.array(share, from_pandas=True)}.items():
            table = table.append_column(name, column)
        folder.write(part, table)
        tables.append(table.to_pandas())
    folder.write_manifest(complete=True, consensus=Consensus("group"))
    return pd.concat(tables)


def test_labels_are_compared_with_the_consensus_of_their_clusters(labels: Path, tmp_path: Path) -> None:
    table = with_consensus(tmp_path / "voted", labels)
    found = summarize(tmp_path / "voted").consensus
    voted = table[table["consensus"].notna() & (table["label"] != LOW_DEPTH)]
    assert (found.n_cells, found.n_differ) == (len(voted), (voted["label"] != voted["consensus"]).sum())
    assert list(found.share.values()) == pytest.approx(quantiles(voted["consensus_share"]), abs=3e-4)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=60), st.sampled_from([0.0, *QUANTILES, 1.0]))
def test_quantiles_of_counts_are_exact_up_to_1024_and_close_above(values: list[int], share: float) -> None:
    histogram, numbers = Histogram.of_counts(), np.array(values)
    histogram.add(numbers[:7])
    histogram.add(numbers[7:])
    expected = np.quantile(numbers, share, method="inverted_cdf")
    assert len(histogram) == len(values)
    assert histogram.quantile(share) == pytest.approx(expected, rel=0 if expected < 1024 else 0.006)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60), st.sampled_from([0.0, *QUANTILES, 1.0]))
def test_quantiles_of_shares_are_close(values: list[float], share: float) -> None:
    histogram, numbers = Histogram.of_shares(), np.array(values, np.float32)
    histogram.add(numbers)
    expected = np.quantile(numbers, share, method="inverted_cdf")
    assert histogram.quantile(share) == pytest.approx(float(expected), abs=2.6e-4)


def test_without_a_value_there_is_no_quantile() -> None:
    histogram = Histogram.of_shares()
    histogram.add(np.empty(0))
    assert histogram.quantile(0.5) is None


def test_memory_does_not_grow_with_the_cells(tmp_path: Path) -> None:
    peaks = []
    for n in (1, 4):  # more parts than are read ahead, both times
        write_labels(tmp_path / f"{n}", {f"s{i}": 12_000 for i in range(3 * n)})
        tracemalloc.start()
        summarize(tmp_path / f"{n}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert sys.getsizeof(b"") < peaks[0]
    assert peaks[1] < 1.3 * peaks[0]
