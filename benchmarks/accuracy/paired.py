"""What is computed from the predictions of several rows: ensembles of seeds, and the paired bootstrap of macro F1."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DRAWS = 2_000
Texts = NDArray[np.str_]
Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Told:
    """Predictions of a row, over all its splits: cells as "held-out value/cell", truth and types, [n].

    chances: [n, classes], empty where the method gives none
    """

    cells: Texts
    truth: Texts
    types: Texts
    chances: Floats
    classes: Texts

    def write(self, path: Path) -> None:
        """Write it whole or not at all; texts without pickle."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part.npz")
        np.savez_compressed(
            aside,
            cells=self.cells,
            truth=self.truth,
            types=self.types,
            chances=self.chances.astype(np.float32),
            classes=self.classes,
        )
        aside.rename(path)

    @classmethod
    def read(cls, path: Path) -> "Told":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(*(arrays[name] for name in ("cells", "truth", "types", "chances", "classes")))


def ensemble(members: list[Told]) -> Told:
    """The mean of the members' chances; all have the same cells and classes. Raises ValueError where not."""
    first = members[0]
    for member in members:
        if not (np.array_equal(member.cells, first.cells) and np.array_equal(member.classes, first.classes)):
            raise ValueError("an ensemble: the members have other cells or classes")
    chances = np.mean([member.chances for member in members], axis=0)
    return Told(first.cells, first.truth, first.classes[chances.argmax(axis=1)], chances, first.classes)


def f1_difference(truth: Texts, ours: Texts, theirs: Texts, seed: int = 0) -> dict[str, float]:
    """Macro F1 of ours less theirs, with the 95% interval of a bootstrap over cells, both told of the same cells.

    The mean is over the types in the truth; a type that a draw has no cell of, and nobody tells, counts as 0 in both.
    """
    names, codes = np.unique(np.concatenate([truth, ours, theirs]), return_inverse=True)
    triples = codes.reshape(3, -1).T
    kinds, counts = np.unique(triples, axis=0, return_counts=True)
    types = np.searchsorted(names, np.unique(truth))
    # Cells of one triple of truth and types are alike: a draw is a multinomial over the triples.
    draws = np.random.default_rng(seed).multinomial(len(triples), counts / len(triples), DRAWS)
    found = _macro_f1(draws, kinds[:, 0], kinds[:, 1], types) - _macro_f1(
        draws, kinds[:, 0], kinds[:, 2], types
    )
    whole = counts[None]
    difference = _macro_f1(whole, kinds[:, 0], kinds[:, 1], types) - _macro_f1(
        whole, kinds[:, 0], kinds[:, 2], types
    )
    low, high = np.quantile(found, [0.025, 0.975])
    return {
        "difference": round(float(difference[0]), 5),
        "low": round(float(low), 5),
        "high": round(float(high), 5),
    }


def _macro_f1(
    weights: NDArray[np.int64], truth: NDArray[np.int64], told: NDArray[np.int64], types: NDArray[np.int64]
) -> Floats:
    """Macro F1 over ``types`` of each draw. weights: [draws, kinds], cells of each kind; truth, told: codes [kinds]."""
    scores = np.zeros((len(weights), len(types)))
    for place, code in enumerate(types):
        is_true, is_told = truth == code, told == code
        right = weights[:, is_true & is_told].sum(axis=1)
        total = weights[:, is_true].sum(axis=1) + weights[:, is_told].sum(axis=1)
        scores[:, place] = 2 * right / np.maximum(total, 1)
    found: Floats = scores.mean(axis=1)
    return found
