"""How good labels are where a hierarchy says that some types are kinds of others."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from annatac_scale.model.hierarchy import Hierarchy
from annatac_scale.model.labels import label_texts


@dataclass(frozen=True)
class LineageFigures:
    """Shares of the cells whose true type is in the hierarchy; NaN without any.

    n_cells: these cells; n_outside: cells whose true type the hierarchy does not have
    exact: the best type is the true one
    at_or_below: it is the true one or a kind of it: what scTab (Fischer et al. 2024) counts as right
    related: it is that, or the true one is a kind of it
    named: some lineage was likely enough
    lineage_right: the lineage is the true type or lies above it; a cell without a lineage is not right
    lineage_depth: mean depth of the lineages that there are, in steps from a root; truth_depth: of the true types
    """

    n_cells: int
    n_outside: int
    exact: float
    at_or_below: float
    related: float
    named: float
    lineage_right: float
    lineage_depth: float
    truth_depth: float

    def to_dict(self) -> dict[str, Any]:
        """In the types of JSON; what is undefined is None."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}

    def text(self) -> list[str]:
        """Lines to print."""
        outside = (
            f"; {self.n_outside:,} of a type that it does not have are left out" if self.n_outside else ""
        )
        best = (
            f"{self.exact:.4f}, at or below the truth {self.at_or_below:.4f}, or above it {self.related:.4f}"
        )
        depth = f"depth {self.lineage_depth:.2f} of {self.truth_depth:.2f}"
        return [
            f"in the hierarchy, of {self.n_cells:,} cells{outside}:",
            f"  best is the truth {best}",
            f"  a lineage is given {self.named:.4f}, at or above the truth {self.lineage_right:.4f}, {depth}",
        ]


def lineage_figures(
    hierarchy: Hierarchy,
    truth: ArrayLike,
    best: ArrayLike,
    lineage: ArrayLike,
    n_cells: NDArray[np.int64] | None = None,
) -> LineageFigures:
    """Compare best types and lineages with the truth, labels [n]; cells without a truth are left out.

    lineage: missing where none was likely enough
    n_cells: cells that each row stands for, int64 [n]; None: one each
    """
    true_type = label_texts(truth)
    nodes = pd.Index(hierarchy.nodes, dtype=object)
    code = nodes.get_indexer(pd.Index(true_type, dtype=object))
    inside = code >= 0
    n_all = np.ones(len(code), np.int64) if n_cells is None else n_cells
    n = n_all[inside]
    true_code = code[inside]
    best_code, lineage_code = (
        nodes.get_indexer(pd.Index(label_texts(labels)[inside], dtype=object)) for labels in (best, lineage)
    )
    at_or_below = _lies_above(hierarchy, true_code, best_code)
    given = lineage_code >= 0
    return LineageFigures(
        n_cells=int(n.sum()),
        n_outside=int(n_all[~inside & (true_type != "")].sum()),
        exact=_mean(best_code == true_code, n),
        at_or_below=_mean(at_or_below, n),
        related=_mean(at_or_below | _lies_above(hierarchy, best_code, true_code), n),
        named=_mean(given, n),
        lineage_right=_mean(_lies_above(hierarchy, lineage_code, true_code), n),
        lineage_depth=_mean(hierarchy.depth[lineage_code[given]], n[given]),
        truth_depth=_mean(hierarchy.depth[true_code], n),
    )


def _lies_above(hierarchy: Hierarchy, upper: NDArray[np.intp], lower: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether the one is the other or lies above it; a code below 0 is no node."""
    return (upper >= 0) & (lower >= 0) & hierarchy.above[upper, lower]


def _mean(values: NDArray[Any], n_cells: NDArray[np.int64]) -> float:
    return float((values * n_cells).sum() / n_cells.sum()) if len(values) else math.nan
