"""A batch: tokens of some cells as flat arrays, with what the losses compare them to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from annatac_scale.errors import StoreError
from annatac_scale.store.encoded_rows import DamagedRowError, EncodedRows
from annatac_scale.store.open_islands import OpenIslands

Value = TypeVar("Value", bound=np.generic)
Ints = NDArray[np.int64]
Islands = NDArray[np.int32]

CLOSED_TOKEN = 0
MASK_TOKEN = 6
NOT_COUNTED = -100
"""Target of a token that a loss leaves out: torch's default ``ignore_index``, and no token."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of ``B`` cells, in all ``T`` of them; cell ``i`` owns ``offsets[i]:offsets[i + 1]``.

    cell_ids: int64 [B], counted over the whole store
    offsets: int64 [B + 1]
    islands: int32 [T], island numbers of the model (of the store where there is no vocabulary),
        strictly increasing within a cell
    tokens: uint8 [T], 0 closed, 1 to 5 a level, 6 MASK
    level_targets: int16 [T] or None, 0 to 4 = level - 1, -100 does not count
    open_targets: int16 [T] or None, 1 open, 0 closed, -100 does not count
    obs: columns of obs that the stream was asked for, each [B]: numbers, or int32 codes of texts, -1 where missing;
        truth values, as int8 and -1 where any cell of the store has none
    """

    cell_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    islands: NDArray[np.int32]
    tokens: NDArray[np.uint8]
    level_targets: NDArray[np.int16] | None = None
    open_targets: NDArray[np.int16] | None = None
    obs: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def levels(self) -> NDArray[np.uint8]:
        """Levels of the open islands, uint8 [T], 1 to 5: what the tokens are before any is hidden or added."""
        return self.tokens

    def __len__(self) -> int:
        return len(self.cell_ids)

    def __getitem__(self, cells: slice) -> "Batch":
        """The cells of a slice of step 1."""
        start, stop, step = cells.indices(len(self))
        if step != 1:
            raise IndexError("a batch takes slices of step 1")
        stop = max(start, stop)
        own = slice(self.offsets[start], self.offsets[stop])
        return Batch(
            self.cell_ids[start:stop],
            self.offsets[start : stop + 1] - self.offsets[start],
            self.islands[own],
            self.tokens[own],
            None if self.level_targets is None else self.level_targets[own],
            None if self.open_targets is None else self.open_targets[own],
            {name: values[start:stop] for name, values in self.obs.items()},
        )

    @classmethod
    def from_open(
        cls, cell_ids: NDArray[np.int64], cells: OpenIslands, obs: Mapping[str, NDArray[Any]] | None = None
    ) -> "Batch":
        """One token for each open island, no targets; ``cell_ids[i]`` names cell ``i`` of ``cells`` and of ``obs``."""
        return cls(cell_ids, cells.offsets, cells.islands, cells.levels, obs=dict(obs or {}))

    def with_closed(
        self, measured: Sequence[NDArray[np.int32]], sample_of_cell: NDArray[np.integer]
    ) -> "Batch":
        """The batch in which every island that a cell's sample measures has a token.

        Listed tokens keep their targets; the others become closed tokens that do not count.

        measured: for each sample its measured islands, int32, increasing, numbered as ``islands`` is
        sample_of_cell: int [B], index into ``measured``

        Raises StoreError where a listed island is not measured in the cell's sample.
        """
        present, sample = np.unique(sample_of_cell, return_inverse=True)
        tables = [measured[index] for index in present]
        starts = _offsets(np.array([len(table) for table in tables], np.int64))
        offsets = _offsets(np.diff(starts)[sample])
        islands = np.empty(offsets[-1], np.int32)
        place = np.full(len(self.islands), -1, np.int64)
        table = np.concatenate(tables) if tables else np.empty(0, np.int32)
        _spread(self.offsets, self.islands, table, starts[sample], offsets, islands, place)
        self._check_measured(place)
        n_tokens = len(islands)
        return Batch(
            self.cell_ids,
            offsets,
            islands,
            _scatter(self.tokens, place, n_tokens, CLOSED_TOKEN),
            _scatter_targets(self.level_targets, place, n_tokens),
            _scatter_targets(self.open_targets, place, n_tokens),
            self.obs,
        )

    def _check_measured(self, place: Ints) -> None:
        lost = np.flatnonzero(place < 0)
        if len(lost):
            cell = self.cell_ids[np.searchsorted(self.offsets, lost[0], side="right") - 1]
            raise StoreError(
                f"cell {cell}: island {self.islands[lost[0]]} is open, but its sample does not measure it; "
                "open islands must be measured: check the store with `annatac info`, or convert it again"
            )


@dataclass(frozen=True, eq=False)
class RowsOrigin:
    """What has to be known to decode rows of a store.

    store: its path or URL
    n_islands: its islands, as which the rows number them
    new_of_old: int32 [n_islands] or None, the numbers of the stream's vocabulary, -1 where it has none
    """

    store: str
    n_islands: int
    new_of_old: NDArray[np.int32] | None

    def decode(self, cell_ids: Ints, rows: EncodedRows) -> OpenIslands:
        """The open islands of the rows; ``cell_ids[i]`` names row ``i``. Raises StoreError for bytes of no encoder."""
        try:
            return rows.decode(self.n_islands, self.new_of_old)
        except DamagedRowError as error:
            raise StoreError(
                f"{self.store}: cell {cell_ids[error.row]}: found {error.what}; expected the bytes of an encoder; "
                "look for what else is damaged with `annatac info --verify`, and convert the sample again"
            ) from error


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """``B`` cells in the island codec (docs/store-format.md): a byte for nearly every open island.

    cell_ids: int64 [B], counted over the whole store
    data: uint8, the rows one after the other; offsets: int64 [B + 1], cell ``i`` owns ``offsets[i]:offsets[i + 1]``
    origin: what decoding has to know of the store
    obs: as in Batch
    """

    cell_ids: NDArray[np.int64]
    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    origin: RowsOrigin
    obs: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cell_ids)

    def decode(self) -> Batch:
        """The batch as open islands. Raises StoreError for bytes that no encoder writes."""
        rows = EncodedRows.of_bytes(self.data, self.offsets)
        return Batch.from_open(self.cell_ids, self.origin.decode(self.cell_ids, rows), self.obs)


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _scatter(values: NDArray[Value], place: Ints, size: int, fill: int) -> NDArray[Value]:
    """An array of ``size`` full of ``fill``, but for ``values`` at ``place``."""
    spread = np.full(size, fill, values.dtype)
    spread[place] = values
    return spread


def _scatter_targets(targets: NDArray[np.int16] | None, place: Ints, size: int) -> NDArray[np.int16] | None:
    return None if targets is None else _scatter(targets, place, size, NOT_COUNTED)


@njit(nogil=True, cache=True)
def _spread(
    listed_offsets: Ints,
    listed: Islands,
    table: Islands,
    table_starts: Ints,
    offsets: Ints,
    islands: Islands,
    place: Ints,
) -> None:
    """Write each cell's measured islands to ``islands`` and where its listed ones went to ``place``."""
    for cell in range(len(offsets) - 1):
        next_listed = listed_offsets[cell]
        for position in range(offsets[cell], offsets[cell + 1]):
            island = table[table_starts[cell] + position - offsets[cell]]
            islands[position] = island
            if next_listed < listed_offsets[cell + 1] and listed[next_listed] == island:
                place[next_listed] = position
                next_listed += 1
