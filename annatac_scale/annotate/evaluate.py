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

_READ = ("sample", "barcode", "best", "confidence", "split", "set", "novelty_score")


@dataclass(frozen=True, eq=False)
class _Labels:
    """Labels to evaluate, some or all of their cells.

    cells: with their labels; n_by_split: all cells of the source by split
    manifest, rows: of what ``predict`` wrote; rows as they are in its tables, one a cell
    """

    cells: CellLabels
    n_by_split: dict[str, int]
    manifest: Manifest | None = None
    rows: pd.DataFrame | None = None

    def take(self, rows: Ints | NDArray[np.bool_]) -> "_Labels":
        own = None if self.rows is None else self.rows.iloc[np.arange(len(self.rows))[rows]]
        return replace(self, cells=self.cells.take(rows), rows=own)


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
        evaluated cell has are told, and refused where it names no label of these cells

    Cells are joined by sample and barcode, or by barcode alone where one side names no samples. Those that one side
    does not have, or has no label of, are left out and counted.

    Raises InputError where labels of predict are a URL or not complete, no cell was held out, a cell of predict's is
    not in the store, it is not clear which cell is which, no cell is in both, or none has a truth.
    """
    if cells not in (None, *CELLS):
        raise InputError(f"--cells: found {cells!r}, expected {' or '.join(CELLS)}")
    mapping = None if label_map is None else LabelMap.read(label_map)
    true = _truth(store, truth, truth_file)
    first = _opened(labels, labels_column, "--labels-column")
    second = None if against is None else _opened(against, against_column, "--against-column")
    cells = _which(cells, first, second)
    if cells == "test":
        first, second = _held_out(first), None if second is None else _held_out(second)
    left_out, other = LeftOut(), None
    if second is not None:
        place = rows_in(first.cells, second.cells)
        left_out = _left_out_of_both(place, first, second)
        first, other = first.take(place >= 0), second.cells.label[place[place >= 0]]
    place = rows_in(first.cells, true)
    _check_found(place, first, true, is_store=truth_file is None)
    first, other = first.take(place >= 0), None if other is None else other[place >= 0]
    place, n_absent = place[place >= 0], int((place < 0).sum())
    unused: tuple[str, ...] = ()
    if mapping is not None:
        true, unused = _mapped(true, mapping, truth, place)
    true_types = true.label[place]
    left_out = replace(left_out, n_not_in_truth=n_absent)
    if cells == "all" and second is None:
        unlabelled = true.label != ""
        unlabelled[place] = False
        left_out = replace(left_out, n_without_label=int(unlabelled.sum()))
    report = _report(first, true_types, second, other)
    return EvaluationReport(
        labels=Path(first.cells.place) if first.manifest else first.cells.place,
        truth=truth,
        truth_file=None if truth_file is None else str(truth_file),
        cells=cells,
        left_out=left_out,
        label_map=mapping,
        unused_labels=unused,
        **report,
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


def _mapped(
    true: CellLabels, mapping: LabelMap, column: str, rows: Ints
) -> tuple[CellLabels, tuple[str, ...]]:
    """The truth after a label map, and the labels that the map names and none of its ``rows``, those to evaluate, has.

    column: of the truth, for the message. Raises InputError where that is all labels that the map names.
    """
    given = true.label[rows]
    if not set(mapping.to).intersection(given):
        mapping.check(column, given)
    return replace(true, label=mapping.applied(true.label)), tuple(mapping.unknown(given))


def _opened(location: Location, column: str | None, option: str) -> _Labels:
    """All labels at a location that are not missing."""
    given = given_labels(location, column, option)
    if given is not None:
        given = given.take(given.label != "")
        return _Labels(given, {NO_SPLIT: len(given)})
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
    n_of = Counter(rows["split"])
    n_by_split = {name: n_of[name] for name in (*SPLITS, NO_SPLIT) if n_of[name]}
    # A cell may have no lineage.
    return _Labels(cells, n_by_split, folder.manifest, rows).take(cells.label != "")


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


def _held_out(labels: _Labels) -> _Labels:
    """The cells that fine-tuning held out; all of what predict did not write."""
    if labels.rows is None:
        return labels
    if not labels.n_by_split.get("test"):
        raise InputError(
            f"{labels.cells.place}: found no held-out cell among {len(labels.cells):,}, expected some with split test; "
            "use --cells all, or predict the store that the model was fine-tuned on"
        )
    return labels.take((labels.rows["split"] == "test").to_numpy())


def _left_out_of_both(place: Ints, first: _Labels, second: _Labels) -> LeftOut:
    if not (place >= 0).any():
        raise _nothing_in_common(first.cells, second.cells)
    n_common = len(np.unique(place[place >= 0]))
    # What is not predict's holds cells that were not held out as well: that these are missing says nothing.
    whole = [first.manifest is None, second.manifest is None]
    compare = whole[0] == whole[1]
    return LeftOut(
        n_not_in_other=int((place < 0).sum()) if compare or not whole[0] else 0,
        n_only_in_other=len(second.cells) - n_common if compare or not whole[1] else 0,
    )


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


def _report(first: _Labels, true_types: Texts, second: _Labels | None, other: Texts | None) -> dict[str, Any]:
    """The fields of a report that are figures."""
    label = first.cells.label
    known = true_types != ""
    assigned = label != LOW_DEPTH
    n_low_depth = int((known & ~assigned).sum())
    is_some = n_low_depth and (known & assigned).any()
    fields: dict[str, Any] = {
        "evaluation": evaluate_labels(true_types, label),
        "n_by_split": _n_by_split(first, second),
        "n_novel": int((label[known] == NOVEL).sum()),
        "n_low_depth": n_low_depth,
        "assigned": evaluate_labels(true_types[assigned], label[assigned]) if is_some else None,
    }
    if second is not None and other is not None:
        found = evaluate_labels(true_types, other)
        test = compare_labels(true_types, label, other)
        fields["against"] = Against(second.cells.place, found, bootstrap_intervals(found), test)
    return fields | _predicted(first, true_types)


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


def _novelty(rows: pd.DataFrame, codes: Ints, has_truth: NDArray[np.bool_]) -> NoveltyFigures | None:
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
