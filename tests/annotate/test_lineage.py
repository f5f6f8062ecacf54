"""Lineages in the labels data set and in evaluation, against plain recursion over the probabilities on disk."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from small_atlas import TYPES, add_sample, draw_sample, small_model, small_space, write_split

from annatac_scale.annotate.evaluate import evaluate
from annatac_scale.annotate.evaluation_report import LeftOut
from annatac_scale.annotate.hierarchy_metrics import lineage_figures
from annatac_scale.annotate.labels import MANIFEST, read_manifest
from annatac_scale.annotate.predict import predict
from annatac_scale.errors import ConfigError, InputError
from annatac_scale.model.folder import write_model
from annatac_scale.model.hierarchy import Hierarchy
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import create_store

ABOVE = {"astro": ["glia"], "glia": ["neural"], "neuron": ["neural"], "neural": [], "B cell": []}
"""glia and neural lie above; B cell is a root of its own."""
DEPTH = {"neural": 0, "B cell": 0, "glia": 1, "neuron": 1, "astro": 2}
HIERARCHY = Hierarchy.of(TYPES, ABOVE, "toy")


def ancestors(name: str) -> Iterator[str]:
    """The node, and all above it."""
    yield name
    for parent in ABOVE.get(name, []):
        yield from ancestors(parent)


def lineage_of(chances: dict[str, float], threshold: float) -> tuple[str | None, float | None]:
    sums = {node: sum(p for label, p in chances.items() if node in ancestors(label)) for node in DEPTH}
    enough = [node for node in DEPTH if sums[node] >= threshold]
    best = min(enough, key=lambda node: (-DEPTH[node], -sums[node], node), default=None)
    return best, None if best is None else sums[best]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with atlas.zarr, whose truth has types of all levels and one beside them, run/model and labels."""
    path = tmp_path_factory.mktemp("lineage")
    create_store(path / "atlas.zarr", small_space(), "insertion")
    rng = np.random.default_rng(1)
    truth = rng.choice([*TYPES, "glia", "elsewhere", ""], 240).astype(object)
    truth[truth == ""] = None
    obs = pd.DataFrame({"truth": truth}, index=[f"c{i}" for i in range(240)])
    add_sample(path / "atlas.zarr", "a", draw_sample(240, 3), obs)
    model = small_model(path / "run/model")
    write_model(
        path / "run/model", replace(model, info=replace(model.info, hierarchy=HIERARCHY, temperature=2.0)), ""
    )
    store = IslandStore.open(path / "atlas.zarr")
    splits = ["train", "test", "test"]
    rows = [("a", f"c{i}", splits[i % 3]) for i in range(240)]
    write_split(path / "run/split.parquet", rows, {n: s.x_sha256 for n, s in store.samples.items()})
    predict(store, path / "run/model", path / "labels")
    return path


@pytest.mark.parametrize("threshold", [None, 0.6, 0.95])
def test_lineages_are_those_of_the_probabilities_beside_them(
    atlas: Path, tmp_path: Path, threshold: float
) -> None:
    options = {"hierarchy_threshold": threshold, "probabilities": True}
    predict(atlas / "atlas.zarr", atlas / "run/model", tmp_path / "labels", **options)
    table = pd.read_parquet(tmp_path / "labels")
    found = []
    for row in table.itertuples():
        chances = dict(zip(TYPES, map(float, row.probabilities), strict=True))
        lineage, confidence = lineage_of(chances, threshold or 0.8)
        assert (row.lineage or None) == lineage
        assert row.lineage_confidence == pytest.approx(np.nan if lineage is None else confidence, nan_ok=True)
        found.append(lineage)
    assert {None, "neural"} <= set(found)
    assert threshold == 0.95 or "astro" in found
    assert table["lineage_confidence"].isna().tolist() == [name is None for name in found]


def test_the_manifest_keeps_hierarchy_and_threshold(atlas: Path, tmp_path: Path) -> None:
    manifest = read_manifest(atlas / "labels")
    assert (manifest.hierarchy, manifest.hierarchy_threshold) == (HIERARCHY, 0.8)
    assert manifest.columns[-2:] == ("lineage", "lineage_confidence")
    values = json.loads((atlas / "labels" / MANIFEST).read_text())
    assert values["parents"] == HIERARCHY.to_json()


def test_labels_with_another_threshold_do_not_come_into_one_folder(atlas: Path) -> None:
    before = {file.name: file.read_bytes() for file in (atlas / "labels").iterdir()}
    with pytest.raises(InputError, match=r"made with hierarchy_threshold 0.8, now asked for 0.9"):
        predict(atlas / "atlas.zarr", atlas / "run/model", atlas / "labels", hierarchy_threshold=0.9)
    assert predict(atlas / "atlas.zarr", atlas / "run/model", atlas / "labels").n_skipped == 1
    assert {file.name: file.read_bytes() for file in (atlas / "labels").iterdir()} == before


def test_a_model_without_a_hierarchy_has_no_lineages_and_takes_no_threshold(
    atlas: Path, tmp_path: Path
) -> None:
    small_model(tmp_path / "model")
    predict(atlas / "atlas.zarr", tmp_path / "model", tmp_path / "labels")
    assert not {"lineage", "lineage_confidence"} & set(pd.read_parquet(tmp_path / "labels").columns)
    manifest = read_manifest(tmp_path / "labels")
    assert (manifest.hierarchy, manifest.hierarchy_threshold) == (None, None)
    assert evaluate(tmp_path / "labels", atlas / "atlas.zarr", "truth", cells="all").lineage is None
    with pytest.raises(ConfigError, match=r"--hierarchy-threshold 0.7: .*model has no hierarchy"):
        predict(atlas / "atlas.zarr", tmp_path / "model", tmp_path / "other", hierarchy_threshold=0.7)
    with pytest.raises(ConfigError, match=r"--hierarchy-threshold: found 1.5"):
        predict(atlas / "atlas.zarr", atlas / "run/model", tmp_path / "other", hierarchy_threshold=1.5)


def figures_by_hand(rows: list[tuple[str, str, str | None]]) -> dict[str, float]:
    """Truth, best and lineage of each cell; None is no lineage."""
    inside = [(truth, best, lineage) for truth, best, lineage in rows if truth in DEPTH]
    n = len(inside)
    given_ones = [lineage for _, _, lineage in inside if lineage]
    below = sum(truth in ancestors(best) for truth, best, _ in inside)
    related = sum(truth in ancestors(best) or best in ancestors(truth) for truth, best, _ in inside)
    return {
        "n_cells": n,
        "n_outside": sum(bool(truth) and truth not in DEPTH for truth, _, _ in rows),
        "exact": sum(truth == best for truth, best, _ in inside) / n,
        "at_or_below": below / n,
        "related": related / n,
        "named": len(given_ones) / n,
        "lineage_right": sum(lineage in ancestors(truth) for truth, _, lineage in inside) / n,
        "lineage_depth": np.mean([DEPTH[name] for name in given_ones]) if given_ones else None,
        "truth_depth": np.mean([DEPTH[truth] for truth, _, _ in inside]),
    }


CELLS = st.lists(
    st.tuples(
        st.sampled_from([*DEPTH, "elsewhere", ""]), st.sampled_from(TYPES), st.sampled_from([None, *DEPTH])
    ),
    max_size=30,
)


@given(CELLS)
def test_figures_are_those_of_counting_cell_by_cell(rows: list[tuple[str, str, str | None]]) -> None:
    found = lineage_figures(HIERARCHY, *([row[i] for row in rows] for i in range(3))).to_dict()
    if any(truth in DEPTH for truth, _, _ in rows):
        assert found == pytest.approx(figures_by_hand(rows))
    else:
        assert found["n_cells"] == 0
        assert found["exact"] is None


def test_evaluation_tells_them_of_the_held_out_cells(atlas: Path) -> None:
    report = evaluate(atlas / "labels", atlas / "atlas.zarr", "truth")
    table = pd.read_parquet(atlas / "labels").merge(
        IslandStore.open(atlas / "atlas.zarr").obs(), on=["sample", "barcode"]
    )
    table = table[table["split"] == "test"]
    clean = (
        table[["truth", "best", "lineage"]]
        .astype(object)
        .where(table[["truth", "best", "lineage"]].notna(), None)
    )
    expected = figures_by_hand([(row.truth or "", row.best, row.lineage) for row in clean.itertuples()])
    assert report.lineage is not None
    assert report.lineage.to_dict() == pytest.approx(expected)
    assert 0 < expected["exact"] < expected["at_or_below"] <= 1
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["lineage"] == report.lineage.to_dict()
    assert f"in the hierarchy, of {expected['n_cells']} cells" in "\n".join(report.text())


def test_lineages_may_be_evaluated_themselves_and_cells_without_one_are_left_out_and_counted(
    atlas: Path,
) -> None:
    report = evaluate(atlas / "labels", atlas / "atlas.zarr", "truth", cells="all", labels_column="lineage")
    table = pd.read_parquet(atlas / "labels").merge(
        IslandStore.open(atlas / "atlas.zarr").obs(), on=["sample", "barcode"]
    )
    table = table[table["truth"].notna()]
    given = table["lineage"].notna()
    assert 0 < given.sum() < len(table)
    assert report.evaluation.n_cells == given.sum()
    assert report.left_out.n_without_label == len(table) - given.sum()
    right = (table["lineage"] == table["truth"])[given]
    assert report.evaluation.accuracy == pytest.approx(right.mean())


def test_cells_without_a_lineage_are_counted_among_the_held_out_ones_too_and_stay_in_what_predict_says(
    atlas: Path,
) -> None:
    report = evaluate(atlas / "labels", atlas / "atlas.zarr", "truth", labels_column="lineage")
    table = pd.read_parquet(atlas / "labels").merge(
        IslandStore.open(atlas / "atlas.zarr").obs(), on=["sample", "barcode"]
    )
    table = table[table["truth"].notna() & (table["split"] == "test")]
    given = table["lineage"].notna()
    assert 0 < given.sum() < len(table)
    assert report.evaluation.n_cells == given.sum()
    assert report.left_out == LeftOut(n_without_label=int((~given).sum()))
    assert any(
        note.startswith(f"{(~given).sum()} cells with a truth have no label in") for note in report.notes
    )
    assert report.lineage.named == pytest.approx(given[table["truth"].isin(DEPTH)].mean())
    assert report.best.accuracy == pytest.approx((table["best"] == table["truth"]).mean())
    known = table[table["truth"].isin(TYPES)]
    assert report.calibration.n_cells == len(known)
    assert report.novelty.n_known + report.novelty.n_novel == (table["truth"] != "glia").sum()


def test_true_types_above_those_of_the_model_are_neither_known_nor_novel(atlas: Path) -> None:
    report = evaluate(atlas / "labels", atlas / "atlas.zarr", "truth")
    table = pd.read_parquet(atlas / "labels").merge(
        IslandStore.open(atlas / "atlas.zarr").obs(), on=["sample", "barcode"]
    )
    cells = table[table["truth"].notna() & (table["split"] == "test")]
    n_of = cells["truth"].value_counts()
    assert report.types_above == {"glia": n_of["glia"]}
    assert report.unknown_types == {"elsewhere": n_of["elsewhere"]}
    told = cells[cells["truth"] != "glia"]
    novel = told["truth"] == "elsewhere"
    assert (report.novelty.n_novel, report.novelty.n_known) == (novel.sum(), (~novel).sum())
    assert report.novelty.auroc == pytest.approx(roc_auc_score(novel, told["novelty_score"]))
    assert report.to_dict()["types_above"] == report.types_above
    note = next(line for line in report.notes if line.startswith("types that lie above types of the model"))
    assert note.endswith(f": glia ({n_of['glia']} cells)")


def test_evaluation_takes_the_truth_through_a_label_map(atlas: Path, tmp_path: Path) -> None:
    mapping = tmp_path / "map.tsv"
    mapping.write_text("from\tto\nelsewhere\tneuron\nB cell\t\nnever\tastro\n")
    report = evaluate(atlas / "labels", atlas / "atlas.zarr", "truth", label_map=mapping)
    table = pd.read_parquet(atlas / "labels").merge(
        IslandStore.open(atlas / "atlas.zarr").obs(), on=["sample", "barcode"]
    )
    table = table[table["split"] == "test"]
    truth = table["truth"].replace({"elsewhere": "neuron", "B cell": None})
    known = truth.notna()
    assert report.evaluation.n_cells == int(known.sum())
    assert report.evaluation.n_without_truth == int((~known).sum())
    assert report.best.accuracy == pytest.approx((truth[known] == table["best"][known]).mean())
    assert report.unused_labels == ("never",)
    assert "labels of the label map that none of these cells has: never" in report.notes
    assert report.to_dict()["label_map"]["to"] == {"B cell": "", "elsewhere": "neuron", "never": "astro"}


def test_a_label_map_that_only_drops_labels_is_told_and_not_refused(atlas: Path, tmp_path: Path) -> None:
    """As in fine-tuning, whose split has no cell of a label that its map drops."""
    mapping = tmp_path / "map.csv"
    mapping.write_text("from,to\nelsewhere,\n")
    store = IslandStore.open(atlas / "atlas.zarr")
    truth = store.obs(["truth"])["truth"]
    rows = [
        ("a", f"c{i}", ["train", "test"][i % 2])
        for i in np.flatnonzero(truth.notna() & (truth != "elsewhere"))
    ]
    shutil.copytree(atlas / "run", tmp_path / "run")
    write_split(tmp_path / "run/split.parquet", rows, {n: s.x_sha256 for n, s in store.samples.items()})
    predict(store, tmp_path / "run/model", tmp_path / "labels")
    report = evaluate(tmp_path / "labels", store, "truth", label_map=mapping)
    assert report.evaluation.n_cells == sum(split == "test" for *_, split in rows)
    assert report.unused_labels == ("elsewhere",)
    everywhere = evaluate(tmp_path / "labels", store, "truth", label_map=mapping, cells="all")
    assert everywhere.evaluation.n_cells == len(rows)
    assert everywhere.unused_labels == ()


def test_a_label_map_that_is_of_other_labels_altogether_is_refused(atlas: Path, tmp_path: Path) -> None:
    (tmp_path / "map.tsv").write_text("Astro\tx\n")
    with pytest.raises(InputError, match=r"no cell has in truth: 'Astro' \(did you mean 'astro'\?\)"):
        evaluate(atlas / "labels", atlas / "atlas.zarr", "truth", label_map=tmp_path / "map.tsv")
