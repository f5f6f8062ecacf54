"""How good labels are: joined to the true types, on the cells that fine-tuning held out where that is known."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from annatac_scale.annotate.bootstrap import bootstrap_intervals, compare_labels
from annatac_scale.annotate.evaluation_report import Against, EvaluationReport, LeftOut
from annatac_scale.annotate.given_labels import (
    CellLabels,
    Ints,
    Texts,
    file_labels,
    given_labels,
    rows_in,
    store_labels,
)
from annatac_scale.annotate.hierarchy_metrics import LineageFigures, lineage_figures
from annatac_scale.annotate.labels import LabelsFolder, Manifest
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
from annatac_scale.model.labels import LOW_DEPTH, NOVEL, label_texts
from annatac_scale.store.place import Location, on_disk
from annatac_scale.store.store import IslandStore
from annatac_scale.train.label_map import LabelMap
from annatac_scale.train.splits import SPLITS

CELLS = ("test", "all")
NO_SPLIT = "none"
"""Stands for the split of a cell that was not in the fine-tuning."""

Bools = NDArray[np.bool_]

_READ = ("sample", "barcode", "best", "confidence", "split", "set", "novelty_score")


@dataclass(frozen=True, eq=False)
class _Labels:
    """Labels of a place.

    cells: with their labels
    manifest, rows: of what ``predict`` wrote; rows as they are in its tables, one a cell
    """

    cells: CellLabels
    manifest: Manifest | None = None
    rows: pd.DataFrame | None = None

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def n_by_split(self) -> dict[str, int]:
        """The cells by split."""
        if self.rows is None:
            return {NO_SPLIT: len(self)}
        n_of = Counter(self.rows["split"])
        return {name: n_of[name] for name in (*SPLITS, NO_SPLIT) if n_of[name]}

    def take(self, rows: Ints | Bools) -> "_Labels":
        """Some of the cells."""
        own = None if self.rows is None else self.rows.iloc[np.arange(len(self))[rows]]
        return replace(self, cells=self.cells.take(rows), rows=own)


@dataclass(frozen=True, eq=False)
class _Joined:
    """The cells to evaluate.

    rows: of each among the first labels, int64 [n]; true, other: among the true and the other labels
    left_out: all cells that are not
    """

    rows: Ints
    true: Ints
    other: Ints
    left_out: LeftOut


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
    first = _opened(labels, labels_column, "--labels-column")
    second = None if against is None else _opened(against, against_column, "--against-column")
    cells = _which(cells, first, second)
    joined = _joined(first, second, true, cells, is_store=truth_file is None)
    left_out = joined.left_out
    if cells == "all" and second is None:
        unlabelled = true.label != ""
        unlabelled[joined.true] = False
        left_out = replace(left_out, n_without_label=int(unlabelled.sum()))
    return EvaluationReport(
        labels=Path(first.cells.place) if first.manifest else first.cells.place,
        truth=truth,
        truth_file=None if truth_file is None else str(truth_file),
        cells=cells,
        left_out=left_out,
        label_map=mapping,
        unused_labels=() if mapping is None else tuple(mapping.unknown(given.label[joined.true])),
        n_by_split=_n_by_split(first, second),
        **_figures(first.take(joined.rows), true.label[joined.true]),
        against=None if second is None else _against(first, second, true, joined),
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


def _opened(location: Location, column: str | None, option: str) -> _Labels:
    """All labels at a location that are not missing."""
    given = given_labels(location, column, option)
    if given is not None:
        return _Labels(given.take(given.label != ""))
    folder = LabelsFolder.open_complete(on_disk(location, "labels"))
    column = column or "label"
    if column not in folder.manifest.columns:
        raise InputError(
            f"{folder.path}: found no column {column!r}; expected {option} to be one of "
            f"{', '.join(folder.manifest.columns)}"
        )
    rows = _rows(folder, column)
    cells = CellLabels(
        str(folder.path),
        rows["barcode"].to_numpy(object),
        label_texts(rows[column]),
        rows["sample"].to_numpy(object),
    )
    # A cell may have no lineage.
    return _Labels(cells, folder.manifest, rows).take(cells.label != "")


def _rows(folder: LabelsFolder, column: str) -> pd.DataFrame:
    """The rows of a data set, of the columns that figures are made of; split is NO_SPLIT where there is none."""
    lineage = [] if folder.manifest.parents is None else ["lineage"]
    columns = list(dict.fromkeys([*_READ, column, *lineage]))
    table = pa.concat_tables([folder.read(part, columns) for part in folder.manifest.parts])
    rows: pd.DataFrame = table.to_pandas()
    return rows.assign(split=rows["split"].fillna(NO_SPLIT))


def _which(cells: str | None, first: _Labels, second: _Labels | None) -> str:
    """Which cells to evaluate. Raises InputError where it cannot be known which were held out."""
    predicted = [one for one in (first, second) if one is not None and one.manifest is not None]
    if cells == "test" and not predicted:
        raise InputError(
            f"--cells test: found labels of {first.cells.place}, which does not say which cells were held out; "
            "expected labels of `annatac predict`, here or as --against; leave --cells out, or give a file of held-out "
            "cells alone"
        )
    return cells or ("test" if predicted else "all")


def _joined(first: _Labels, second: _Labels | None, true: CellLabels, cells: str, is_store: bool) -> _Joined:
    """Find the cells to evaluate in all tables.

    All cells are joined before any is left out: a barcode that is two cells is two also where one of them is not
    evaluated. Raises InputError where it is not clear which cell is which, or no cell is left.
    """
    other = first if second is None else second
    in_other = np.arange(len(first)) if second is None else rows_in(first.cells, second.cells)
    in_truth = rows_in(first.cells, true)
    other_in_truth = in_truth if second is None else rows_in(second.cells, true)
    # First labels without samples may be of one cell in the other labels, and of another in the truth.
    in_truth[in_truth != np.append(other_in_truth, -1)[in_other]] = -1
    asked, other_asked = _asked(first, other, in_other, cells)
    common = asked & np.append(other_asked, False)[in_other]
    if second is not None and not common.any():
        raise _nothing_in_common(first.cells, second.cells)
    _check_found(in_truth[common], first.take(common), true, is_store)
    rows, n_common = np.flatnonzero(common & (in_truth >= 0)), int(common.sum())
    left_out = LeftOut(
        n_not_in_truth=n_common - len(rows),
        n_not_in_other=int(asked.sum()) - n_common,
        n_only_in_other=int(other_asked.sum()) - n_common,
    )
    return _Joined(rows, in_truth[rows], in_other[rows], left_out)


def _asked(first: _Labels, other: _Labels, in_other: Ints, cells: str) -> tuple[Bools, Bools]:
    """Which cells of both are asked for, all or those held out; in_other: rows of the first among the other ones.

    Of what predict did not write, those that the others hold out.
    """
    if cells == "all":
        return np.ones(len(first), np.bool_), np.ones(len(other), np.bool_)
    asked, other_asked = _held_out(first), _held_out(other)
    if other_asked is None:
        other_asked = np.isin(np.arange(len(other)), in_other[asked])
    if asked is None:
        asked = np.append(other_asked, False)[in_other]
    return asked, other_asked


def _held_out(labels: _Labels) -> Bools | None:
    """Which cells fine-tuning held out; None for what predict did not write."""
    if labels.rows is None:
        return None
    held_out: Bools = (labels.rows["split"] == "test").to_numpy(np.bool_)
    if not held_out.any():
        raise InputError(
            f"{labels.cells.place}: found no held-out cell among {len(labels):,}, expected some with split test; "
            "use --cells all, or predict the store that the model was fine-tuned on"
        )
    return held_out


def _check_found(place: Ints, labels: _Labels, true: CellLabels, is_store: bool) -> None:
    """Raise InputError where no cell has a truth, or one that predict labelled is not in the store."""
    absent = np.flatnonzero(place < 0)
    if labels.manifest is not None and is_store and len(absent):
        row = absent[0]
        assert labels.cells.sample is not None
        raise InputError(
            f"{labels.cells.place}: found {len(absent):,} of {len(place):,} cells that {true.place} does not have, the "
            f"first {labels.cells.barcode[row]!r} of sample {labels.cells.sample[row]!r}; give the store that was "
            "predicted"
        )
    if len(absent) == len(place):
        raise _nothing_in_common(labels.cells, true)


def _nothing_in_common(cells: CellLabels, others: CellLabels) -> InputError:
    return InputError(
        f"{cells.place}: found no labelled cell that {others.place} has: {cells.some()} here, {others.some()} there; "
        "expected barcodes, and samples if both name them, that are written alike; change one of the two"
    )


def _figures(labels: _Labels, true_types: Texts) -> dict[str, Any]:
    """The fields of a report that are figures of the first labels."""
    label = labels.cells.label
    known = true_types != ""
    assigned = label != LOW_DEPTH
    n_low_depth = int((known & ~assigned).sum())
    is_some = n_low_depth and (known & assigned).any()
    fields = {
        "evaluation": evaluate_labels(true_types, label),
        "n_novel": int((label[known] == NOVEL).sum()),
        "n_low_depth": n_low_depth,
        "assigned": evaluate_labels(true_types[assigned], label[assigned]) if is_some else None,
    }
    return fields | _predicted(labels, true_types)


def _against(first: _Labels, second: _Labels, true: CellLabels, joined: _Joined) -> Against:
    """Figures of the other labels, and the paired test."""
    true_types, other = true.label[joined.true], second.cells.label[joined.other]
    found = evaluate_labels(true_types, other)
    test = compare_labels(true_types, first.cells.label[joined.rows], other)
    return Against(second.cells.place, found, bootstrap_intervals(found), test)


def _n_by_split(first: _Labels, second: _Labels | None) -> dict[str, int]:
    """Of the labels that say which cells were held out."""
    told = [one for one in (first, second) if one is not None and one.manifest is not None]
    return (told or [first])[0].n_by_split


def _predicted(labels: _Labels, true_types: Texts) -> dict[str, Any]:
    """The fields that are of what predict wrote."""
    if labels.manifest is None or labels.rows is None:
        return {}
    classes, rows = labels.manifest.classes, labels.rows
    best = evaluate_labels(true_types, rows["best"])
    codes = pd.Index(classes).get_indexer(pd.Index(true_types, dtype=object))
    n_true = best.per_type.set_index("cell_type")["n"]
    return {
        "model": labels.manifest.model,
        "rule": labels.manifest.rule,
        "best": best,
        "calibration": _calibration(rows, true_types, codes),
        "unknown_types": {str(name): int(n) for name, n in n_true.items() if name not in classes},
        "novelty": _novelty(rows, codes, true_types != ""),
        "coverage": _coverage(rows, codes, classes),
        "lineage": _lineage(labels.manifest, true_types, rows),
    }


def _calibration(rows: pd.DataFrame, true_types: Texts, codes: Ints) -> Calibration | None:
    """Of the cells whose type the model knows; None without any."""
    known = codes >= 0
    right = rows["best"].to_numpy(object) == true_types
    return calibration(rows["confidence"].to_numpy()[known], right[known]) if known.any() else None


def _novelty(rows: pd.DataFrame, codes: Ints, has_truth: Bools) -> NoveltyFigures | None:
    """How well the novelty score tells the cells of unknown types; None where all or none are."""
    novel = codes[has_truth] < 0
    if not novel.any() or novel.all():
        return None
    return novelty_figures(rows["novelty_score"].to_numpy(np.float64)[has_truth], novel)


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


def _lineage(manifest: Manifest, true_types: Texts, rows: pd.DataFrame) -> LineageFigures | None:
    """How far lineages are right; None where the model has no hierarchy."""
    hierarchy = manifest.hierarchy
    if hierarchy is None:
        return None
    return lineage_figures(hierarchy, true_types, rows["best"], rows["lineage"])
