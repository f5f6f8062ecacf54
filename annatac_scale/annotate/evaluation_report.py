"""What an evaluation found, as an object, as JSON, and as lines to print."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from annatac_scale.annotate.bootstrap import DRAWS, Interval, PairedTest, bootstrap_intervals, share_interval
from annatac_scale.annotate.by_group import ByGroup
from annatac_scale.annotate.confidence import ConfidenceRule
from annatac_scale.annotate.hierarchy_metrics import LineageFigures
from annatac_scale.annotate.metrics import HEADLINES, Evaluation
from annatac_scale.annotate.reliability import Calibration, Coverage, NoveltyFigures
from annatac_scale.model.labels import LOW_DEPTH, NOVEL
from annatac_scale.train.confusions import confusions_of
from annatac_scale.train.label_map import LabelMap

MUCH_NOVEL = 0.5
"""Above this share of Novel_cell_type the figures of ``label`` say little of the model: a note says so."""

_NAMES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "kappa": "Cohen's kappa",
    "jaccard_micro": "Jaccard, micro",
    "jaccard_weighted": "Jaccard, weighted",
}

Intervals = Mapping[str, Interval]


@dataclass(frozen=True, eq=False)
class Against:
    """Other labels of the same cells.

    test: the evaluated labels are the first, these the second; n_missing: cells that ``predict`` has not labelled yet
    """

    labels: str
    evaluation: Evaluation
    intervals: Intervals
    test: PairedTest
    n_missing: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All of it in the types of JSON."""
        return {
            "labels": self.labels,
            "n_missing": self.n_missing,
            "intervals": _as_json(self.intervals),
            "test": self.test.to_dict(),
            **self.evaluation.to_dict(),
        }

    def text(self) -> list[str]:
        """Lines to print."""
        test = self.test
        lines = [f"against {self.labels}, on the same {test.n_cells:,} cells"]
        for name, found in (("accuracy", test.accuracy), ("macro F1", test.macro_f1)):
            lines.append(
                f"{name:<8}  {found.first:.4f}, there {found.second:.4f}: difference {found.difference:+.4f}  "
                f"{_shown(found.interval)}, p {found.p:.2g} (paired bootstrap)"
            )
        alone = f"right here alone {test.n_only_first:,}, there alone {test.n_only_second:,} cells"
        return [
            *lines,
            f"{alone}: p {test.p_mcnemar:.2g} (McNemar, exact)",
            "Intervals and p are of other cells of these donors, not of other donors.",
        ]


@dataclass(frozen=True)
class LeftOut:
    """Cells that could not be compared.

    n_not_in_truth: that have a label, and that the truth does not have
    n_without_label: that have a truth, and no label in any set of labels; of those held out where these are evaluated
    n_not_in_other, n_only_in_other: that have a label in one of two sets of labels alone
    """

    n_not_in_truth: int = 0
    n_without_label: int = 0
    n_not_in_other: int = 0
    n_only_in_other: int = 0


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """Figures of labels, and of which cells they are.

    labels: where they are from; truth: the column with the true types; truth_file: its file, None for a store's obs
    cells: "test", those that fine-tuning held out, or "all"
    evaluation: the figures of the labels, where Novel_cell_type and Unassigned_low_depth are errors
    intervals: 95% bootstrap intervals of its headline figures
    n_missing: cells in parts of a data set of ``predict`` that are not there, of which nothing is known
    n_by_split: all cells of the labels by split, "none" for those that were not in the fine-tuning
    n_trained_on: evaluated cells that were used in fine-tuning, of either model where two are compared
    n_novel, n_low_depth: evaluated cells that are named Novel_cell_type, Unassigned_low_depth
    assigned: the figures over the cells that are not Unassigned_low_depth; None where that is all or none of them
    by_group: figures of each group, as of each donor, where a column names them
    label_map: what the truth went through; unused_labels: those that it names and no evaluated cell has

    Of what ``predict`` wrote alone, else "", None and empty; of cells without a label in the column that is evaluated,
    as lineage, too:
    model: its digest; rule: what made a cell Novel_cell_type or Unassigned_low_depth
    best: the figures of ``best``, the likeliest type however sure the model is
    calibration: confidence against share right of the cells whose type the model knows
    unknown_types: true types that the model does not know, with their cells; novelty: how these cells' scores stand
        out; coverage: of prediction sets; lineage: in the model's hierarchy, where it has one
    types_above: true types that lie above types of the model in its hierarchy, with their cells, which are neither
        known nor unknown
    """

    labels: Path | str
    truth: str
    cells: str
    evaluation: Evaluation
    n_by_split: dict[str, int]
    n_novel: int
    n_trained_on: int = 0
    n_low_depth: int = 0
    n_missing: int = 0
    assigned: Evaluation | None = None
    truth_file: str | None = None
    left_out: LeftOut = LeftOut()
    label_map: LabelMap | None = None
    unused_labels: tuple[str, ...] = ()
    against: Against | None = None
    by_group: ByGroup | None = None
    model: str = ""
    rule: ConfidenceRule | None = None
    best: Evaluation | None = None
    calibration: Calibration | None = None
    unknown_types: dict[str, int] = field(default_factory=dict)
    types_above: dict[str, int] = field(default_factory=dict)
    novelty: NoveltyFigures | None = None
    coverage: Coverage | None = None
    lineage: LineageFigures | None = None
    intervals: Intervals = field(init=False)
    best_intervals: Intervals = field(init=False)
    assigned_intervals: Intervals = field(init=False)

    def __post_init__(self) -> None:
        for name, evaluation in (
            ("intervals", self.evaluation),
            ("best_intervals", self.best),
            ("assigned_intervals", self.assigned),
        ):
            found = {} if evaluation is None else bootstrap_intervals(evaluation)
            object.__setattr__(self, name, found)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, NaN where no cell tells it."""
        return math.nan if self.calibration is None else self.calibration.error

    @property
    def share_novel(self) -> float:
        """Share of the evaluated cells that are named Novel_cell_type."""
        return self.n_novel / self.evaluation.n_cells

    @property
    def notes(self) -> list[str]:
        """Sentences that a reader of the figures must know."""
        total, n_test = sum(self.n_by_split.values()), self.n_by_split.get("test", 0)
        held_out = f"held-out test cells: {n_test:,} of {total:,}"
        notes = [held_out if self.cells == "test" else f"all {total:,} cells"]
        if self.n_trained_on:
            notes.append(
                f"{self.n_trained_on:,} of the {self.evaluation.n_cells:,} evaluated cells were used in fine-tuning: "
                "the figures are better than on new cells"
            )
        notes += self._notes_on_left_out()
        if self.rule is not None and self.share_novel > MUCH_NOVEL:
            notes.append(
                f"{self.n_novel:,} of {self.evaluation.n_cells:,} cells are {self.rule.novel_means}; see best, "
                "or predict with --novel-threshold 0"
            )
        if self.rule is not None and self.n_low_depth:
            notes.append(
                f"{self.n_low_depth:,} of {self.evaluation.n_cells:,} cells have fewer than {self.rule.min_open:,} "
                f"open islands and are named {LOW_DEPTH}, which counts as an error"
            )
        if self.evaluation.accuracy == 1:
            n = self.evaluation.n_cells
            notes.append(
                f"no error among {n:,} cells, so that a bootstrap finds none either; an accuracy of "
                f"{share_interval(n, n).low:.4f} is still possible (95%, exact)"
            )
        if self.unused_labels:
            notes.append(
                f"labels of the label map that none of these cells has: {', '.join(self.unused_labels)}"
            )
        if self.against is not None:
            notes.append(
                f"the tests against {self.against.labels} take cells as independent, also where whole donors were held "
                "out: for new donors p is too small and the intervals are too narrow; --group COLUMN draws donors"
            )
        if self.types_above:
            notes.append(
                "types that lie above types of the model, so that only a lineage can be right, and that count for no "
                f"figure of novelty: {_with_cells(self.types_above)}"
            )
        if self.unknown_types:
            types = _with_cells(self.unknown_types)
            notes.append(f"types that the model does not know, so that no best type can be right: {types}")
        return notes

    def _notes_on_left_out(self) -> list[str]:
        left, place, labels = self.left_out, self.truth_file or "the store", str(self.labels)
        either = labels if self.against is None else f"{labels} or {self.against.labels}"
        counts = {f"cells of {labels} are not predicted yet, and left out": self.n_missing}
        if self.against is not None:
            counts[f"cells of {self.against.labels} are not predicted yet, and left out"] = (
                self.against.n_missing
            )
        counts |= {
            f"cells of {labels} are not in {place}, and left out": left.n_not_in_truth,
            f"cells with a {self.truth} have no label in {either}, and are left out": left.n_without_label,
        }
        if self.against is not None:
            other = self.against.labels
            counts[f"cells of {labels} have no label in {other}, and are left out"] = left.n_not_in_other
            counts[f"cells of {other} have no label in {labels}, and are left out"] = left.n_only_in_other
        counts[f"cells without a {self.truth} are left out"] = self.evaluation.n_without_truth
        return [f"{n:,} {what}" for what, n in counts.items() if n]

    def to_dict(self) -> dict[str, Any]:
        """All of it in the types of JSON; what is undefined is None."""
        return {
            "labels": str(self.labels),
            "model": self.model,
            "truth": self.truth,
            "truth_file": self.truth_file,
            "cells": self.cells,
            "n_missing": self.n_missing,
            "n_by_split": self.n_by_split,
            "n_trained_on": self.n_trained_on,
            "left_out": asdict(self.left_out),
            "label_map": None if self.label_map is None else self.label_map.facts,
            "n_draws": DRAWS,
            "intervals": _as_json(self.intervals),
            "calibration_error": None if self.calibration is None else self.calibration.error,
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "options": None if self.rule is None else asdict(self.rule),
            "share_novel": self.share_novel,
            "n_low_depth": self.n_low_depth,
            "assigned": self._assigned(),
            "best_accuracy": None if self.best is None else self.best.accuracy,
            "best_macro_f1": None if self.best is None else self.best.macro_f1,
            "best_intervals": _as_json(self.best_intervals),
            "unknown_types": self.unknown_types,
            "types_above": self.types_above,
            "novelty": None if self.novelty is None else asdict(self.novelty),
            "coverage": None if self.coverage is None else self.coverage.to_dict(),
            "lineage": None if self.lineage is None else self.lineage.to_dict(),
            "confusions": confusions_of(self.evaluation.confusion).to_dict(),
            "against": None if self.against is None else self.against.to_dict(),
            "by_group": None if self.by_group is None else self.by_group.to_dict(),
            "notes": self.notes,
            **self.evaluation.to_dict(),
        }

    def _assigned(self) -> dict[str, Any] | None:
        if self.assigned is None:
            return None
        figures = {name: getattr(self.assigned, name) for name in ("n_cells", "accuracy", "macro_f1")}
        return {**figures, "intervals": _as_json(self.assigned_intervals)}

    def text(self) -> list[str]:
        """Lines to print: notes, figures, what is confused, a table of the types and one of confusions."""
        figures = self._figures()
        width, value_width = max(map(len, figures)), max(len(value) for value, _ in figures.values())
        per_type = self.evaluation.per_type.rename(columns={"cell_type": "type", "n": "cells"})
        confusion = self.evaluation.confusion.rename_axis(index=None, columns=None)
        return [
            *self.notes,
            "",
            *(
                f"{name:<{width}}  {value:>{value_width}}  {more}".rstrip()
                for name, (value, more) in figures.items()
            ),
            f"In brackets: 95% intervals, from {DRAWS:,} bootstrap samples of these cells.",
            *([] if self.against is None else ["", *self.against.text()]),
            *([] if self.by_group is None else ["", *self.by_group.text()]),
            *([] if self.lineage is None else ["", *self.lineage.text()]),
            "",
            *confusions_of(self.evaluation.confusion).sentences,
            "",
            *per_type.to_string(index=False, float_format="{:.4f}".format).splitlines(),
            "",
            f"rows: {self.truth}, columns: label",
            *confusion.to_string().splitlines(),
        ]

    def _figures(self) -> dict[str, tuple[str, str]]:
        """Value, and what stands behind it, by name."""
        figures = {"cells": (f"{self.evaluation.n_cells:,}", "")}
        figures |= _lines(self.evaluation, self.intervals, HEADLINES[:2])
        for what, evaluation, intervals in (
            ("best", self.best, self.best_intervals),
            ("assigned cells", self.assigned, self.assigned_intervals),
        ):
            if evaluation is not None:
                figures |= _lines(evaluation, intervals, HEADLINES[:2], f" of {what}")
        figures |= _lines(self.evaluation, self.intervals, HEADLINES[2:])
        if self.model:
            found = self.calibration
            band = "" if found is None else f"perfect calibration: {_shown(found.band)}"
            figures["calibration error"] = (f"{self.calibration_error:.4f}", band)
        if self.coverage is not None:
            sets = self.coverage
            more = f"{_shown(sets.interval)}, {sets.mean_size:.2f} types a set, {sets.n_empty:,} empty"
            figures["sets with the truth"] = (f"{sets.coverage:.4f}", more)
        if self.novelty is not None:
            told = self.novelty
            more = f"{told.n_novel:,} unknown cells; {told.fpr_at_95_tpr:.1%} false where 95% are found"
            figures["novelty AUROC"] = (f"{told.auroc:.4f}", more)
        figures[f"named {NOVEL}"] = (f"{self.share_novel:.1%}", "")
        if self.n_low_depth:
            share = self.n_low_depth / self.evaluation.n_cells
            figures[LOW_DEPTH] = (f"{share:.1%}", f"{self.n_low_depth:,} cells, no label ventured")
        return figures


def _with_cells(types: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({n:,} cells)" for name, n in types.items())


def _lines(
    evaluation: Evaluation, intervals: Intervals, names: tuple[str, ...], of: str = ""
) -> dict[str, tuple[str, str]]:
    return {
        f"{_NAMES[name]}{of}": (f"{getattr(evaluation, name):.4f}", _shown(intervals[name])) for name in names
    }


def _shown(interval: Interval) -> str:
    return "" if math.isnan(interval.low) else f"[{interval.low:.4f}, {interval.high:.4f}]"


def _as_json(intervals: Intervals) -> dict[str, list[float] | None]:
    return {name: interval.to_json() for name, interval in intervals.items()}
