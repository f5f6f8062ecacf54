"""Labels to evaluate: opened wherever they lie, and joined by cell with the truth and with other labels."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from annatac_scale.annotate.evaluation_report import LeftOut
from annatac_scale.annotate.given_labels import CellLabels, Ints, given_labels, rows_in
from annatac_scale.annotate.labels import LabelsFolder, Manifest
from annatac_scale.errors import InputError
from annatac_scale.model.labels import label_texts
from annatac_scale.store.place import Location
from annatac_scale.train.splits import SPLITS

Bools = NDArray[np.bool_]

NO_SPLIT = "none"
"""Stands for the split of a cell that was not in the fine-tuning."""

_READ = ("sample", "barcode", "best", "confidence", "split", "set", "novelty_score")


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of a place.

    cells: with their labels, "" where one is missing
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

    @property
    def trained(self) -> Bools:
        """Which cells fine-tuning used; none of what predict did not write."""
        if self.rows is None:
            return np.zeros(len(self), np.bool_)
        return self.rows["split"].isin(SPLITS[:-1]).to_numpy(np.bool_)

    def take(self, rows: Ints | Bools) -> "Labels":
        """Some of the cells."""
        own = None if self.rows is None else self.rows.iloc[np.arange(len(self))[rows]]
        return replace(self, cells=self.cells.take(rows), rows=own)


@dataclass(frozen=True, eq=False)
class Joined:
    """The cells to evaluate, and those that have no first label besides: of these ``predict`` wrote all else.

    rows: of each among the first labels, int64 [n]; true, other: among the true and the other labels
    left_out: cells that are not evaluated
    """

    rows: Ints
    true: Ints
    other: Ints
    left_out: LeftOut


def opened_labels(location: Location, column: str | None, option: str) -> Labels:
    """All labels at a location."""
    given = given_labels(location, column, option)
    if given is not None:
        return Labels(given)
    folder = LabelsFolder.open_complete(location)
    column = column or "label"
    if column not in folder.manifest.columns:
        raise InputError(
            f"{folder.location}: found no column {column!r}; expected {option} to be one of "
            f"{', '.join(folder.manifest.columns)}"
        )
    rows = _rows(folder, column)
    cells = CellLabels(
        str(folder.location),
        rows["barcode"].to_numpy(object),
        label_texts(rows[column]),
        rows["sample"].to_numpy(object),
    )
    return Labels(cells, folder.manifest, rows)


def _rows(folder: LabelsFolder, column: str) -> pd.DataFrame:
    """The rows of a data set, of the columns that figures are made of; split is NO_SPLIT where there is none."""
    lineage = [] if folder.manifest.parents is None else ["lineage"]
    columns = list(dict.fromkeys([*_READ, column, *lineage]))
    table = pa.concat_tables([folder.read(part, columns) for part in folder.manifest.parts])
    rows: pd.DataFrame = table.to_pandas()
    return rows.assign(split=rows["split"].fillna(NO_SPLIT))


def joined_labels(
    first: Labels, second: Labels | None, true: CellLabels, cells: str, is_store: bool
) -> Joined:
    """Find the cells to evaluate in all tables.

    All cells are joined before any is left out: a barcode that is two cells is two also where one of them is not
    evaluated. Raises InputError where it is not clear which cell is which, or no cell is left.
    """
    other = first if second is None else second
    in_other = np.arange(len(first)) if second is None else rows_in(first.cells, second.cells)
    in_truth = rows_in(first.cells, true)
    other_in_truth = in_truth if second is None else rows_in(second.cells, true)
    # First labels without samples may be of one cell in the other labels, and of another in the truth.
    in_truth[(in_other >= 0) & (in_truth != np.append(other_in_truth, -1)[in_other])] = -1
    asked, other_asked = _asked(first, other, in_other, cells)
    labelled, other_labelled = asked & (first.cells.label != ""), other_asked & (other.cells.label != "")
    common = labelled & np.append(other_labelled, False)[in_other]
    if second is not None and not common.any():
        raise _nothing_in_common(first.cells.take(labelled), second.cells.take(other_labelled))
    _check_found(in_truth[common], first.take(common), true, is_store)
    to_label = np.full(len(true), cells == "all") | _hit(
        len(true), in_truth[asked], other_in_truth[other_asked]
    )
    is_labelled = _hit(len(true), in_truth[labelled], other_in_truth[other_labelled])
    left_out = LeftOut(
        n_not_in_truth=int((in_truth[common] < 0).sum()),
        n_without_label=int(((true.label != "") & to_label & ~is_labelled).sum()),
        n_not_in_other=int(labelled.sum() - common.sum()),
        n_only_in_other=int(other_labelled.sum() - common.sum()),
    )
    chosen = asked if second is None else asked & np.append(other_labelled, False)[in_other]
    rows = np.flatnonzero(chosen & (in_truth >= 0))
    return Joined(rows, in_truth[rows], in_other[rows], left_out)


def _hit(n: int, *rows: Ints) -> Bools:
    """Which of ``n`` rows some of ``rows`` are; those below 0 are none."""
    return np.isin(np.arange(n), np.concatenate(rows))


def _asked(first: Labels, other: Labels, in_other: Ints, cells: str) -> tuple[Bools, Bools]:
    """Which cells of both are asked for, all or those held out; in_other: rows of the first among the other ones.

    Of what predict did not write, those that the others hold out.
    """
    if cells == "all":
        return np.ones(len(first), np.bool_), np.ones(len(other), np.bool_)
    asked, other_asked = _held_out(first), _held_out(other)
    if other_asked is None:
        other_asked = _hit(len(other), in_other[asked])
    if asked is None:
        asked = np.append(other_asked, False)[in_other]
    return asked, other_asked


def _held_out(labels: Labels) -> Bools | None:
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


def _check_found(place: Ints, labels: Labels, true: CellLabels, is_store: bool) -> None:
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
