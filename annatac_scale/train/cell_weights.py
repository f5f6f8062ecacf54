"""How much each training cell counts in the loss: by its type, and by its group (donor, batch).

The stream gives each cell once an epoch, and samples alone may have more turns, so rare types and donors are not drawn
more often: they weigh more. In expectation a step moves by the same; of a batch without a rare cell it does not.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.train.splits import LabelledCells

CLASS_WEIGHTS = ("balanced", "paper", "none")
GROUP_WEIGHTS = ("none", "balanced")


def class_weights(counts: NDArray[np.int64], rule: str) -> NDArray[np.float32]:
    """Weight of each type in the loss, float32 [n_types].

    counts: training cells of each type, all above 0
    balanced: n / (types x count); paper: (1 - frequency)^2, as annATAC's released code; none: 1
    """
    frequency = counts / counts.sum()
    if rule == "balanced":
        return (1 / (len(counts) * frequency)).astype(np.float32)
    return ((1 - frequency) ** 2 if rule == "paper" else np.ones(len(counts))).astype(np.float32)


def cell_weights(
    labelled: LabelledCells, type_weights: NDArray[np.floating], group_rule: str
) -> NDArray[np.float32]:
    """Weight of each labelled cell, float32 [n], 0 where it does not train.

    type_weights: [types], of a cell of each type
    group_rule: "balanced" gives all groups that have training cells of a type the same sum of weights in it, and the
        type the sum that it has without; "none" weighs cells of a type alike. A type's one cell of a group so weighs as
        much as all of another group: for groups of a similar size.
    """
    weights = np.zeros(len(labelled.cells), np.float64)
    training = labelled.split == "train"
    codes = labelled.codes[training]
    weights[training] = type_weights[codes]
    if group_rule == "balanced":
        assert labelled.groups is not None
        weights[training] *= _group_factors(codes, labelled.groups[training])
    return weights.astype(np.float32)


def _group_factors(codes: NDArray[np.int64], groups: NDArray[np.object_]) -> NDArray[np.float64]:
    """Cells of the type over (its groups x its cells in the group): 1 in the mean over the cells of each type."""
    table = pd.DataFrame({"type": codes, "group": groups})
    of_type = table.groupby("type")["group"].transform("size").to_numpy()
    n_groups = table.groupby("type")["group"].transform("nunique").to_numpy()
    of_both = table.groupby(["type", "group"])["group"].transform("size").to_numpy()
    factors: NDArray[np.float64] = of_type / (n_groups * of_both)
    return factors
