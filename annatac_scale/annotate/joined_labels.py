"""Which cells of two tables are the same, and which of them are evaluated: labels joined with the truth."""

from dataclasses import asdict, dataclass, field

import numpy as np

from annatac_scale.annotate.evaluation_report import LeftOut
from annatac_scale.annotate.given_labels import CellLabels, Ints, rows_in
from annatac_scale.annotate.label_sources import Bools, Labels, LabelSource
from annatac_scale.errors import InputError

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Joined:
    """The cells to evaluate, and those that have no first label besides: of these ``predict`` wrote all else.

    rows: of each among the first labels, int64 [n]; true, other: among the true and the other labels
    labelled, other_labelled: cells with a first and with another label that are asked for, bool [first], [other]
    common: those that have both; in_truth: the row of each first label among the true ones, int64 [first], -1 for none
    left_out: cells that are not evaluated
    """

    rows: Ints
    true: Ints
    other: Ints
    labelled: Bools
    other_labelled: Bools
    common: Bools
    in_truth: Ints
    left_out: LeftOut


def joined_labels(first: Labels, second: Labels | None, true: CellLabels, cells: str) -> Joined:
    """Find the cells to evaluate in all tables, which are of all samples or of one.

    All cells are joined before any is left out: a barcode that is two cells is two also where one of them is not
    evaluated. Raises InputError where it is not clear which cell is which.
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
    return Joined(rows, in_truth[rows], in_other[rows], labelled, other_labelled, common, in_truth, left_out)


def _hit(n: int, *rows: Ints) -> Bools:
    """Which of ``n`` rows some of ``rows`` are; those below 0 are none."""
    hit = np.zeros(n + 1, np.bool_)
    for some in rows:
        hit[some] = True  # -1 is the last one, which is none of them
    return hit[:n]


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
    held_out: Bools = np.asarray(labels.rows.split == "test", np.bool_)
    return held_out


@dataclass
class _Some:
    """Cells of which messages name the first."""

    n: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, cells: CellLabels, which: Bools) -> None:
        self.n += int(which.sum())
        if len(self.names) < _SHOWN:
            rows = np.flatnonzero(which)[: _SHOWN - len(self.names)]
            self.names += [cells.name_of(row) for row in rows.tolist()]

    def __str__(self) -> str:
        return ", ".join(self.names) or "none"


class Meeting:
    """What the joins of all samples come to: the cells that are left out, and whether anything is to be evaluated."""

    def __init__(self, first: LabelSource, second: LabelSource | None, true: str) -> None:
        """true: the place of the true labels, for messages."""
        self._first, self._second, self._true = first, second, true
        self._labelled, self._other_labelled, self._common = _Some(), _Some(), _Some()
        self._absent, self._true_cells = _Some(), _Some()
        self._counts = dict.fromkeys(asdict(LeftOut()), 0)

    @property
    def left_out(self) -> LeftOut:
        """Cells of all samples that are not evaluated."""
        return LeftOut(**self._counts)

    def add(self, first: Labels, second: Labels | None, true: CellLabels, joined: Joined) -> None:
        """Add the cells of a sample."""
        for name, n in asdict(joined.left_out).items():
            self._counts[name] += n
        self._labelled.add(first.cells, joined.labelled)
        self._common.add(first.cells, joined.common)
        self._absent.add(first.cells, joined.common & (joined.in_truth < 0))
        self._true_cells.add(true, np.ones(len(true), np.bool_))
        if second is not None:
            self._other_labelled.add(second.cells, joined.other_labelled)

    def check(self, cells: str, n_test: list[int], is_store: bool) -> None:
        """Raise InputError where no cell is left, or one that predict labelled is not in the store.

        n_test: held-out cells of the first and of the other labels
        """
        for source, n in zip((self._first, self._second), n_test, strict=False):
            if cells == "test" and source is not None and source.manifest is not None and not n:
                raise _none_held_out(source)
        if self._second is not None and not self._common.n:
            raise _nothing_in_common(
                self._first.place, self._labelled, self._second.place, self._other_labelled
            )
        if self._first.manifest is not None and is_store and self._absent.n:
            raise InputError(
                f"{self._first.place}: found {self._absent.n:,} of {self._common.n:,} cells that {self._true} does not "
                f"have, the first {self._absent.names[0]}; give the store that was predicted"
            )
        if self._absent.n == self._common.n:
            raise _nothing_in_common(self._first.place, self._common, self._true, self._true_cells)


def _none_held_out(source: LabelSource) -> InputError:
    n = sum(part.n_cells for part in source.parts)
    return InputError(
        f"{source.place}: found no held-out cell among {n:,}, expected some with split test; "
        "use --cells all, or predict the store that the model was fine-tuned on"
    )


def _nothing_in_common(place: str, cells: _Some, other_place: str, others: _Some) -> InputError:
    return InputError(
        f"{place}: found no labelled cell that {other_place} has: {cells} here, {others} there; "
        "expected barcodes, and samples if both name them, that are written alike; change one of the two"
    )
