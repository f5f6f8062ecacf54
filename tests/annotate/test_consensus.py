"""Clusters and what most of their cells are: against plain loops, planted clusters, and runs that were interrupted."""

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from predicted import assert_same_bytes
from small_atlas import add_sample, draw_sample, small_model, small_store

from annatac_scale.annotate import clusters as clusters_module
from annatac_scale.annotate import consensus as consensus_module
from annatac_scale.annotate.clusters import (
    NEIGHBOURS,
    Clusters,
    _communities,
    column_clusters,
    leiden_clusters,
)
from annatac_scale.annotate.confidence import ConfidenceRule
from annatac_scale.annotate.consensus import add_consensus
from annatac_scale.annotate.labels import (
    CONSENSUS_COLUMNS,
    PART_CELLS,
    LabelsFolder,
    Manifest,
    SampleRecord,
    Written,
    read_manifest,
)
from annatac_scale.annotate.labels_writer import Share
from annatac_scale.annotate.predict import predict
from annatac_scale.errors import ConfigError, InputError
from annatac_scale.model.labels import LOW_DEPTH, NOVEL
from annatac_scale.progress import Silent
from annatac_scale.store.locks import try_folder_lock
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import replace_obs

CLASSES = ("T cell", "B cell", "astro")
LABELS = (*CLASSES, NOVEL, LOW_DEPTH)
SIZES = {"a": 60, "none": 0, "b": 25}


def labels_folder(
    path: Path,
    labels: dict[str, list[str]],
    embeddings: dict[str, np.ndarray] | None = None,
    x_sha256: dict[str, str] | None = None,
) -> LabelsFolder:
    """A complete data set of these labels, as `predict` would leave it, but of few columns."""
    path.mkdir()
    records = {
        name: SampleRecord(len(of), (x_sha256 or {}).get(name, name), "obs") for name, of in labels.items()
    }
    rule = ConfidenceRule(None, False, "max_probability", None, 0.5, False, 0)
    columns, written = ("sample", "barcode", "label"), Written(embeddings=embeddings is not None)
    folder = LabelsFolder(path, Manifest("model", "store", records, rule, "", CLASSES, columns, written))
    folder.write_manifest(complete=False)
    for part in folder.manifest.parts:
        own = slice(part.first, part.first + part.n_cells)
        of = labels[part.sample][own]
        rows = {
            "sample": [part.sample] * len(of),
            "barcode": [f"{part.sample}-{part.first + i}" for i in range(len(of))],
            "label": of,
        }
        table = pa.table(rows, schema=pa.schema({name: pa.string() for name in rows}))
        vectors = None if embeddings is None else embeddings[part.sample][own].astype(np.float16)
        folder.write(part, table, vectors)
    folder.write_manifest(complete=True)
    return LabelsFolder.open(path)


def drawn_labels(seed: int = 0) -> dict[str, list[str]]:
    rng = np.random.default_rng(seed)
    return {name: rng.choice(LABELS, n, p=[0.3, 0.3, 0.1, 0.2, 0.1]).tolist() for name, n in SIZES.items()}


def store_with(path: Path, columns: dict[str, list[Any]]) -> IslandStore:
    """A store of SIZES, each column given over all cells."""
    store = small_store(path, {name: draw_sample(n, seed) for seed, (name, n) in enumerate(SIZES.items())})
    for name, sample in store.samples.items():
        own = slice(sample.first_cell, sample.first_cell + sample.n_cells)
        values = {column: pd.Series(of[own], sample.obs().index) for column, of in columns.items()}
        replace_obs(path, name, sample.obs().assign(**values))
    return IslandStore.open(path)


def checksums(store: IslandStore) -> dict[str, str]:
    return {name: sample.x_sha256 for name, sample in store.samples.items()}


@pytest.fixture
def groups() -> list[str | None]:
    rng = np.random.default_rng(5)
    names = ["c1", "c2", " c2 ", "c10", None, "NA"]
    return [names[i] for i in rng.integers(0, len(names), sum(SIZES.values()))]


@pytest.fixture
def grouped(tmp_path: Path, groups: list[str | None]) -> IslandStore:
    other = [f"d{i % 2}" for i in range(sum(SIZES.values()))]
    return store_with(tmp_path / "atlas.zarr", {"group": groups, "other": other})


@pytest.fixture
def folder(tmp_path: Path, grouped: IslandStore) -> LabelsFolder:
    return labels_folder(tmp_path / "labels", drawn_labels(), x_sha256=checksums(grouped))


def table_of(folder: LabelsFolder) -> pd.DataFrame:
    columns = folder.manifest.columns
    return pa.concat_tables([folder.read(part, columns) for part in folder.manifest.parts]).to_pandas()


def one_by_one(labels: list[str], groups: list[str | None]) -> pd.DataFrame:
    """CONSENSUS_COLUMNS, by counting."""
    votes: dict[str, Counter[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        if group is not None:
            votes.setdefault(group, Counter())
            if label != LOW_DEPTH:
                votes[group][label] += 1
    rows = []
    for group in groups:
        of = votes.get(group or "", Counter())
        best = max([*CLASSES, NOVEL], key=lambda label: of[label]) if of else None
        share = of[best] / of.total() if best else np.nan
        rows.append((group, best, np.float32(share)))
    return pd.DataFrame(rows, columns=list(CONSENSUS_COLUMNS)).astype({"consensus_share": np.float32})


def as_read(groups: list[str | None]) -> list[str | None]:
    return [None if group in (None, "NA") else group.strip() for group in groups]


def test_a_column_of_obs_gives_what_counting_gives_and_labels_stay(
    folder: LabelsFolder, grouped: IslandStore, groups: list[str | None]
) -> None:
    before = table_of(folder)
    found = add_consensus(folder, "group", grouped)
    table = table_of(LabelsFolder.open(folder.location))
    expected = one_by_one(before["label"].tolist(), as_read(groups))
    pd.testing.assert_frame_equal(table[list(CONSENSUS_COLUMNS)], expected)
    pd.testing.assert_frame_equal(table[before.columns], before)
    assert table["cluster"].isna().sum() == sum(group in (None, "NA") for group in groups) > 0
    voting = table[table["cluster"].notna() & (table["label"] != LOW_DEPTH)]
    agree = int((voting["label"] == voting["consensus"]).sum())
    assert (found.by, found.n_clusters, found.n_voting, found.n_agree) == ("group", 3, len(voting), agree)
    assert found.share == agree / len(voting)
    manifest = read_manifest(folder.location)
    assert manifest.consensus == found
    assert manifest.columns == ("sample", "barcode", "label", *CONSENSUS_COLUMNS)
    assert manifest.complete


def test_ties_go_to_the_first_class_and_novel_is_last(tmp_path: Path) -> None:
    cells = [
        ("tie", "B cell"),
        ("tie", NOVEL),
        ("tie", "T cell"),
        ("novel tie", NOVEL),
        ("novel tie", "astro"),
        ("novel", NOVEL),
        ("novel", NOVEL),
        ("novel", "T cell"),
        ("shallow", LOW_DEPTH),
        ("shallow", LOW_DEPTH),
        ("deep", LOW_DEPTH),
        ("deep", LOW_DEPTH),
        ("deep", "B cell"),
    ]
    folder = labels_folder(tmp_path / "labels", {"a": [label for _, label in cells]})
    names = sorted({name for name, _ in cells})
    codes = np.array([names.index(name) for name, _ in cells], np.int32)
    votes = consensus_module._votes(folder, Clusters(codes, tuple(names)))
    elected = consensus_module._Elected.of(votes, consensus_module._voted(folder))
    found = dict(
        zip(names, zip(elected.label.to_pylist(), elected.share.to_pylist(), strict=True), strict=True)
    )
    assert found == {
        "tie": ("T cell", pytest.approx(1 / 3)),
        "novel tie": ("astro", 0.5),
        "novel": (NOVEL, pytest.approx(2 / 3)),
        "shallow": (None, None),
        "deep": ("B cell", 1.0),
    }


def test_numbers_and_truth_values_name_clusters(tmp_path: Path) -> None:
    n = sum(SIZES.values())
    columns = {
        "number": [float(i % 3) if i % 7 else np.nan for i in range(n)],
        "whole": [i % 2 for i in range(n)],
        "truth": [i % 4 == 0 for i in range(n)],
    }
    store = store_with(tmp_path / "atlas.zarr", columns)
    records = {name: SampleRecord(s.n_cells, s.x_sha256, "") for name, s in store.samples.items()}
    for column, texts in {
        "number": [str(i % 3) if i % 7 else None for i in range(n)],
        "whole": [str(i % 2) for i in range(n)],
        "truth": [str(i % 4 == 0) for i in range(n)],
    }.items():
        found = column_clusters(store, records, column)
        assert [None if code < 0 else found.names[code] for code in found.codes] == texts
    without_a = column_clusters(store, {"b": records["b"]}, "whole")
    assert without_a.codes.tolist() == [i % 2 for i in range(SIZES["a"], n)]


def test_running_again_writes_nothing_unless_the_clusters_are_others(
    folder: LabelsFolder, grouped: IslandStore, groups: list[str | None]
) -> None:
    first = add_consensus(folder, "group", grouped)
    path = Path(folder.location)

    def stamps() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in path.iterdir()}

    before = stamps()
    assert add_consensus(LabelsFolder.open(path), "group", grouped) == first
    assert stamps() == before
    sample = grouped.samples["a"]
    replace_obs(grouped.path, "a", sample.obs().assign(group=["c1"] * sample.n_cells))
    changed = add_consensus(LabelsFolder.open(path), "group", IslandStore.open(grouped.path))
    assert changed.column_sha256 != first.column_sha256
    table = table_of(LabelsFolder.open(path))
    expected = one_by_one(table["label"].tolist(), ["c1"] * SIZES["a"] + as_read(groups)[SIZES["a"] :])
    pd.testing.assert_frame_equal(table[list(CONSENSUS_COLUMNS)], expected)


def test_another_column_replaces_the_consensus(folder: LabelsFolder, grouped: IslandStore) -> None:
    add_consensus(folder, "group", grouped)
    found = add_consensus(folder, "other", grouped)
    table = table_of(LabelsFolder.open(folder.location))
    assert list(table) == ["sample", "barcode", "label", *CONSENSUS_COLUMNS]
    expected = one_by_one(table["label"].tolist(), [f"d{i % 2}" for i in range(len(table))])
    pd.testing.assert_frame_equal(table[list(CONSENSUS_COLUMNS)], expected)
    assert read_manifest(folder.location).consensus == found


@pytest.mark.parametrize("n_written", [0, 1, 2])
def test_an_interrupted_run_names_no_consensus_and_is_made_up_for(
    tmp_path: Path,
    folder: LabelsFolder,
    grouped: IslandStore,
    monkeypatch: pytest.MonkeyPatch,
    n_written: int,
) -> None:
    undisturbed = labels_folder(tmp_path / "undisturbed", drawn_labels(), x_sha256=checksums(grouped))
    add_consensus(undisturbed, "other", grouped)
    add_consensus(folder, "group", grouped)
    left, write = [n_written], LabelsFolder.replace

    def write_some(*args: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LabelsFolder, "replace", write_some)
        with pytest.raises(KeyboardInterrupt):
            add_consensus(folder, "other", grouped)
    between = LabelsFolder.open(folder.location)
    assert between.manifest.consensus is None
    assert between.manifest.columns == ("sample", "barcode", "label")
    assert table_of(between)["label"].tolist() == table_of(undisturbed)["label"].tolist()
    add_consensus(between, "other", grouped)
    assert_same_bytes(Path(folder.location), Path(undisturbed.location))
    assert read_manifest(folder.location) == read_manifest(undisturbed.location)


def predicted(tmp_path: Path) -> tuple[IslandStore, Path, Path]:
    """A store with clusters in obs, a model, and labels with a consensus."""
    samples = {"a": draw_sample(40, 1), "b": draw_sample(30, 2)}
    store = small_store(tmp_path / "atlas.zarr", samples)
    for name, sample in store.samples.items():
        replace_obs(store.path, name, sample.obs().assign(group=[str(i % 3) for i in range(sample.n_cells)]))
    small_model(tmp_path / "model")
    store = IslandStore.open(store.path)
    predict(store, tmp_path / "model", tmp_path / "labels", probabilities=True, embeddings=True)
    add_consensus(LabelsFolder.open(tmp_path / "labels"), "group", store)
    return store, tmp_path / "model", tmp_path / "labels"


def test_predicting_again_keeps_the_consensus_and_all_else(tmp_path: Path) -> None:
    store, model, out = predicted(tmp_path)
    before = {file.name: file.read_bytes() for file in out.glob("*.*") if file.is_file()}
    again = predict(store, model, out, probabilities=True, embeddings=True)
    assert again.complete
    assert again.n_skipped == again.n_parts == 2
    assert {name: (out / name).read_bytes() for name in before} == before
    predict(store, model, tmp_path / "plain", probabilities=True)
    plain, table = pd.read_parquet(tmp_path / "plain"), pd.read_parquet(out)
    pd.testing.assert_frame_equal(table[plain.columns], plain)
    assert list(table) == [*plain.columns, *CONSENSUS_COLUMNS]


def test_new_samples_and_parts_that_are_made_again_end_the_consensus(tmp_path: Path) -> None:
    store, model, out = predicted(tmp_path)
    columns = LabelsFolder.open(out).manifest.predicted_columns
    (out / "b-00000.parquet").unlink()
    predict(store, model, out, probabilities=True, embeddings=True)
    manifest = read_manifest(out)
    assert (manifest.complete, manifest.consensus, manifest.columns) == (True, None, columns)
    add_consensus(LabelsFolder.open(out), "group", store)
    assert read_manifest(out).consensus is not None
    add_sample(store.path, "c", draw_sample(10, 3))
    assert predict(store.path, model, out, probabilities=True, embeddings=True).n_skipped == 2
    manifest = read_manifest(out)
    assert (manifest.complete, manifest.consensus, manifest.columns) == (True, None, columns)
    found = add_consensus(LabelsFolder.open(out), "group", IslandStore.open(store.path))
    table = pd.read_parquet(out)
    assert list(table) == [*columns, *CONSENSUS_COLUMNS]
    assert table["cluster"].isna().tolist() == (table["sample"] == "c").tolist()
    assert found.n_clusters == 3


def test_a_share_that_began_before_does_not_bring_the_consensus_back(tmp_path: Path) -> None:
    _, _, out = predicted(tmp_path)
    early, late = LabelsFolder.open(out), LabelsFolder.open(out)
    late.write_manifest(complete=False)
    early.write_manifest(complete=True)
    assert read_manifest(out).consensus is None


def test_what_cannot_be_done_is_refused_and_changes_nothing(
    tmp_path: Path, folder: LabelsFolder, grouped: IslandStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = sum(SIZES.values())
    columns = {"empty": [None] * n, "each": [f"cell {i}" for i in range(n)], "leiden": ["x"] * n}
    store = store_with(tmp_path / "more.zarr", columns)
    add_consensus(folder, "group", grouped)
    before = {file.name: file.read_bytes() for file in Path(folder.location).iterdir()}
    with pytest.raises(ConfigError, match="--consensus group: found no store, expected the one"):
        add_consensus(folder, "group")
    with pytest.raises(InputError, match="no obs column 'absent'"):
        add_consensus(folder, "absent", grouped)
    with pytest.raises(InputError, match=r"--consensus empty: found no value in obs of any of 85 cells"):
        add_consensus(folder, "empty", store)
    with pytest.raises(InputError, match=r"--consensus each: found 85 values in obs of 85 cells"):
        add_consensus(folder, "each", store)
    changed = small_store(tmp_path / "changed.zarr", {"a": draw_sample(60, 9)})
    with pytest.raises(InputError, match="found other cells in sample 'a', expected the store that was"):
        add_consensus(folder, "group", changed)
    with pytest.raises(ConfigError, match=r"leiden: found no embeddings in .* predict with --embeddings"):
        add_consensus(folder, "leiden", grouped)
    lock = try_folder_lock(folder.location, Share().lock)
    assert lock is not None
    with pytest.raises(InputError, match="another process is writing labels here"):
        add_consensus(folder, "other", grouped)
    lock.release()
    embedded = labels_folder(tmp_path / "embedded", {"a": ["T cell"] * 20}, {"a": np.zeros((20, 4))})
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"found the resolution .*, expected more than 0"):
            add_consensus(embedded, "leiden", resolution=wrong)
    with pytest.raises(ConfigError, match="found the seed -1, expected one from 0"):
        add_consensus(embedded, "leiden", seed=-1)
    monkeypatch.setitem(sys.modules, "pynndescent", None)
    monkeypatch.setitem(sys.modules, "igraph", None)
    with pytest.raises(ConfigError, match=r"is not installed; pip install 'annatac_scale\[consensus\]'"):
        add_consensus(embedded, "leiden")
    said: list[str] = []
    monkeypatch.setattr(Silent, "say", lambda self, line: said.append(line))
    with pytest.raises(ConfigError):
        add_consensus(embedded, "leiden", store)
    assert len(said) == 1
    assert "the obs column 'leiden' of" in said[0]
    assert {file.name: file.read_bytes() for file in Path(folder.location).iterdir()} == before


def test_a_data_set_that_is_no_longer_complete_is_refused(folder: LabelsFolder, grouped: IslandStore) -> None:
    LabelsFolder.open(folder.location).write_manifest(complete=False)
    with pytest.raises(InputError, match="found parts missing now, expected the complete data set"):
        add_consensus(folder, "group", grouped)


def test_leiden_is_run_again_only_for_another_seed_or_resolution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = labels_folder(tmp_path / "labels", {"a": ["T cell"] * 20}, {"a": np.zeros((20, 4))})
    runs: list[tuple[int, float]] = []

    def found(of: LabelsFolder, progress: object, seed: int, resolution: float) -> Clusters:
        runs.append((seed, resolution))
        return Clusters(np.zeros(20, np.int32), ("0",))

    monkeypatch.setattr(consensus_module, "leiden_clusters", found)
    for options in ({}, {"seed": 0}, {"seed": 1}, {"seed": 1}, {"resolution": 2.0}, {}):
        record = add_consensus(folder, "leiden", **options)
        assert (record.seed, record.resolution) == (options.get("seed", 0), options.get("resolution", 1.0))
        folder = LabelsFolder.open(folder.location)
    assert runs == [(0, 1.0), (1, 1.0), (0, 2.0), (0, 1.0)]


def test_few_cells_are_one_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters_module, "_check_libraries", lambda: None)  # which take long to load
    n = NEIGHBOURS + 1
    vectors = np.random.default_rng(0).normal(size=(n, 4))
    folder = labels_folder(tmp_path / "labels", {"a": ["T cell"] * n}, {"a": vectors})
    found = add_consensus(folder, "leiden")
    assert (found.n_clusters, found.n_agree, found.share) == (1, n, 1.0)
    assert set(table_of(folder)["cluster"]) == {"0"}
    empty = labels_folder(tmp_path / "empty", {"a": []}, {"a": np.empty((0, 4))})
    none = add_consensus(empty, "leiden")
    assert (none.n_clusters, none.n_voting) == (0, 0)
    assert np.isnan(none.share)


def test_communities_are_those_of_the_graph_and_leave_the_random_numbers_of_others_alone() -> None:
    pytest.importorskip("igraph")
    rng = np.random.default_rng(1)
    group = rng.integers(0, 4, 200)
    neighbours = np.stack([rng.choice(np.flatnonzero(group == own), 6) for own in group]).astype(np.int32)
    neighbours[::9, 5] = -1
    random.seed(3)
    state = random.getstate()
    found = _communities(neighbours, seed=0, resolution=1.0)
    assert random.getstate() == state
    assert len(set(zip(group.tolist(), found.tolist(), strict=True))) == 4
    assert (_communities(neighbours, seed=0, resolution=1.0) == found).all()
    assert len(set(_communities(neighbours, seed=0, resolution=20.0).tolist())) > 4


@pytest.mark.slow
@pytest.mark.timeout(900)  # kernels compile, in every process
def test_leiden_finds_planted_clusters_of_landmarks_and_of_all_other_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("igraph")
    pytest.importorskip("pynndescent")
    rng = np.random.default_rng(0)
    sizes = {"a": PART_CELLS + 500, "none": 0, "one": 1, "b": 700}
    centres = rng.normal(size=(5, 12)) * 6
    planted = {name: rng.choice(5, n, p=[0.1, 0.35, 0.25, 0.2, 0.1]) for name, n in sizes.items()}
    vectors = {name: centres[of] + rng.normal(size=(len(of), 12)) for name, of in planted.items()}
    for name, of in planted.items():
        vectors[name][of == 4] = 0  # as closed cells, which are all alike
    names = np.array([*CLASSES, NOVEL, LOW_DEPTH], object)
    right = {name: rng.random(n) < 0.8 for name, n in sizes.items()}
    labels = {name: np.where(right[name], names[of], "T cell").tolist() for name, of in planted.items()}
    folder = labels_folder(tmp_path / "labels", labels, vectors)
    monkeypatch.setattr(clusters_module, "LANDMARKS", 1500)
    monkeypatch.setattr("builtins.print", lambda *_: None)  # as Ray does in the process that starts it
    n_threads = torch.get_num_threads()
    found = add_consensus(folder, "leiden", seed=7)
    assert torch.get_num_threads() == n_threads  # though numba began its own, of the same OpenMP
    table = table_of(folder)
    truth = np.concatenate(list(planted.values()))
    of_truth = {group: set(table["cluster"][truth == group]) for group in range(4)}
    assert all(len(own) == 1 for own in of_truth.values())
    assert len(set().union(*of_truth.values())) == 4
    assert table["cluster"][truth == 4].nunique() == 1
    n_of = table["cluster"].value_counts()
    by_name = [n_of[str(number)] for number in range(found.n_clusters)]
    assert by_name == sorted(by_name, reverse=True)
    for group in range(4):
        own = table[table["cluster"].isin(of_truth[group])]
        voting = own[own["label"] != LOW_DEPTH]
        assert set(own["consensus"]) == {names[group]}
        assert np.allclose(own["consensus_share"], (voting["label"] == names[group]).mean(), atol=1e-6)
    again = leiden_clusters(folder, Silent(), seed=7)
    assert [again.names[code] for code in again.codes] == table["cluster"].tolist()
