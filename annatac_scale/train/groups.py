"""Groups of cells (donors, batches) that are kept whole: which of them test, validate and calibrate.

What is dealt follows from the seed, the names of the groups, and how many cells of each type they have; never from the
order of samples or cells.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

FEWEST_TRAIN_GROUPS = 2
"""Groups that are left to train on where val and calib are whole groups too."""

Texts = NDArray[np.object_]


def group_table(groups: Texts, types: Texts, seed: int) -> pd.DataFrame:
    """Cells by group and type: a row a group, in the order of a hash of (seed, group)."""
    table = pd.crosstab(groups, types)
    hashes = [hashlib.blake2b(f"{seed}\t{name}".encode(), digest_size=8).digest() for name in table.index]
    return table.iloc[sorted(range(len(hashes)), key=hashes.__getitem__)]


def testing_groups(table: pd.DataFrame, share: float) -> list[str]:
    """Groups that test: about ``share`` of the cells, at least one group where it is above 0.

    Groups are taken in order as long as that comes nearer to the share, where all types, and a group, are left to
    train. Where none can be taken so, one is all the same: the one that costs the fewest types, of these the one
    nearest to the share.
    """
    if not share or len(table) < 2:
        return []
    taken = _taken(table, share * int(table.to_numpy().sum()), 1)
    if taken:
        return taken
    n_types = (table > 0).any().sum()
    lost = [int(n_types - (table.drop(index=name) > 0).any().sum()) for name in table.index]
    far = (table.sum(axis=1) - share * table.to_numpy().sum()).abs().tolist()
    return [min(zip(lost, far, range(len(table)), table.index, strict=True))[3]]


def chosen_groups(table: pd.DataFrame, shares: Mapping[str, float]) -> dict[str, list[str]] | None:
    """The groups of each split that ``shares`` names with a share above 0, as for ``testing_groups``.

    None where that would leave fewer than FEWEST_TRAIN_GROUPS groups, or take the last cells of a type.
    """
    asked = {split: share for split, share in shares.items() if share > 0}
    n_cells, found = int(table.to_numpy().sum()), {}
    for number, (split, share) in enumerate(asked.items(), 1):
        taken = _taken(table, share * n_cells, FEWEST_TRAIN_GROUPS + len(asked) - number)
        if not taken:
            return None
        found[split] = taken
        table = table.drop(index=taken)
    return found


def _taken(table: pd.DataFrame, target: float, fewest_left: int) -> list[str]:
    """Groups, in order, with about ``target`` cells; where all have more than that, the one nearest to it; or none."""
    sizes = table.sum(axis=1)
    n_types = (table > 0).any().sum()

    def may_go(names: list[str]) -> bool:
        left = table.drop(index=names)
        return len(left) >= fewest_left and (left > 0).any().sum() == n_types

    taken: list[str] = []
    n = 0
    for name in table.index:
        nearer = abs(n + sizes[name] - target) < abs(n - target)
        if nearer and may_go([*taken, name]):
            taken.append(name)
            n += int(sizes[name])
    alone = [name for name in table.index if may_go([name])]
    return taken or sorted(alone, key=lambda name: abs(sizes[name] - target))[:1]
