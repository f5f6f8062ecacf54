"""From the spills of a fragment file to whole shards: each block of 250 rows is put together alone."""

from collections.abc import Iterator, Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from annatac_scale.ingest.cells import rows_name
from annatac_scale.ingest.spill import Spill, decode_counts
from annatac_scale.store.draft import Draft, ShardRecord
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Place
from annatac_scale.store.schema import BLOCK_CELLS, N_LEVELS, SHARD_CELLS


def finish_shard(
    draft: Draft, place: Place, names: Sequence[str], n_cells: int, shard: int, n_peaks: NDArray[np.int64]
) -> ShardRecord:
    """Write one shard of a draft from the spills ``names`` in ``place``, unless it is there.

    n_peaks: int64 [n_islands], peaks of each island. Memory: the encoded shard, and the counts of a block.
    """
    first, stop = shard * SHARD_CELLS, min((shard + 1) * SHARD_CELLS, n_cells)
    found = draft.written(shard)
    if found is not None and place.size(n_open_name(shard)) == 4 * (stop - first):
        return found
    parts = [_Part(place, name) for name in names]
    n_open: list[NDArray[np.int32]] = []

    def blocks() -> Iterator[OpenIslands]:
        for block in _blocks(parts, range(first, stop, BLOCK_CELLS), stop, n_peaks):
            n_open.append(block.n_open.astype(np.int32))
            yield block

    record = draft.write_blocks(shard, blocks())
    place.write(n_open_name(shard), np.concatenate(n_open).tobytes())
    return record


def n_open_name(shard: int) -> str:
    """Where the open islands of each of a shard's cells are: int32."""
    return f"open/{shard}"


class _Part:
    """What one spill holds of the rows, which increase from barcode to barcode."""

    def __init__(self, place: Place, name: str) -> None:
        rows = np.frombuffer(place.read(rows_name(name)), np.int32)
        self.spill = Spill(place, name)
        self.barcodes = np.flatnonzero(rows >= 0)
        self.rows = rows[self.barcodes]

    def between(
        self, first: int, stop: int
    ) -> "tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]":
        """Rows first..stop that it has, less ``first``; and where their counts lie, in bytes and in numbers."""
        a, b = np.searchsorted(self.rows, [first, stop])
        if a == b:
            return (np.empty(0, np.int64),) * 3
        begin, end = int(self.barcodes[a]), int(self.barcodes[b - 1]) + 1
        rows = np.full(end - begin, -1, np.int64)
        rows[self.barcodes[a:b] - begin] = self.rows[a:b] - first
        return (
            rows,
            self.spill.array("entry_ends", begin, end + 1),
            self.spill.array("count_ends", begin, end + 1),
        )


def _blocks(
    parts: Sequence[_Part], firsts: range, stop: int, n_peaks: NDArray[np.int64]
) -> Iterator[OpenIslands]:
    for first in firsts:
        n_rows = min(BLOCK_CELLS, stop - first)
        found = [(part.spill, *part.between(first, first + n_rows)) for part in parts]
        n_counts = np.zeros(n_rows, np.int64)
        for _, rows, _, count_ends in found:
            if len(rows):
                has = rows >= 0
                n_counts[rows[has]] += np.diff(count_ends)[has]
        offsets = np.concatenate([[0], np.cumsum(n_counts)])
        islands, counts, cursor = (
            np.empty(offsets[-1], np.int64),
            np.empty(offsets[-1], np.int64),
            offsets[:-1].copy(),
        )
        for spill, rows, entry_ends, _ in found:
            if len(rows):
                encoded = spill.array("entries", int(entry_ends[0]), int(entry_ends[-1]))
                decode_counts(encoded, entry_ends - entry_ends[0], rows, cursor, islands, counts)
        opened, levels = np.empty(len(islands), np.int32), np.empty(len(islands), np.uint8)
        ends = _merge_rows(offsets, islands, counts, n_peaks, opened, levels)
        yield OpenIslands(ends, opened[: ends[-1]].copy(), levels[: ends[-1]].copy())


@njit(nogil=True, cache=True)
def _merge_rows(offsets, islands, counts, n_peaks, opened, levels):  # type: ignore[no-untyped-def]
    """Each row's islands in order, once each, with the level of their summed counts; returns the new offsets."""
    ends = np.zeros(len(offsets), np.int64)
    n = 0
    for row in range(len(offsets) - 1):
        a, b = offsets[row], offsets[row + 1]
        # Ranges of a sorted file follow each other, and so do their islands.
        for i in range(a + 1, b):
            if islands[i] < islands[i - 1]:
                order = np.argsort(islands[a:b])
                islands[a:b] = islands[a:b][order]
                counts[a:b] = counts[a:b][order]
                break
        i = a
        while i < b:
            island, count = islands[i], counts[i]
            i += 1
            while i < b and islands[i] == island:
                count += counts[i]
                i += 1
            opened[n] = island
            # Signed on purpose: -(-count // n) on unsigned integers wraps around and caps everything.
            levels[n] = min((count + n_peaks[island] - 1) // n_peaks[island], N_LEVELS)
            n += 1
        ends[row + 1] = n
    return ends
