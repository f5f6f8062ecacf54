"""Every cell gets the row that the model gives it alone; the splits of the fine-tuning, and labels in an h5ad."""

import itertools
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from object_storage import ObjectStorage
from predicted import SIZES, assert_same_bytes
from scipy import sparse
from small_atlas import (
    NOVEL_THRESHOLD,
    TEMPERATURE,
    TYPES,
    VOCABULARY,
    SmallSample,
    draw_sample,
    one_by_one,
    small_model,
    small_store,
    write_split,
)

from annatac_scale.annotate import predictor as predictor_module
from annatac_scale.annotate.batches import BATCH_CELLS, BATCH_TOKENS, cut_batches
from annatac_scale.annotate.labels import MANIFEST
from annatac_scale.annotate.predict import predict
from annatac_scale.errors import ConfigError, InputError, ModelError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest.convert import convert
from annatac_scale.model.folder import read_model
from annatac_scale.model.island_sums import SummedHead
from annatac_scale.model.labels import NOVEL
from annatac_scale.model.linformer import Linformer
from annatac_scale.progress import Silent
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.train.splits import LabelledCells
from annatac_scale.train.splits import write_split as write_split_of_finetune

COLUMNS = [
    *("sample", "barcode", "best", "label", "confidence", "second", "second_confidence"),
    *("novel", "novelty_score", "novelty_p", "set", "set_size", "n_open", "split"),
]


def table_of(labels: Path) -> pd.DataFrame:
    """The data set as any reader of Parquet reads it."""
    return pd.read_parquet(labels).sort_values(["sample", "barcode"], ignore_index=True)


def expected_rows(logits: np.ndarray, threshold: float) -> pd.DataFrame:
    """best, label, confidence, second and its confidence from logits, by plain loops."""
    rows = []
    for row in logits.astype(np.float64):
        powers = np.exp((row - row.max()) / TEMPERATURE)
        chances = (powers / powers.sum()).astype(np.float32)
        first, second = sorted(range(len(row)), key=lambda i: -row[i])[:2]
        label = NOVEL if chances[first] < threshold else TYPES[first]
        rows.append((TYPES[first], label, chances[first], TYPES[second], chances[second]))
    return pd.DataFrame(rows, columns=COLUMNS[2:7])


@pytest.mark.parametrize("attend", ["open", "all"])
@pytest.mark.parametrize(
    ("head", "reads"),
    [
        *(("pooled", "gate"), ("linear", "gate"), ("cnn", "gate"), ("subtype", "gate")),
        *(("pooled", "none"), ("linear", "none")),  # which need no encoder and list no token
    ],
)
def test_every_cell_gets_what_the_model_says_of_it_alone(
    tmp_path: Path, store: IslandStore, samples: dict[str, SmallSample], head: str, reads: str, attend: str
) -> None:
    model = small_model(tmp_path / "model", head, attend=attend, reads=reads)
    predict(store.path, tmp_path / "model", tmp_path / "labels")
    for name, sample in samples.items():
        found = pd.read_parquet(tmp_path / "labels" / f"{name}-00000.parquet")
        assert list(found.columns) == COLUMNS
        assert found["barcode"].tolist() == [f"{name}-{i}" for i in range(SIZES[name])]
        assert set(found["sample"]) <= {name}
        assert found["n_open"].tolist() == (sample.levels[:, VOCABULARY] > 0).sum(1).tolist()
        expected = expected_rows(one_by_one(model, sample), NOVEL_THRESHOLD)
        # Which type is best may turn on rounding where two are as likely: no such cell is in these samples.
        pd.testing.assert_frame_equal(
            found[expected.columns], expected, check_dtype=False, rtol=1e-4, atol=1e-5
        )


def test_the_columns_agree_with_the_probabilities(tmp_path: Path, store: IslandStore, model: Path) -> None:
    report = predict(store, read_model(model), tmp_path / "labels", novel_threshold=0.7, probabilities=True)
    table = table_of(tmp_path / "labels")
    chances = np.stack(table["probabilities"])
    assert chances.dtype == np.float32
    np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-6)
    assert table["best"].tolist() == [TYPES[i] for i in chances.argmax(axis=1)]
    np.testing.assert_array_equal(table["confidence"], chances.max(axis=1))
    np.testing.assert_array_equal(table["second_confidence"], np.sort(chances, axis=1)[:, -2])
    novel = table["confidence"] < 0.7
    assert 0 < novel.sum() < len(table)
    assert table["label"].tolist() == np.where(novel, NOVEL, table["best"]).tolist()
    assert report.labels == table["label"].value_counts().to_dict()
    assert report.n_novel == novel.sum()
    assert (report.n_cells, report.n_parts, report.n_skipped) == (304, 4, 0)


def test_one_read_gives_the_whole_table_and_the_classes(
    tmp_path: Path, store: IslandStore, model: Path
) -> None:
    predict(store, model, tmp_path / "labels")
    table = pd.read_parquet(tmp_path / "labels")
    assert sorted(table["barcode"]) == sorted(store.obs([])["barcode"])
    for file in (tmp_path / "labels").glob("*.parquet"):
        assert json.loads(pq.read_schema(file).metadata[b"classes"]) == list(TYPES)
    manifest = json.loads((tmp_path / "labels" / MANIFEST).read_text())
    assert manifest["complete"] is True
    assert manifest["model"] == read_model(model).digest
    assert manifest["store"] == str(store.path)
    assert manifest["rule"]["novel_threshold"] == NOVEL_THRESHOLD
    assert manifest["classes"] == list(TYPES)
    assert manifest["columns"] == COLUMNS
    assert {n: s["digest"] for n, s in manifest["samples"].items()} == {
        n: s.digest for n, s in store.samples.items()
    }
    assert [(p["file"], p["n_cells"]) for p in manifest["parts"]] == [
        (f"{name}-00000.parquet", n) for name, n in SIZES.items()
    ]


def test_the_models_own_threshold_is_the_default_and_0_names_none(
    tmp_path: Path, store: IslandStore, model: Path
) -> None:
    predict(store, model, tmp_path / "own")
    predict(store, model, tmp_path / "none", novel_threshold=0)
    predict(store, model, tmp_path / "said", novel_threshold=NOVEL_THRESHOLD)
    own, none = table_of(tmp_path / "own"), table_of(tmp_path / "none")
    assert (own["label"] == NOVEL).sum() == (own["confidence"] < NOVEL_THRESHOLD).sum() > 0
    assert none["label"].tolist() == none["best"].tolist() == own["best"].tolist()
    assert_same_bytes(tmp_path / "own", tmp_path / "said")
    with pytest.raises(ConfigError, match="novel threshold"):
        predict(store, model, tmp_path / "wrong", novel_threshold=50)
    assert not (tmp_path / "wrong").exists()


def test_a_model_of_one_type_has_no_second(tmp_path: Path, store: IslandStore) -> None:
    small_model(tmp_path / "model", types=("T cell",))
    predict(store, tmp_path / "model", tmp_path / "labels")
    table = table_of(tmp_path / "labels")
    assert set(table["best"]) == {"T cell"}
    assert (table["confidence"] == 1).all()
    assert table[["second", "second_confidence"]].isna().all(axis=None)


def test_what_a_cell_gets_does_not_depend_on_the_other_samples(
    tmp_path: Path, samples: dict[str, SmallSample], store: IslandStore, model: Path
) -> None:
    small_store(tmp_path / "alone.zarr", {"many": samples["many"]})
    predict(tmp_path / "alone.zarr", model, tmp_path / "alone")
    predict(store, model, tmp_path / "labels")
    assert (tmp_path / "alone/many-00000.parquet").read_bytes() == (
        tmp_path / "labels/many-00000.parquet"
    ).read_bytes()


@given(st.lists(st.one_of(st.integers(0, 3000), st.integers(0, 10**6)), max_size=700))
def test_batches_hold_every_cell_once_within_their_limits(counts: list[int]) -> None:
    n_tokens = np.array(counts, np.int64)
    batches = list(cut_batches(n_tokens, BATCH_TOKENS))
    whole = np.concatenate([np.empty(0, np.int64), *batches])
    assert sorted(whole) == list(range(len(counts)))
    assert (np.diff(n_tokens[whole]) >= 0).all()
    for batch in batches:
        assert len(batch) <= BATCH_CELLS
        assert len(batch) == 1 or n_tokens[batch].sum() <= BATCH_TOKENS
    for batch, following in itertools.pairwise(batches):
        more = np.concatenate([batch, following[:1]])
        assert len(more) > BATCH_CELLS or n_tokens[more].sum() > BATCH_TOKENS


def test_a_head_that_reads_no_encoder_gets_no_token_listed_and_batches_within_their_limits(
    tmp_path: Path, store: IslandStore, samples: dict[str, SmallSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(tmp_path / "model", "linear", attend="all", reads="none")
    expected = {
        name: expected_rows(one_by_one(model, sample), 0.5)["best"] for name, sample in samples.items()
    }
    seen = []
    summed = SummedHead.__call__

    def spy(self: SummedHead, cells: OpenIslands) -> tuple[np.ndarray, np.ndarray]:
        seen.append(cells.n_open)
        return summed(self, cells)

    def none(*_: object) -> None:
        raise AssertionError("not needed")

    monkeypatch.setattr(SummedHead, "__call__", spy)
    monkeypatch.setattr(TokenLister, "__call__", none)
    monkeypatch.setattr(Linformer, "forward", none)
    monkeypatch.setattr(predictor_module, "SUMMED_BATCH_TOKENS", 100)
    predict(store, tmp_path / "model", tmp_path / "labels")
    assert sum(map(len, seen)) == 304
    assert max(len(n_open) for n_open in seen) > 1
    assert all(len(n_open) == 1 or n_open.sum() <= 100 for n_open in seen)
    table = pd.read_parquet(tmp_path / "labels")
    for name, best in expected.items():
        assert table["best"][table["sample"] == name].tolist() == best.tolist()


def test_tables_of_sums_are_made_only_where_a_part_is_computed(
    tmp_path: Path, store: IslandStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise AssertionError("not needed")

    small_model(tmp_path / "model", "linear", reads="none")
    predict(store, tmp_path / "model", tmp_path / "labels")
    monkeypatch.setattr(SummedHead, "__init__", none)
    assert predict(store, tmp_path / "model", tmp_path / "labels").n_skipped == 4
    (tmp_path / "labels" / "many-00000.parquet").unlink()
    with pytest.raises(AssertionError, match="not needed"):
        predict(store, tmp_path / "model", tmp_path / "labels")


def test_no_batch_crosses_a_part_and_its_tokens_are_counted_before(
    tmp_path: Path, store: IslandStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_model(tmp_path / "model", attend="all")
    seen = []
    listing = TokenLister.__call__

    def spy(self: TokenLister, batch: Batch) -> Batch:
        listed = listing(self, batch)
        seen.append((listed.cell_ids, len(listed.tokens)))
        return listed

    monkeypatch.setattr(TokenLister, "__call__", spy)
    monkeypatch.setattr(predictor_module, "BATCH_TOKENS", 100)
    predict(store, tmp_path / "model", tmp_path / "labels")
    borders = np.cumsum([0, *SIZES.values()])
    for cells, n_tokens in seen:
        assert len(set(np.searchsorted(borders, cells, side="right"))) == 1
        assert n_tokens <= 100
    assert sorted(np.concatenate([cells for cells, _ in seen])) == list(range(304))


def test_the_share_of_islands_that_the_model_does_not_know_is_reported(
    tmp_path: Path, samples: dict[str, SmallSample], store: IslandStore, model: Path
) -> None:
    lines: list[str] = []
    progress = Silent()
    progress.say = lines.append  # type: ignore[method-assign]
    report = predict(store, model, tmp_path / "labels", progress=progress)
    for name, sample in samples.items():
        opened = sample.levels > 0
        expected = 1 - opened[:, VOCABULARY].sum() / max(opened.sum(), 1) if opened.any() else 0.0
        assert report.dropped[name] == pytest.approx(expected)
        assert f"{name}: {expected:.1%} of the open islands are not in the model's vocabulary" in lines


def test_models_without_types_or_digest_and_other_stores_are_refused(
    tmp_path: Path, store: IslandStore, samples: dict[str, SmallSample]
) -> None:
    small_model(tmp_path / "pretrained", head=None)
    with pytest.raises(ModelError, match=r"pretrained: .*annatac finetune"):
        predict(store, tmp_path / "pretrained", tmp_path / "labels")
    unwritten = small_model(tmp_path / "model")
    with pytest.raises(ModelError, match="never written"):
        predict(store, unwritten, tmp_path / "labels")
    other = small_store(tmp_path / "other.zarr", {"one": samples["one"]}, counting="fragment")
    with pytest.raises(ModelError, match=r"counting:\s+store fragment,\s+model insertion\s+\(differs\)"):
        predict(other, tmp_path / "model", tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_logits_that_are_not_finite_are_refused(tmp_path: Path, store: IslandStore, model: Path) -> None:
    broken = read_model(model)
    broken.typer.head.classifier.bias.data[0] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        predict(store, broken, tmp_path / "labels")


def test_an_empty_store_gives_an_empty_data_set(tmp_path: Path, model: Path) -> None:
    store = small_store(tmp_path / "atlas.zarr", {"none": draw_sample(0, 1)})
    assert predict(store, model, tmp_path / "labels").n_cells == 0
    table = pd.read_parquet(tmp_path / "labels")
    assert (len(table), list(table.columns)) == (0, COLUMNS)


def test_splits_are_copied_for_the_very_cells_of_the_fine_tuning(
    tmp_path: Path, store: IslandStore, model: Path
) -> None:
    rows = [("many", f"many-{i}", ["train", "val", "calib", "test"][i % 4]) for i in range(0, 300, 3)]
    rows += [("one", "one-0", "test"), ("three", "three-1", "test"), ("gone", "many-1", "train")]
    digests = {name: sample.x_sha256 for name, sample in store.samples.items()} | {"one": "0" * 64}
    write_split(tmp_path / "split.parquet", rows, digests)
    predict(store, model, tmp_path / "labels")
    expected = store.obs([]).merge(
        pd.DataFrame(rows, columns=["sample", "barcode", "split"]), on=["sample", "barcode"], how="left"
    )
    expected.loc[expected["sample"] == "one", "split"] = None
    expected = expected.sort_values(["sample", "barcode"])["split"]
    found = table_of(tmp_path / "labels")["split"]
    assert found.where(found.notna(), None).tolist() == expected.where(expected.notna(), None).tolist()
    assert found.notna().sum() == 101


def test_the_split_that_finetune_writes_is_read(tmp_path: Path, store: IslandStore, model: Path) -> None:
    cells = np.array([3, 299, 303])
    split = np.array(["train", "val", "test"], object)
    labelled = LabelledCells(cells, np.zeros(3, np.int64), split, ("x", "y"), 301)
    write_split_of_finetune(tmp_path / "split.parquet", store, labelled)
    predict(store, read_model(model), tmp_path / "labels")
    table = table_of(tmp_path / "labels").set_index("barcode")["split"].dropna()
    assert table.to_dict() == {"many-3": "train", "many-299": "val", "three-2": "test"}


def test_without_a_split_the_column_is_empty(tmp_path: Path, store: IslandStore, model: Path) -> None:
    predict(store, model, tmp_path / "labels")
    assert table_of(tmp_path / "labels")["split"].isna().all()


def test_splits_that_cannot_be_read_are_refused(tmp_path: Path, store: IslandStore, model: Path) -> None:
    split = tmp_path / "split.parquet"
    for damage in (lambda: split.write_text("x"), lambda: pd.DataFrame({"sample": ["a"]}).to_parquet(split)):
        damage()
        with pytest.raises(ModelError, match=r"split\.parquet: cannot be read"):
            predict(store, model, tmp_path / "labels")
    rows = [("many", "many-1", "train"), ("many", "many-1", "test")]
    write_split(split, rows, {"many": store.samples["many"].x_sha256})
    with pytest.raises(ModelError, match="sample 'many' has cell 'many-1' twice"):
        predict(store, model, tmp_path / "labels")


ASSEMBLY = Assembly("toy", ("chr1",), (200_000,))


def write_h5ad(path: Path, n_cells: int = 30) -> anndata.AnnData:
    rng = np.random.default_rng(4)
    peaks = [f"chr1:{5000 * i}-{5000 * i + 500}" for i in range(40)]
    data = anndata.AnnData(
        sparse.csr_matrix(rng.poisson(0.3, (n_cells, 40)).astype(np.float32)),
        pd.DataFrame({"donor": rng.choice(["d1", "d2"], n_cells)}, index=[f"c{i}" for i in range(n_cells)]),
        pd.DataFrame(index=peaks),
    )
    data.write_h5ad(path)
    return data


def test_labels_are_written_into_a_copy_of_the_input(tmp_path: Path) -> None:
    given = write_h5ad(tmp_path / "cells.h5ad")
    bytes_before = (tmp_path / "cells.h5ad").read_bytes()
    convert(tmp_path / "cells.h5ad", assembly=ASSEMBLY, out=tmp_path / "a.zarr", select="all")
    small_model(tmp_path / "model", space=IslandStore.open(tmp_path / "a.zarr").space)
    out = tmp_path / "labelled.h5ad"
    report = predict(tmp_path / "a.zarr", tmp_path / "model", tmp_path / "labels", write_h5ad=out)
    assert report.h5ad == out
    assert (tmp_path / "cells.h5ad").read_bytes() == bytes_before
    found = anndata.read_h5ad(out)
    table = pd.read_parquet(tmp_path / "labels").set_index("barcode").loc[found.obs_names]
    assert list(found.obs.columns) == [
        "donor",
        *(f"annatac_{name}" for name in [*COLUMNS[2:9], "n_open"]),
    ]
    assert found.obs["donor"].tolist() == given.obs["donor"].tolist()
    for name in [*COLUMNS[2:9], "n_open"]:
        assert found.obs[f"annatac_{name}"].tolist() == table[name].tolist()
    assert (found.X != given.X).nnz == 0


def test_an_h5ad_of_a_finished_run_is_written_over_an_older_one(tmp_path: Path) -> None:
    write_h5ad(tmp_path / "cells.h5ad")
    convert(tmp_path / "cells.h5ad", assembly=ASSEMBLY, out=tmp_path / "a.zarr", select="all")
    small_model(tmp_path / "model", space=IslandStore.open(tmp_path / "a.zarr").space)
    predict(tmp_path / "a.zarr", tmp_path / "model", tmp_path / "labels")
    path = tmp_path / "labelled.h5ad"
    path.write_text("older")
    report = predict(tmp_path / "a.zarr", tmp_path / "model", tmp_path / "labels", write_h5ad=path)
    assert report.n_skipped == 1
    assert "annatac_label" in anndata.read_h5ad(path).obs


def test_labels_are_never_written_over_the_input_whatever_it_is_called(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    write_h5ad(path)
    convert(path, assembly=ASSEMBLY, out=tmp_path / "a.zarr", select="all")
    small_model(tmp_path / "model", space=IslandStore.open(tmp_path / "a.zarr").space)
    (tmp_path / "link.h5ad").symlink_to(path)
    (tmp_path / "hard.h5ad").hardlink_to(path)
    before = path.read_bytes()
    for out in (path, tmp_path / "model/../cells.h5ad", tmp_path / "link.h5ad", tmp_path / "hard.h5ad"):
        with pytest.raises(InputError, match=r"found the file that .* converted from.*choose another path"):
            predict(tmp_path / "a.zarr", tmp_path / "model", tmp_path / "labels", write_h5ad=out)
    assert path.read_bytes() == before
    assert not (tmp_path / "labels").exists()


def test_an_h5ad_is_asked_for_in_vain(tmp_path: Path, store: IslandStore, model: Path) -> None:
    out = tmp_path / "x.h5ad"
    with pytest.raises(InputError, match=r"--write-h5ad: found 4 samples in .*atlas\.zarr, expected one"):
        predict(store, model, tmp_path / "labels", write_h5ad=out)
    small_store(tmp_path / "one.zarr", {"a": draw_sample(3, 1)})
    with pytest.raises(
        InputError, match="--write-h5ad: found sample 'a' converted from fragments, expected an"
    ):
        predict(tmp_path / "one.zarr", model, tmp_path / "labels", write_h5ad=out)
    write_h5ad(tmp_path / "cells.h5ad")
    convert(tmp_path / "cells.h5ad", assembly=ASSEMBLY, out=tmp_path / "a.zarr", select="all")
    small_model(tmp_path / "model", space=IslandSpace.all(ASSEMBLY))
    (tmp_path / "cells.h5ad").unlink()
    with pytest.raises(InputError, match=r"cells\.h5ad: not there any more, expected the file"):
        predict(tmp_path / "a.zarr", tmp_path / "model", tmp_path / "labels", write_h5ad=out)
    assert not (tmp_path / "labels").exists()


def test_an_h5ad_of_an_input_in_object_storage_is_refused_by_its_url(
    tmp_path: Path, s3: ObjectStorage
) -> None:
    write_h5ad(tmp_path / "cells.h5ad")
    url = f"{s3.bucket()}/cells.h5ad"
    s3.put(url, (tmp_path / "cells.h5ad").read_bytes())
    convert(url, assembly=ASSEMBLY, out=tmp_path / "a.zarr", select="all")
    small_model(tmp_path / "model", space=IslandSpace.all(ASSEMBLY))
    with pytest.raises(InputError, match=f"converted from {url}, expected an h5ad file on a disk"):
        predict(tmp_path / "a.zarr", tmp_path / "model", tmp_path / "labels", write_h5ad=tmp_path / "x.h5ad")


def test_the_split_beside_a_model_in_object_storage_is_found(
    tmp_path: Path, s3: ObjectStorage, store: IslandStore
) -> None:
    url = f"{s3.bucket()}/run"
    small_model(f"{url}/model")
    predict(store, f"{url}/model", tmp_path / "without")
    assert table_of(tmp_path / "without")["split"].isna().all()
    digests = {name: sample.x_sha256 for name, sample in store.samples.items()}
    write_split(tmp_path / "split.parquet", [("many", "many-7", "test")], digests)
    s3.put(f"{url}/split.parquet", (tmp_path / "split.parquet").read_bytes())
    predict(store, f"{url}/model", tmp_path / "labels")
    table = table_of(tmp_path / "labels").set_index("barcode")["split"].dropna()
    assert table.to_dict() == {"many-7": "test"}
    s3.put(f"{url}/split.parquet", b"x")
    with pytest.raises(ModelError, match=rf"{url}/split\.parquet: cannot be read"):
        predict(store, f"{url}/model", tmp_path / "damaged")
