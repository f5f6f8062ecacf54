"""Figures group by group, as donor by donor, and how far they are chance where other groups might have been drawn.

Cells of one donor are alike, so that an interval over cells says nothing of other donors. Here whole groups are drawn,
as many as there are, with all their cells (Davison and Hinkley 1997, 3.8).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.annotate.bootstrap import DRAWS, Interval, figures_of_drawn_groups, percentiles
from annatac_scale.annotate.metrics import evaluate_labels
from annatac_scale.errors import InputError

FIGURES = ("accuracy", "macro_f1")
FEWEST_GROUPS = 5
"""Groups that an interval over groups takes: of fewer there are hardly any different draws."""

Texts = NDArray[np.object_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ByGroup:
    """Figures of the evaluated cells of each group.

    column: names the groups; n_without: evaluated cells that have none, and no part in this
    table: a row a group, by name: group, n_cells, accuracy, macro_f1 (over the types that it has), and, where other
        labels are compared, other_accuracy, other_macro_f1
    intervals: 95%, over groups, of accuracy and macro_f1 of all of them together; differences: of these less the other
        labels'. Both are empty with fewer than FEWEST_GROUPS
    """

    column: str
    table: pd.DataFrame
    n_without: int
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    differences: Mapping[str, Interval] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        column: str,
        groups: Texts,
        truth: Texts,
        label: Texts,
        other: Texts | None = None,
        n_cells: Ints | None = None,
    ) -> "ByGroup":
        """Figures of cells with a truth. groups: str [n], "" where a cell has none; truth, label, other: str [n]

        n_cells: cells that each row stands for, int64 [n]; None: one each

        Raises InputError where no cell has a group.
        """
        known = groups != ""
        n = np.ones(len(groups), np.int64) if n_cells is None else n_cells
        if not known.any():
            raise InputError(
                f"--group {column}: found no value of it in any of {n.sum():,} evaluated cells; expected the donor "
                "or batch of each; name the column that holds it"
            )
        n_groups, n_without = len(set(groups[known])), int(n[~known].sum())
        n, truth, groups = n[known], truth[known], groups[known]
        if 2 * n_groups > n.sum() > FEWEST_GROUPS:
            raise InputError(
                f"--group {column}: found {n_groups:,} values among {n.sum():,} evaluated cells, expected a donor "
                "or batch that many cells share; name the column that holds it"
            )
        labels = [label[known]] if other is None else [label[known], other[known]]
        rows = []
        for name in sorted(set(groups)):
            own = groups == name
            row: dict[str, Any] = {"group": name, "n_cells": int(n[own].sum())}
            for prefix, one in zip(("", "other_"), labels, strict=False):
                found = evaluate_labels(truth[own], one[own], n[own])
                row |= {f"{prefix}{figure}": getattr(found, figure) for figure in FIGURES}
            rows.append(row)
        intervals: dict[str, Interval] = {}
        differences: dict[str, Interval] = {}
        if len(rows) >= FEWEST_GROUPS:
            drawn = figures_of_drawn_groups(groups, truth, labels, DRAWS, n_cells=n)
            intervals = {name: percentiles(drawn[0][name]) for name in FIGURES}
            if other is not None:
                differences = {name: percentiles(drawn[0][name] - drawn[1][name]) for name in FIGURES}
        return cls(column, pd.DataFrame(rows), n_without, intervals, differences)

    def to_dict(self) -> dict[str, Any]:
        """All of it in the types of JSON."""
        return {
            "column": self.column,
            "n_without": self.n_without,
            "groups": self.table.to_dict("records"),
            "intervals": {name: interval.to_json() for name, interval in self.intervals.items()},
            "differences": {name: interval.to_json() for name, interval in self.differences.items()},
        }

    def text(self) -> list[str]:
        """Lines to print."""
        lines = self.table.to_string(index=False, float_format="{:.4f}".format).splitlines()
        lines = [f"by {self.column}", *lines]
        if self.n_without:
            lines.append(f"{self.n_without:,} cells without a {self.column} are in no row")
        if not self.intervals:
            few = f"{len(self.table)} groups: an interval over groups takes {FEWEST_GROUPS}"
            return [*lines, f"{few}, so that how far another {self.column} would differ is not known"]
        for what, intervals in (("", self.intervals), ("less the other labels' ", self.differences)):
            if intervals:
                shown = ", ".join(
                    f"{name.replace('_f1', ' F1')} {what}[{low:.4f}, {high:.4f}]"
                    for name, (low, high) in intervals.items()
                )
                lines.append(f"95% intervals over the {len(self.table)} groups: {shown}")
        return lines
