"""The table of confusions of two sets of labels, and what a model cannot tell apart, in sentences with numbers.

A type is said to be called another where that happens to more than 5% of its cells beyond chance noise: the exact
binomial test of "at most 5%" is refused at 5%, Bonferroni's correction over all pairs of a type and a label included.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binom

LEAST_SHARE = 0.05
"""Share of a type's cells up to which being called another is not worth a sentence."""
SIGNIFICANCE = 0.05
FEWEST_CELLS = 17
"""The fewest cells of a type with which, all of them right, the exact 95% interval of the share right begins above
80%: 0.025 ** (1 / 17) = 0.805."""


def confusion_table(
    truth: NDArray[np.object_], predicted: NDArray[np.object_], n_cells: NDArray[np.int64] | None = None
) -> pd.DataFrame:
    """Counts of cells: a row each type of the truth, a column each type in the same order, then each other label.

    truth, predicted: labels as text, object [n]; n_cells: cells that each pair stands for, int64 [n]; None: one each
    """
    types = sorted(set(truth))
    labels = types + sorted(set(predicted) - set(types))
    number_of = {label: i for i, label in enumerate(labels)}
    row, column = pd.Series(truth).map(number_of), pd.Series(predicted).map(number_of)
    counts = np.zeros(len(types) * len(labels), np.int64)
    np.add.at(counts, (row * len(labels) + column).to_numpy(np.int64), 1 if n_cells is None else n_cells)
    return pd.DataFrame(
        counts.reshape(len(types), len(labels)),
        pd.Index(types, name="truth"),
        pd.Index(labels, name="predicted"),
    )


def per_type_figures(confusion: pd.DataFrame) -> pd.DataFrame:
    """One row a type: cell_type, n (true cells), precision (0 if never predicted), recall, f1."""
    counts = confusion.to_numpy()
    n_true, n_predicted, right = counts.sum(axis=1), counts.sum(axis=0)[: len(counts)], counts.diagonal()
    return pd.DataFrame(
        {
            "cell_type": confusion.index,
            "n": n_true,
            "precision": right / np.maximum(n_predicted, 1),
            "recall": right / n_true,
            "f1": 2 * right / (n_true + n_predicted),
        }
    )


@dataclass(frozen=True)
class ConfusedPair:
    """Two types, or a type and a label that no cell truly has (``n_second`` 0).

    n_first, n_second: their cells; n_first_as_second, n_second_as_first: those that are called the other
    is_mutual: whether both directions are beyond noise; else it is the first that is called the second
    """

    first: str
    second: str
    n_first: int
    n_second: int
    n_first_as_second: int
    n_second_as_first: int
    is_mutual: bool

    @property
    def sentence(self) -> str:
        """It in words."""
        one = _share(self.n_first, self.first, self.n_first_as_second, self.second)
        if not self.n_second:
            return f"{one[0].upper()}{one[1:]}."
        other = _share(self.n_second, self.second, self.n_second_as_first, self.first)
        if self.is_mutual:
            return f"{one[0].upper()}{one[1:]}, and {other}: the two are not told apart reliably."
        return f"{one[0].upper()}{one[1:]}; {other}."


def _share(n: int, cell_type: str, n_called: int, label: str) -> str:
    share = "none" if not n_called else "less than 1%" if n_called < 0.01 * n else f"{n_called / n:.0%}"
    return f"of {n:,} {_on_a_line(cell_type)} cells {share} are called {_on_a_line(label)}"


def _on_a_line(name: str) -> str:
    return " ".join(name.split())


@dataclass(frozen=True)
class Confusions:
    """What is not told apart, most cells first, and the types that have too few cells to say so, with their cells."""

    pairs: tuple[ConfusedPair, ...]
    too_few: Mapping[str, int]

    @property
    def sentences(self) -> list[str]:
        """All of it in words, at least one sentence."""
        said = [pair.sentence for pair in self.pairs] or [
            f"No type is called another for more than {LEAST_SHARE:.0%} of its cells beyond chance noise."
        ]
        if self.too_few:
            types = ", ".join(f"{_on_a_line(name)} ({n:,})" for name, n in self.too_few.items())
            said.append(
                f"Too few cells for a figure of {types}: with fewer than {FEWEST_CELLS} cells of a type, all of them "
                "right would still leave 20% wrong possible."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """All of it in the types of JSON."""
        return {
            "pairs": [asdict(pair) for pair in self.pairs],
            "too_few": dict(self.too_few),
            "sentences": self.sentences,
        }


def confusions_of(confusion: pd.DataFrame) -> Confusions:
    """What a table of counts says by the rule above.

    confusion: a row each type with at least one cell, a column each label, those of the types among them
    """
    labels = [str(name) for name in confusion.columns]
    types = [str(name) for name in confusion.index]
    counts = confusion.to_numpy()
    n_cells = counts.sum(axis=1)
    n_pairs = len(types) * max(len(labels) - 1, 1)
    beyond = binom.sf(counts - 1, n_cells[:, None], LEAST_SHARE) <= SIGNIFICANCE / n_pairs
    row_of = {name: row for row, name in enumerate(types)}
    column_of = {name: column for column, name in enumerate(labels)}
    pairs = []
    for row, column in zip(*np.nonzero(beyond), strict=True):
        first, second = types[row], labels[column]
        back = row_of.get(second)
        if first == second:
            continue
        is_mutual = back is not None and bool(beyond[back, column_of[first]])
        n_back = 0 if back is None else int(counts[back, column_of[first]])
        n_there = int(counts[row, column])
        # Of a mutual pair the type that is called the other more often comes first.
        if is_mutual and back is not None:
            ahead = n_there * n_cells[back], -row
            if ahead < (n_back * n_cells[row], -back):
                continue
        n_second = 0 if back is None else int(n_cells[back])
        pairs.append(ConfusedPair(first, second, int(n_cells[row]), n_second, n_there, n_back, is_mutual))
    pairs.sort(key=lambda pair: -(pair.n_first_as_second + pair.is_mutual * pair.n_second_as_first))
    few = {name: int(n) for name, n in zip(types, n_cells, strict=True) if n < FEWEST_CELLS}
    return Confusions(tuple(pairs), few)
