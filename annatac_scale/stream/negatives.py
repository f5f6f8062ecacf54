"""Closed islands among the hidden ones: which are drawn for a cell, and how they come into its row.

Sets of islands are bitmaps, 64 islands a word. Nothing is sorted: the place of an island in the row is the number of
bits below its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from annatac_scale.store.compiled import compiled, count_ones, inlined
from annatac_scale.stream.batch import MASK_TOKEN, NOT_COUNTED, Batch
from annatac_scale.stream.splitmix import GOLDEN, mix, uniform

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

NEARBY = 8
"""Most numbers between a hidden island and a neighbour."""

_SECOND = np.uint64(0xD1B54A32D192ED03)
_ONE, _WORD, _IN_WORD = np.uint64(1), np.uint64(6), np.uint64(63)


class Tables(NamedTuple):
    """What closed islands are drawn from: Walker's alias method in Vose's way.

    counts: int64 [N], cells in which each island is open
    share: float64 [N], how much of an island's place in the table is its own
    other: int32 [N], the island that has the rest of the place
    drawable: uint64 [U, words of N], the distinct sets of measured islands that are open in some cell
    """

    counts: Ints
    share: NDArray[np.float64]
    other: NDArray[np.int32]
    drawable: Words


class ClosedSampler:
    """Draws closed islands by how often they are open in other cells, or near to open ones.

    open_counts: int [N], cells in which each island (numbered as in the batches) is open; 0 is never drawn
    measured: for each sample of the store its measured islands, int32, increasing
    first_cells: int64, for each sample the cell id of its first row

    Raises ValueError when no island is open in any cell: there is nothing to draw by.
    """

    def __init__(
        self, open_counts: NDArray[np.integer], measured: Sequence[NDArray[np.int32]], first_cells: Ints
    ) -> None:
        counts = open_counts.astype(np.int64)
        if not np.any(counts):
            raise ValueError("no island is open in any cell: closed islands cannot be drawn by frequency")
        # Samples of one experiment mostly share a peak set: one row of the table for all of them.
        numbers: dict[bytes, int] = {}
        self._set_of_sample = np.array(
            [numbers.setdefault(islands.tobytes(), len(numbers)) for islands in measured], np.int64
        )
        n_words = -(-len(counts) // 64)
        drawable = np.zeros((len(numbers), n_words), np.uint64)
        for number, islands in zip(self._set_of_sample, measured, strict=True):
            own = np.zeros(64 * n_words, np.bool_)
            own[islands[counts[islands] > 0]] = True
            drawable[number] = np.packbits(own, bitorder="little").view("<u8")
        share, other = _alias(counts)
        self.tables = Tables(counts, share, other, drawable)
        self._first_cells = np.asarray(first_cells, np.int64)

    def sets(self, cell_ids: Ints) -> Ints:
        """Row of ``tables.drawable`` for each cell, int64 [B]."""
        return self._set_of_sample[np.searchsorted(self._first_cells, cell_ids, side="right") - 1]


class _Tokens(NamedTuple):
    """The flat arrays of a batch, as Batch has them."""

    islands: NDArray[np.int32]
    tokens: NDArray[np.uint8]
    level_targets: NDArray[np.int16]
    open_targets: NDArray[np.int16]

    def first(self, n: int) -> "_Tokens":
        return _Tokens(self.islands[:n], self.tokens[:n], self.level_targets[:n], self.open_targets[:n])


class _Marks(NamedTuple):
    """What is known of the islands of the cell at hand.

    taken: uint64 [words of N], the listed and the drawn islands, all 0 between cells
    before: uint64 [words of N], tokens that come before the islands of each word
    hidden: int32 [longest row], the hidden islands, increasing
    drawn: int32 [most drawn for a cell]; times: float64 [the same], when islands come in that race
    """

    taken: Words
    before: Words
    hidden: NDArray[np.int32]
    drawn: NDArray[np.int32]
    times: NDArray[np.float64]

    @classmethod
    def of(cls, n_words: int, longest: int, most: int) -> "_Marks":
        return cls(
            np.zeros(n_words, np.uint64),
            np.empty(n_words, np.uint64),
            np.empty(longest, np.int32),
            np.empty(most, np.int32),
            np.empty(most),
        )


def with_negatives(batch: Batch, keys: Words, sampler: ClosedSampler, negatives: int, nearby: float) -> Batch:
    """The batch, whose open islands are hidden already, with MASK tokens on closed islands, and the open targets.

    keys: uint64 [B], of the cells' random numbers; for ``negatives`` and ``nearby`` see MaskingOptions
    """
    tables = sampler.tables
    if len(batch.islands) and batch.islands.max() >= len(tables.counts):
        raise ValueError("the sampler counts fewer islands than the batch has: they differ in vocabulary")
    assert batch.level_targets is not None
    listed = _Tokens(batch.islands, batch.tokens, batch.level_targets, np.empty(0, np.int16))
    most = len(batch.tokens) + negatives * np.count_nonzero(batch.tokens == MASK_TOKEN)
    merged = _Tokens(
        np.empty(most, np.int32), np.empty(most, np.uint8), np.empty(most, np.int16), np.empty(most, np.int16)
    )
    longest = int(np.diff(batch.offsets).max(initial=0))
    marks = _Marks.of(tables.drawable.shape[1], longest, negatives * longest)
    offsets = np.zeros(len(batch.offsets), np.int64)
    sets = sampler.sets(batch.cell_ids)
    _add_closed(keys, batch.offsets, listed, sets, tables, negatives, nearby, marks, offsets, merged)
    return Batch(batch.cell_ids, offsets, *merged.first(offsets[-1]), obs=batch.obs)


@njit(cache=True)
def _alias(counts: Ints) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Share and other of the tables. In whole numbers: an island of count 0 has no share, and none is left over."""
    n, total = len(counts), counts.sum()
    left = counts * n  # a place takes ``total``
    share, other = np.ones(n), np.arange(n).astype(np.int32)
    waiting = np.empty(n, np.int64)
    n_waiting = np.count_nonzero(left < total)
    waiting[:n_waiting] = np.flatnonzero(left < total)
    for giver in np.flatnonzero(left >= total):
        while n_waiting > 0 and left[giver] >= total:
            n_waiting -= 1
            taker = waiting[n_waiting]
            share[taker], other[taker] = left[taker] / total, giver
            left[giver] -= total - left[taker]
        if left[giver] < total:
            waiting[n_waiting] = giver
            n_waiting += 1
    return share, other


@compiled
def _add_closed(keys, offsets, listed, sets, tables, negatives, nearby, marks, merged_offsets, merged):  # type: ignore[no-untyped-def]
    """Draw closed islands for each cell and merge them with its listed ones."""
    out = np.uint64(0)
    for cell in range(len(keys)):
        start, end = np.uint64(offsets[cell]), np.uint64(offsets[cell + 1])
        drawable = tables.drawable[sets[cell]]
        state = mix(keys[cell] ^ _SECOND)
        n_hidden = _mark_listed(start, end, listed, marks)
        wanted, n_drawn = negatives * n_hidden, 0
        near = np.int64(nearby * wanted + 0.5)
        if near > 0:
            state, n_drawn = _draw_nearby(state, near, n_hidden, tables, drawable, marks)
        n_drawn = _draw_by_frequency(state, n_drawn, wanted, tables, drawable, marks)
        _merge(start, end, n_drawn, listed, marks, out, merged)
        out += end - start + np.uint64(n_drawn)
        merged_offsets[cell + 1] = out


@inlined
def _mark_listed(start, end, listed, marks):  # type: ignore[no-untyped-def]
    """Mark the listed islands as taken and write down the hidden ones; returns how many these are."""
    n_hidden, last, bits = np.uint64(0), np.uint64(0), np.uint64(0)
    for i in range(start, end):
        island = np.uint64(listed.islands[i])
        # The word is kept at hand and written each time: reading it back would wait for the last write.
        word = island >> _WORD
        bits = (bits if word == last else np.uint64(0)) | (_ONE << (island & _IN_WORD))
        marks.taken[word] = bits
        last = word
        marks.hidden[n_hidden] = island
        n_hidden += np.uint64(listed.tokens[i] == MASK_TOKEN)
    return np.int64(n_hidden)


@inlined
def _draw_by_frequency(state, n_drawn, wanted, tables, drawable, marks):  # type: ignore[no-untyped-def]
    """Draw islands by their counts, without replacement, until ``wanted`` or all are drawn; returns how many are.

    Draw and reject; where rejections pile up (nearly all that is often open is open here, or not measured), all that
    can be drawn race.
    """
    n_islands = len(tables.counts)
    for _ in range(16 * wanted + 16):
        if n_drawn == wanted:
            return n_drawn
        state += GOLDEN
        place = uniform(state) * n_islands
        island = np.int64(place)
        if place - island >= tables.share[np.uint64(island)]:
            island = np.int64(tables.other[np.uint64(island)])
        n_drawn += _take(island, n_drawn, drawable, marks)
    return _race(state, n_drawn, wanted, 0, tables, drawable, marks)[1]


@inlined
def _draw_nearby(state, wanted, n_hidden, tables, drawable, marks):  # type: ignore[no-untyped-def]
    """Draw so many neighbours of hidden islands, each time of any hidden one and any neighbour of it, or all.

    Returns (state, how many are drawn).
    """
    n_drawn = 0
    for _ in range(16 * wanted + 16):
        if n_drawn == wanted:
            return state, n_drawn
        state += GOLDEN
        pair = np.int64(uniform(state) * (n_hidden * 2 * NEARBY))
        distance = pair % (2 * NEARBY) - NEARBY
        island = marks.hidden[pair // (2 * NEARBY)] + distance + (distance >= 0)
        if 0 <= island < len(tables.counts):
            n_drawn += _take(island, n_drawn, drawable, marks)
    return _race(state, n_drawn, wanted, n_hidden, tables, drawable, marks)


@inlined
def _is_free(island, drawable, marks):  # type: ignore[no-untyped-def]
    """1 for an island that can be drawn, else 0, uint64."""
    word = np.uint64(island) >> _WORD
    return (drawable[word] & ~marks.taken[word]) >> (np.uint64(island) & _IN_WORD) & _ONE


@inlined
def _take(island, n_drawn, drawable, marks):  # type: ignore[no-untyped-def]
    """Draw an island if it can be; returns 1 if it was, else 0. Without a jump: it would be guessed wrong too often."""
    free = _is_free(island, drawable, marks)
    marks.taken[np.uint64(island) >> _WORD] |= free << (np.uint64(island) & _IN_WORD)
    marks.drawn[np.uint64(n_drawn)] = island
    return np.int64(free)


@inlined
def _race(state, n_drawn, wanted, n_hidden, tables, drawable, marks):  # type: ignore[no-untyped-def]
    """Draw islands without rejection until ``wanted`` or all are drawn; returns (state, how many are).

    Exponential variables with the weights as rates, in increasing order, are islands drawn one after another
    without replacement (Efraimidis and Spirakis 2006): the same distribution as draw and reject. Weights are the
    counts, or with ``n_hidden`` above 0 how many hidden islands are neighbours.
    """
    begin, first, behind = n_drawn, 0, 0
    if n_drawn == wanted:
        return state, n_drawn
    for island in range(len(tables.counts)):
        while behind < n_hidden and marks.hidden[behind] <= island + NEARBY:
            behind += 1
        while first < behind and marks.hidden[first] < island - NEARBY:
            first += 1
        rate = behind - first if n_hidden > 0 else tables.counts[island]
        if rate == 0 or not _is_free(island, drawable, marks):
            continue
        state += GOLDEN
        time = -np.log(1.0 - uniform(state)) / rate
        if n_drawn == wanted and time >= marks.times[n_drawn - 1]:
            continue
        n_drawn = min(n_drawn + 1, wanted)
        place = n_drawn - 1
        while place > begin and marks.times[place - 1] > time:
            marks.times[place], marks.drawn[place] = marks.times[place - 1], marks.drawn[place - 1]
            place -= 1
        marks.times[place], marks.drawn[place] = time, island
    for place in range(begin, n_drawn):
        _take(marks.drawn[place], place, drawable, marks)
    return state, n_drawn


@inlined
def _merge(start, end, n_drawn, listed, marks, out, merged):  # type: ignore[no-untyped-def]
    """Write the listed tokens, and MASK on the drawn islands, in order of islands from ``out`` on; clears ``taken``."""
    for word in range(np.uint64(len(marks.taken))):
        marks.before[word] = out
        out += count_ones(marks.taken[word])
    for i in range(start, end):
        place = _place(listed.islands[i], marks)
        merged.islands[place] = listed.islands[i]
        merged.tokens[place] = listed.tokens[i]
        merged.level_targets[place] = listed.level_targets[i]
        merged.open_targets[place] = 1 if listed.tokens[i] == MASK_TOKEN else NOT_COUNTED
    for i in range(np.uint64(n_drawn)):
        place = _place(marks.drawn[i], marks)
        merged.islands[place] = marks.drawn[i]
        merged.tokens[place] = MASK_TOKEN
        merged.level_targets[place] = NOT_COUNTED
        merged.open_targets[place] = 0
    for word in range(np.uint64(len(marks.taken))):
        marks.taken[word] = 0


@inlined
def _place(island, marks):  # type: ignore[no-untyped-def]
    """Where a taken island comes in the merged row: behind all of lower numbers."""
    word = np.uint64(island) >> _WORD
    below = (_ONE << (np.uint64(island) & _IN_WORD)) - _ONE
    return marks.before[word] + count_ones(marks.taken[word] & below)
