"""What is computed from the predictions of several rows: ensembles of seeds, and the paired bootstrap of macro F1."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from annatac_scale.annotate.bootstrap import compare_labels

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


def f1_difference(truth: Texts, ours: Texts, theirs: Texts) -> dict[str, float]:
    """Macro F1 of ours less theirs, with the 95% interval of the paired bootstrap, both told of the same cells."""
    found = compare_labels(truth, ours, theirs, DRAWS).macro_f1
    figures = {"difference": found.difference, "low": found.interval.low, "high": found.interval.high}
    return {name: round(value, 5) for name, value in figures.items()}
