"""How good labels are: joined to the true types, on the cells that fine-tuning held out where that is known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.annotate.bootstrap import bootstrap_intervals, compare_labels
from annatac_scale.annotate.by_group import ByGroup
from annatac_scale.annotate.evaluation_report import Against, EvaluationReport
from annatac_scale.annotate.given_labels import (
    CellLabels,
    Ints,
    Texts,
    file_labels,
    store_labels,
)
from annatac_scale.annotate.hierarchy_metrics import LineageFigures, lineage_figures
from annatac_scale.annotate.joined_labels import Joined, Labels, joined_labels, opened_labels
from annatac_scale.annotate.metrics import evaluate_labels
from annatac_scale.annotate.reliability import (
    Calibration,
    Coverage,
    NoveltyFigures,
    calibration,
    novelty_figures,
    set_coverage,
)
from annatac_scale.errors import InputError
from annatac_scale.model.hierarchy import Hierarchy
from annatac_scale.model.labels import LOW_DEPTH, NOVEL
from annatac_scale.store.place import Location, location_of
from annatac_scale.store.store import IslandStore
from annatac_scale.train.label_map import LabelMap

CELLS = ("test", "all")


def evaluate(
    labels: Location,
    store: IslandStore | Location | None,
    truth: str,
    *,
    cells: str | None = None,
    labels_column: str | None = None,
    truth_file: Location | None = None,
    against: Location | None = None,
    against_column: str | None = None,
    label_map: Location | None = None,
    group: str | None = None,
) -> EvaluationReport:
    """Compare labels with the true types of their cells, and, if asked to, with other labels of the same cells.

    labels, against: a folder on a disk that ``predict`` wrote, complete; a CSV, TSV, Parquet or h5ad file of any tool;
        or a store
    labels_column, against_column: the column with the labels, of obs in an h5ad file or a store; None for ``label`` of
        what ``predict`` wrote
    truth: obs column of the store, or a column of ``truth_file`` in its place
    cells: "test", those that fine-tuning held out, or "all"; None for "test" where ``predict`` wrote any of the
        labels. Other labels beside them are then evaluated on the same cells.
    label_map: a table on a disk that the truth goes through first, as in fine-tuning; labels that it names and no
        evaluated cell has are told, and refused where it names no label of any cell of the truth
    group: a column beside ``truth``, as of the donor: figures of each group, and intervals over groups

    Cells are joined by sample and barcode, or by barcode alone where one side names no samples. Those that one side
    does not have, or has no label of, are left out and counted.

    Raises InputError where labels of predict are a URL or not complete, no cell was held out, a cell of predict's is
    not in the store, it is not clear which cell is which, no cell is in both, or none has a truth.
    """
    if cells not in (None, *CELLS):
        raise InputError(f"--cells: found {cells!r}, expected {' or '.join(CELLS)}")
    mapping = None if label_map is None else LabelMap.read(label_map)
    given = true = _truth(store, truth, truth_file)
    if mapping is not None:
        true = _mapped(given, mapping, truth)
    first = opened_labels(labels, labels_column, "--labels-column")
    second = None if against is None else opened_labels(against, against_column, "--against-column")
    cells = _which(cells, first, second)
    joined = joined_labels(first, second, true, cells, is_store=truth_file is None)
    chosen, true_types = first.take(joined.rows), true.label[joined.true]
    labelled = chosen.cells.label != ""
    other = None if second is None else second.take(joined.other[labelled])
    groups = None if group is None else _truth(store, group, truth_file).label[joined.true[labelled]]
    return EvaluationReport(
        labels=location_of(first.cells.place) if first.manifest else first.cells.place,
        truth=truth,
        truth_file=None if truth_file is None else str(truth_file),
        cells=cells,
        left_out=joined.left_out,
        label_map=mapping,
        unused_labels=() if mapping is None else tuple(mapping.unknown(given.label[joined.true][labelled])),
        n_by_split=_n_by_split(first, second),
        n_trained_on=_n_trained_on(first, second, joined, labelled & (true_types != "")),
        **_figures(true_types[labelled], chosen.cells.label[labelled]),
        **_predicted(chosen, true_types),
        against=None if other is None else _against(chosen.take(labelled), other, true_types[labelled]),
        by_group=None
        if group is None or groups is None
        else _by_group(group, groups, chosen.take(labelled), other, true_types[labelled]),
    )


def _truth(store: IslandStore | Location | None, truth: str, file: Location | None) -> CellLabels:
    if (store is None) == (file is None):
        found = "neither a store nor a file" if store is None else f"both a store and {file}"
        raise InputError(
            f"--truth {truth}: found {found} to read it from; expected one; give --store or --truth-file"
        )
    if file is not None:
        return file_labels(file, truth)
    assert store is not None
    return store_labels(store if isinstance(store, IslandStore) else IslandStore.open(store), truth)


def _mapped(true: CellLabels, mapping: LabelMap, column: str) -> CellLabels:
    """The truth after a label map; column: of the truth, for the message.

    Raises InputError where no cell has a label that the map names. Those to evaluate may have none all the same:
    fine-tuning holds out no cell whose label the map drops.
    """
    if not set(mapping.to).intersection(true.label):
        mapping.check(column, true.label)
    return replace(true, label=mapping.applied(true.label))


def _which(cells: str | None, first: Labels, second: Labels | None) -> str:
    """Which cells to evaluate. Raises InputError where it cannot be known which were held out."""
    predicted = [one for one in (first, second) if one is not None and one.manifest is not None]
    if cells == "test" and not predicted:
        raise InputError(
            f"--cells test: found labels of {first.cells.place}, which does not say which cells were held out; "
            "expected labels of `annatac predict`, here or as --against; leave --cells out, or give a file of held-out "
            "cells alone"
        )
    return cells or ("test" if predicted else "all")


def _figures(true_types: Texts, label: Texts) -> dict[str, Any]:
    """The fields of a report that are figures of the first labels."""
    known = true_types != ""
    assigned = label != LOW_DEPTH
    n_low_depth = int((known & ~assigned).sum())
    is_some = n_low_depth and (known & assigned).any()
    return {
        "evaluation": evaluate_labels(true_types, label),
        "n_novel": int((label[known] == NOVEL).sum()),
        "n_low_depth": n_low_depth,
        "assigned": evaluate_labels(true_types[assigned], label[assigned]) if is_some else None,
    }


def _against(first: Labels, second: Labels, true_types: Texts) -> Against:
    """Figures of the other labels of the same cells, and the paired test."""
    found = evaluate_labels(true_types, second.cells.label)
    test = compare_labels(true_types, first.cells.label, second.cells.label)
    return Against(second.cells.place, found, bootstrap_intervals(found), test)


def _by_group(column: str, groups: Texts, first: Labels, other: Labels | None, true_types: Texts) -> ByGroup:
    """Figures of each group, of the cells with a truth."""
    known = true_types != ""
    second = None if other is None else other.cells.label[known]
    return ByGroup.of(column, groups[known], true_types[known], first.cells.label[known], second)


def _n_by_split(first: Labels, second: Labels | None) -> dict[str, int]:
    """Of the labels that say which cells were held out."""
    told = [one for one in (first, second) if one is not None and one.manifest is not None]
    return (told or [first])[0].n_by_split


def _n_trained_on(first: Labels, second: Labels | None, joined: Joined, counted: NDArray[np.bool_]) -> int:
    """Cells that either model was fine-tuned with; counted: which of the joined cells figures are of, bool [n]."""
    trained = first.trained[joined.rows]
    if second is not None:
        trained = trained | second.trained[joined.other]
    return int((trained & counted).sum())


def _predicted(labels: Labels, true_types: Texts) -> dict[str, Any]:
    """The fields that are of what predict wrote, of cells with and without a label in the column that is evaluated."""
    if labels.manifest is None or labels.rows is None:
        return {}
    classes, rows, hierarchy = labels.manifest.classes, labels.rows, labels.manifest.hierarchy
    best = evaluate_labels(true_types, rows["best"])
    truth = pd.Index(true_types, dtype=object)
    codes = pd.Index(classes).get_indexer(truth)
    # Of a cell whose true type lies above types of the model nobody can say whether its own is one of them.
    above = set() if hierarchy is None else {*hierarchy.nodes} - {*classes}
    is_told = (true_types != "") & ~truth.isin(above)
    beyond = {
        str(row.cell_type): int(row.n) for row in best.per_type.itertuples() if row.cell_type not in classes
    }
    return {
        "model": labels.manifest.model,
        "rule": labels.manifest.rule,
        "best": best,
        "calibration": _calibration(rows, true_types, codes),
        "unknown_types": {name: n for name, n in beyond.items() if name not in above},
        "types_above": {name: n for name, n in beyond.items() if name in above},
        "novelty": _novelty(rows, codes, is_told),
        "coverage": _coverage(rows, codes, classes),
        "lineage": None if hierarchy is None else _lineage(hierarchy, true_types, rows),
    }


def _calibration(rows: pd.DataFrame, true_types: Texts, codes: Ints) -> Calibration | None:
    """Of the cells whose type the model knows; None without any."""
    known = codes >= 0
    right = rows["best"].to_numpy(object) == true_types
    return calibration(rows["confidence"].to_numpy()[known], right[known]) if known.any() else None


def _novelty(rows: pd.DataFrame, codes: Ints, is_told: NDArray[np.bool_]) -> NoveltyFigures | None:
    """How well the novelty score tells the cells of unknown types; None where all or none are.

    is_told: cells whose truth says whether their type is one of the model's
    """
    novel = codes[is_told] < 0
    if not novel.any() or novel.all():
        return None
    return novelty_figures(rows["novelty_score"].to_numpy(np.float64)[is_told], novel)


def _coverage(rows: pd.DataFrame, codes: Ints, classes: tuple[str, ...]) -> Coverage | None:
    """Of the prediction sets of cells whose type the model knows; None where there are none."""
    sets = rows["set"][codes >= 0].to_numpy(object)
    if any(one is None for one in sets) or not len(sets):  # all or none, as the model has calib cells or not
        return None
    sizes = np.array([len(one) for one in sets])
    members = np.zeros((len(sets), len(classes)), np.bool_)
    names = [name for one in sets for name in one]
    members[np.repeat(np.arange(len(sets)), sizes), pd.Index(classes).get_indexer(pd.Index(names))] = True
    return set_coverage(members, codes[codes >= 0])


def _lineage(hierarchy: Hierarchy, true_types: Texts, rows: pd.DataFrame) -> LineageFigures:
    """How far lineages are right."""
    return lineage_figures(hierarchy, true_types, rows["best"], rows["lineage"])
