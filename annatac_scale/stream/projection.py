"""From the islands of a store to those of a vocabulary: of the same island space, or of other windows of the assembly.

In the same space an island is renumbered. Other windows are projected: they are taken as the peaks of the vocabulary's
islands, and averaged over what a sample measures, as peaks are when a store is made.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import ModelError
from annatac_scale.store.compiled import compiled
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.schema import N_LEVELS
from annatac_scale.store.store import IslandStore, Sample
from annatac_scale.stream.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas as pd

    from annatac_scale.genome.islands import IslandSpace

_LOOKING, _KEPT = 16, 8

LEAST_COVERED = 0.5
"""Share of the vocabulary's islands that a sample should measure; below it there is a warning."""


@dataclass(frozen=True)
class Coverage:
    """How a sample and a vocabulary cover each other.

    sample: its name
    n_islands: islands of the vocabulary; n_covered: of those, the ones that the sample measures
    n_measured: islands of the store that the sample measures; n_placed: of those, the ones that have a place in the
        vocabulary
    projected: whether the store has other islands than the vocabulary's space
    """

    sample: str
    n_islands: int
    n_covered: int
    n_measured: int
    n_placed: int
    projected: bool

    @property
    def covered(self) -> float:
        """Share of the vocabulary's islands that the sample measures."""
        return self.n_covered / self.n_islands

    @property
    def placed(self) -> float:
        """Share of the sample's measured islands that have a place in the vocabulary; 0 where it measures none."""
        return self.n_placed / self.n_measured if self.n_measured else 0.0

    def text(self) -> str:
        """Both shares in words."""
        return (
            f"{self.sample}: measures {self.n_covered:,} of the model's {self.n_islands:,} islands "
            f"({self.covered:.1%}); {self.n_placed:,} of the {self.n_measured:,} islands that it measures "
            f"({self.placed:.1%}) have a place among them"
        )

    def warning(self) -> str | None:
        """What to say of a sample that covers less than LEAST_COVERED of the vocabulary; None of any other."""
        if self.covered >= LEAST_COVERED:
            return None
        remedy = (
            "convert it with the model's islands, from fragments and without --peaks: then it measures all of them"
            if self.projected
            else "convert it from fragments without --peaks: then it measures all of them"
        )
        return (
            f"{self.sample}: its peaks measure {self.n_covered:,} of the model's {self.n_islands:,} islands "
            f"({self.covered:.1%}), expected {LEAST_COVERED:.0%} or more: the others are left out as unknown, not "
            "taken as closed, so types that the model knows by them may be missed or called novel; where you have the "
            f"sample's fragments, {remedy}"
        )


class _PackedLists(Sequence[NDArray[np.int32]]):
    """Lists of increasing numbers, held as bits, equal ones once; those looked at last are held as they are."""

    def __init__(self, packed: Sequence[bytes]) -> None:
        once = {bits: bits for bits in packed}
        self._packed = [once[bits] for bits in packed]
        self._unpacked = lru_cache(_KEPT)(self._unpack)

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: Any) -> Any:
        return self._unpacked(range(len(self))[index])

    def _unpack(self, index: int) -> NDArray[np.int32]:
        return np.flatnonzero(np.unpackbits(np.frombuffer(self._packed[index], np.uint8))).astype(np.int32)


class Projection:
    """Rows of a store in the numbers of a vocabulary.

    Each island of the store belongs to at most one of the vocabulary's, the one that it shares most base pairs with,
    the first of equals. Where several that a sample measures belong to one, its level in a cell is
    min(ceil(S / n), 5): S the sum of their levels, n how many of them the sample measures. An island of the vocabulary
    is measured where at least one that belongs to it is. In the vocabulary's own space all this is renumbering.

    projected: whether the store has other islands than the vocabulary's space
    measured: for each sample in the store's order the vocabulary's islands that it measures: int32, increasing; held as
        a bit an island
    coverage: for each sample in the store's order
    """

    def __init__(
        self, store: IslandStore, vocabulary: Vocabulary, new_of_old: NDArray[np.int32], projected: bool
    ) -> None:
        """new_of_old: int32 [store.n_islands], where each island belongs, not falling, -1 where it has no place."""
        self.projected = projected
        self._new_of_old = new_of_old
        self._n_islands = len(vocabulary)
        self._peaks: _Peaks | None = None
        samples = list(store.samples.values())
        with ThreadPoolExecutor(min(_LOOKING, max(1, len(samples))), "samples") as pool:
            looked = list(pool.map(lambda sample: self._look(sample, len(vocabulary)), samples))
        self.coverage = [coverage for coverage, _ in looked]
        self.measured = _PackedLists([packed for _, packed in looked])

    def _look(self, sample: Sample, n_islands: int) -> tuple[Coverage, bytes]:
        """How a sample and the vocabulary cover each other; the vocabulary's islands that it measures, as bits."""
        measured = sample.read_measured()  # kept by none: of all samples together it is too much
        placed = self._new_of_old[measured]
        placed = placed[placed >= 0]
        covered = np.zeros(n_islands, np.bool_)
        covered[placed] = True
        coverage = Coverage(
            sample.name, n_islands, int(covered.sum()), int(measured.sum()), len(placed), self.projected
        )
        return coverage, np.packbits(covered).tobytes()

    @classmethod
    def of(
        cls, store: IslandStore, vocabulary: Vocabulary, islands: "pd.DataFrame | None" = None
    ) -> "Projection":
        """That of a store onto a vocabulary.

        islands: chrom (str), start, end of the vocabulary's islands, in its order, of the store's assembly; None
            refuses a store of other islands than the vocabulary's space

        Raises ModelError for such a store, and where nothing that its samples measure shares a base pair with the
        vocabulary's islands.
        """
        if islands is None or store.islands_sha256 == vocabulary.space_sha256:
            vocabulary.check_space(store)
            return cls(store, vocabulary, vocabulary.new_of_old(), projected=False)
        projection = cls(store, vocabulary, _places(store.space, islands, store), projected=True)
        if not any(map(len, projection.measured)):
            theirs, ours = (
                store.space.names()[0],
                "{}:{}-{}".format(*islands.iloc[0][["chrom", "start", "end"]]),
            )
            raise ModelError(
                f"{store.path}: found no measured island that shares a base pair with the model's {len(vocabulary):,} "
                f"islands, expected some; the store's first island is {theirs}, the model's {ours}: where they name "
                "chromosomes otherwise, or have none in common, convert the cells anew with the islands of the model"
            )
        return projection

    def rows(self, rows: OpenIslands, sample: Sample) -> OpenIslands:
        """Cells of a sample of the store, in the vocabulary's numbers; what has no place there is left out.

        Raises ValueError for islands that the store does not have.
        """
        if not self.projected:
            return rows.renumber(self._new_of_old)
        if len(rows.islands) and rows.islands.max() >= len(self._new_of_old):
            raise ValueError(f"island {rows.islands.max()} of {len(self._new_of_old)}")
        peaks = self._peaks_of(sample)
        # What is not written is never touched, so it takes no memory.
        n_open = len(rows.islands)
        offsets, islands, levels = (
            np.zeros(len(rows) + 1, np.int64),
            np.empty(n_open, np.int32),
            np.empty(n_open, np.uint8),
        )
        _average(rows.offsets, rows.islands, rows.levels, peaks.place, peaks.n, offsets, islands, levels)
        n_open = offsets[-1]
        return OpenIslands(offsets, islands[:n_open], levels[:n_open])

    def _peaks_of(self, sample: Sample) -> "_Peaks":
        """Kept from call to call, as a sample's cells follow each other."""
        peaks = self._peaks
        if peaks is None or peaks.sample is not sample:
            place = np.where(sample.measured, self._new_of_old, np.int32(-1))
            n = np.bincount(place[place >= 0], minlength=self._n_islands).astype(np.int64)
            peaks = self._peaks = _Peaks(sample, place, n)
        return peaks


@dataclass(frozen=True, eq=False)
class _Peaks:
    """The islands of a store as the peaks of a vocabulary's islands, in one sample.

    place: int32 [store.n_islands], the island that each belongs to, -1 for none, or where the sample does not measure
    n: int64 [vocabulary], how many belong to each
    """

    sample: Sample
    place: NDArray[np.int32]
    n: NDArray[np.int64]


def _places(space: "IslandSpace", islands: "pd.DataFrame", store: IslandStore) -> NDArray[np.int32]:
    """The row of ``islands`` that each island of a space shares most base pairs with, the first of equals; int32 [n].

    -1 where it shares none. As neither overlap among themselves, these never fall from one to the next.
    """
    codes = {name: code for code, name in enumerate(space.chromosomes)}
    code = islands["chrom"].map(codes).fillna(-1).to_numpy(np.int64)
    rows = np.flatnonzero(code >= 0)
    code = code[rows]
    if (np.diff(code) < 0).any():
        raise ModelError(
            f"{store.path}: the store has its chromosomes in another order than the model; convert the cells anew"
        )
    start, end = (islands[name].to_numpy(np.int64)[rows] for name in ("start", "end"))
    stride = 1 + int(max(space.end.max(), end.max(initial=0)))
    chrom = space.chrom.astype(np.int64)
    first = np.searchsorted(code * stride + end, chrom * stride + space.start, side="right")
    after = np.searchsorted(code * stride + start, chrom * stride + space.end, side="left")
    # One pair for each two islands that overlap, ordered by both.
    n = np.maximum(after - first, 0)
    before = np.cumsum(n) - n
    of_space = np.repeat(np.arange(len(space)), n)
    of_rows = np.arange(len(of_space)) - before[of_space] + first[of_space]
    shared = np.minimum(space.end[of_space], end[of_rows]) - np.maximum(space.start[of_space], start[of_rows])
    most = np.zeros(len(space), np.int64)
    np.maximum.at(most, of_space, shared)
    best = np.flatnonzero(shared == most[of_space])
    places = np.full(len(space), -1, np.int32)
    places[of_space[best[::-1]]] = rows[
        of_rows[best[::-1]]
    ]  # The last one written stays: the first of equals.
    return places


@compiled
def _average(offsets, islands, levels, place, n_peaks, new_offsets, new_islands, new_levels):  # type: ignore[no-untyped-def]
    """Put together the open islands of each cell that belong to one island, which follow each other."""
    n = 0
    for row in range(len(offsets) - 1):
        last, total = -1, 0
        for i in range(offsets[row], offsets[row + 1]):
            new = place[islands[i]]
            if new < 0:
                continue
            if new == last:
                total += levels[i]
            else:
                total = np.int64(levels[i])
                new_islands[n] = last = new
                n += 1
            peaks = n_peaks[new]
            level = total if peaks == 1 else (total + peaks - 1) // peaks
            new_levels[n - 1] = min(level, N_LEVELS)
        new_offsets[row + 1] = n
