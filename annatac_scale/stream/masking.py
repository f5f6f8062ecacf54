"""Which tokens of a cell are hidden, and what the model is asked about them.

Of a cell's n open islands ``ceil(n * fraction)`` are chosen (in float32, as the published code computes it).
They are dealt out evenly over the levels present; what a rare level cannot take goes to the others (the
published code loses it). Random numbers come from splitmix64 keyed by (seed, epoch, cell id), inside the
kernels: a cell's mask depends on nothing else, not on its batch, nor on ranks or threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from annatac_scale.errors import ConfigError
from annatac_scale.store.schema import N_LEVELS
from annatac_scale.stream.batch import MASK_TOKEN, NOT_COUNTED, Batch

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MaskingOptions:
    """What to hide. Raises ConfigError where a value is out of range.

    fraction: share of a cell's open islands that are chosen
    keep: share of the chosen that stay visible (the loss counts them all the same)
    level_cap: at most this share of a level's islands in a cell is chosen, rounded down: with 0.5 a level of
        which the cell has one island is passed over, and a cell that has no level twice gets nothing hidden
    negatives: also hide as many measured closed islands, and ask of all hidden ones whether they are open
    """

    fraction: float = 0.15
    keep: float = 0.1
    level_cap: float = 1.0
    negatives: bool = False

    def __post_init__(self) -> None:
        for name, value in (("fraction", self.fraction), ("level_cap", self.level_cap)):
            if not 0 < value <= 1:
                raise ConfigError(f"masking {name} = {value}: expected more than 0 and at most 1")
        if not 0 <= self.keep < 1:
            raise ConfigError(f"masking keep = {self.keep}: expected at least 0 and less than 1")


class _Tables(NamedTuple):
    """What the kernel draws closed islands from.

    cumulative: float64 [N], running sum of the open counts
    guide: int32 [N], guide[k] = the first island whose running sum exceeds k / N of the whole
    measured: bool [U, N], the distinct sets of measured islands
    """

    cumulative: Floats
    guide: NDArray[np.int32]
    measured: NDArray[np.bool_]


class _Tokens(NamedTuple):
    """The flat arrays of a batch, as Batch has them."""

    islands: NDArray[np.int32]
    tokens: NDArray[np.uint8]
    level_targets: NDArray[np.int16]
    open_targets: NDArray[np.int16]


class ClosedSampler:
    """Draws closed islands by how often they are open in other cells.

    open_counts: int [N], cells in which each island (numbered as in the batches) is open; 0 is never drawn
    measured: for each sample of the store its measured islands, int32, increasing
    first_cells: int64, for each sample the cell id of its first row

    Raises ValueError when no island is open in any cell: there is nothing to draw by.
    """

    def __init__(
        self, open_counts: NDArray[np.integer], measured: Sequence[NDArray[np.int32]], first_cells: Ints
    ) -> None:
        if not np.any(open_counts):
            raise ValueError("no island is open in any cell: closed islands cannot be drawn by frequency")
        n_islands = len(open_counts)
        cumulative = np.cumsum(open_counts, dtype=np.float64)
        steps = np.arange(n_islands) / n_islands * cumulative[-1]
        guide = np.searchsorted(cumulative, steps, side="right").astype(np.int32)
        # Samples of one experiment mostly share a peak set: one row of the table for all of them.
        numbers: dict[bytes, int] = {}
        self._set_of_sample = np.array(
            [numbers.setdefault(islands.tobytes(), len(numbers)) for islands in measured], np.int64
        )
        sets = np.zeros((len(numbers), n_islands), np.bool_)
        for number, islands in zip(self._set_of_sample, measured, strict=True):
            sets[number, islands] = True
        self.tables = _Tables(cumulative, guide, sets)
        self._first_cells = np.asarray(first_cells, np.int64)

    def sets(self, cell_ids: Ints) -> Ints:
        """Row of ``tables.measured`` for each cell, int64 [B]."""
        return self._set_of_sample[np.searchsorted(self._first_cells, cell_ids, side="right") - 1]


def mask(
    batch: Batch, seed: int, epoch: int, options: MaskingOptions, sampler: ClosedSampler | None = None
) -> Batch:
    """The batch with some open islands hidden, and the targets of what was chosen.

    Goes before ``Batch.with_closed``: closed islands are never chosen, and no listed one becomes a negative.
    ``level_targets`` hold level - 1 at all chosen positions, also at those that stay visible.
    With ``options.negatives`` (which needs a sampler) each cell gets as many MASK tokens on closed islands as
    it has on open ones, or all that can be drawn where these are fewer; ``open_targets`` are 1 at hidden open
    islands, 0 at the added ones and -100 elsewhere.
    """
    if options.negatives and sampler is None:
        raise ValueError("masking with negatives needs a ClosedSampler")
    tokens = batch.tokens.copy()
    targets = np.full(len(tokens), NOT_COUNTED, np.int16)
    keys = _keys(batch.cell_ids, np.uint64(seed % 2**64), np.uint64(epoch))
    _hide_open(
        keys, batch.offsets, tokens, targets, np.float32(options.fraction), options.keep, options.level_cap
    )
    hidden = replace(batch, tokens=tokens, level_targets=targets)
    if sampler is None or not options.negatives:
        return hidden
    return _with_negatives(hidden, keys, sampler)


def _with_negatives(batch: Batch, keys: NDArray[np.uint64], sampler: ClosedSampler) -> Batch:
    """Add MASK tokens on closed islands to a batch whose open ones are hidden."""
    if len(batch.islands) and batch.islands.max() >= len(sampler.tables.cumulative):
        raise ValueError("the sampler counts fewer islands than the batch has: they differ in vocabulary")
    drawn = np.empty(np.count_nonzero(batch.tokens == MASK_TOKEN), np.int32)
    drawn_offsets = np.zeros(len(batch.offsets), np.int64)
    sets = sampler.sets(batch.cell_ids)
    _draw_closed(keys, batch.offsets, batch.islands, batch.tokens, sets, sampler.tables, drawn_offsets, drawn)
    assert batch.level_targets is not None
    listed = _Tokens(batch.islands, batch.tokens, batch.level_targets, np.empty(0, np.int16))
    size = len(batch.tokens) + drawn_offsets[-1]
    merged = _Tokens(
        np.empty(size, np.int32), np.empty(size, np.uint8), np.empty(size, np.int16), np.empty(size, np.int16)
    )
    _merge(batch.offsets, listed, drawn_offsets, drawn, merged)
    return Batch(batch.cell_ids, batch.offsets + drawn_offsets, *merged, obs=batch.obs)


# splitmix64 (Steele, Lea, Flood 2014): the i-th number of a key is mix(key + i * GOLDEN).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SECOND = np.uint64(0xD1B54A32D192ED03)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@njit(nogil=True, cache=True)
def _mix(z: np.uint64) -> np.uint64:
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@njit(nogil=True, cache=True)
def _uniform(state: np.uint64) -> float:
    """A multiple of 2^-53 in [0, 1): times an integer below 2^52 it stays below that integer."""
    return np.float64(_mix(state) >> _S11) * 2.0**-53


@njit(nogil=True, cache=True)
def _keys(cell_ids: Ints, seed: np.uint64, epoch: np.uint64) -> NDArray[np.uint64]:
    """Where each cell's random numbers start, uint64 [B]."""
    keys = np.empty(len(cell_ids), np.uint64)
    base = _mix(_mix(seed + _GOLDEN) ^ (epoch + _GOLDEN))
    for i in range(len(cell_ids)):
        keys[i] = _mix(base ^ _mix(np.uint64(cell_ids[i]) + _GOLDEN))
    return keys


@njit(nogil=True, cache=True)
def _deal(capacity: Ints, wanted: np.int64, quota: Ints) -> None:
    """Deal ``wanted`` one by one round the levels, the largest first, passing over those that are full."""
    order = np.argsort(-capacity, kind="mergesort")
    left = min(wanted, capacity.sum())
    quota[:] = 0
    while left > 0:
        share = max(1, left // np.count_nonzero(quota < capacity))
        for level in order:
            given = min(share, capacity[level] - quota[level], left)
            quota[level] += given
            left -= given


@njit(nogil=True, cache=True)
def _hide_open(
    keys: NDArray[np.uint64],
    offsets: Ints,
    tokens: NDArray[np.uint8],
    targets: NDArray[np.int16],
    fraction: np.float32,
    keep: float,
    level_cap: float,
) -> None:
    """Choose and hide open islands of every cell in ``tokens`` and write their ``targets``."""
    present = np.empty(N_LEVELS, np.int64)
    quota = np.empty(N_LEVELS, np.int64)
    for cell in range(len(keys)):
        row = range(offsets[cell], offsets[cell + 1])
        present[:] = 0
        for i in row:
            if 1 <= tokens[i] <= N_LEVELS:
                present[tokens[i] - 1] += 1
        wanted = np.int64(np.ceil(np.float32(present.sum()) * fraction))
        _deal(np.floor(present * level_cap).astype(np.int64), wanted, quota)
        state = keys[cell]
        # Without replacement in one pass: an island is taken with probability wanted / left of its level.
        for i in row:
            if not 1 <= tokens[i] <= N_LEVELS:
                continue
            level = tokens[i] - 1
            state += _GOLDEN
            if _uniform(state) * present[level] < quota[level]:
                quota[level] -= 1
                targets[i] = level
                state += _GOLDEN
                if _uniform(state) >= keep:
                    tokens[i] = MASK_TOKEN
            present[level] -= 1


@njit(nogil=True, cache=True)
def _draw_closed(
    keys: NDArray[np.uint64],
    offsets: Ints,
    islands: NDArray[np.int32],
    tokens: NDArray[np.uint8],
    sets: Ints,
    tables: _Tables,
    drawn_offsets: Ints,
    drawn: NDArray[np.int32],
) -> None:
    """Draw for each cell as many closed islands as it has MASK tokens; sorted rows of ``drawn``."""
    taken = np.zeros(len(tables.cumulative), np.int32)
    end = 0
    for cell in range(len(keys)):
        wanted = 0
        for i in range(offsets[cell], offsets[cell + 1]):
            taken[islands[i]] = cell + 1
            if tokens[i] == MASK_TOKEN:
                wanted += 1
        start = end
        state = _mix(keys[cell] ^ _SECOND)
        measured = tables.measured[sets[cell]]
        # Draw and reject. Where rejections pile up (nearly all is open or unmeasured) the exact way finishes.
        for _ in range(16 * wanted + 16):
            if end - start == wanted:
                break
            state += _GOLDEN
            island = _draw(_uniform(state), tables)
            if measured[island] and taken[island] != cell + 1:
                taken[island] = cell + 1
                drawn[end] = island
                end += 1
        if end - start < wanted:
            rest = _draw_rest(state, start + wanted - end, tables, measured, taken, cell + 1)
            drawn[end : end + len(rest)] = rest
            end += len(rest)
        drawn[start:end].sort()
        drawn_offsets[cell + 1] = end


@njit(nogil=True, cache=True)
def _draw(uniform: float, tables: _Tables) -> int:
    """One island by its count: the first whose running sum exceeds ``uniform`` of the whole."""
    threshold = uniform * tables.cumulative[-1]
    island = tables.guide[int(uniform * len(tables.guide))]
    while tables.cumulative[island] <= threshold:
        island += 1
    return island


@njit(nogil=True, cache=True)
def _draw_rest(
    state: np.uint64,
    wanted: int,
    tables: _Tables,
    measured: NDArray[np.bool_],
    taken: NDArray[np.int32],
    mark: int,
) -> Ints:
    """Draw ``wanted`` of the islands that are measured and not taken, or all of them, without rejection.

    Exponential variables with the weights as rates, in increasing order, are islands drawn one after another
    without replacement (Efraimidis and Spirakis 2006): the same distribution as draw and reject.
    """
    free = np.empty(len(measured), np.int64)
    times = np.empty(len(measured), np.float64)
    n_free, below = 0, 0.0
    for island in range(len(measured)):
        weight = tables.cumulative[island] - below
        below = tables.cumulative[island]
        if weight > 0 and measured[island] and taken[island] != mark:
            state += _GOLDEN
            free[n_free] = island
            times[n_free] = -np.log(1.0 - _uniform(state)) / weight
            n_free += 1
    return free[np.argsort(times[:n_free])[:wanted]]


@njit(nogil=True, cache=True)
def _merge(
    offsets: Ints, listed: _Tokens, drawn_offsets: Ints, drawn: NDArray[np.int32], merged: _Tokens
) -> None:
    """Merge each cell's listed tokens with MASK on its drawn islands, and set the open targets."""
    out = 0
    for cell in range(len(offsets) - 1):
        i, end = offsets[cell], offsets[cell + 1]
        for j in range(drawn_offsets[cell], drawn_offsets[cell + 1]):
            while i < end and listed.islands[i] < drawn[j]:
                _copy(listed, i, merged, out)
                i, out = i + 1, out + 1
            merged.islands[out] = drawn[j]
            merged.tokens[out] = MASK_TOKEN
            merged.level_targets[out] = NOT_COUNTED
            merged.open_targets[out] = 0
            out += 1
        for rest in range(i, end):
            _copy(listed, rest, merged, out)
            out += 1


@njit(nogil=True, cache=True)
def _copy(listed: _Tokens, source: int, merged: _Tokens, target: int) -> None:
    merged.islands[target] = listed.islands[source]
    merged.tokens[target] = listed.tokens[source]
    merged.level_targets[target] = listed.level_targets[source]
    merged.open_targets[target] = 1 if listed.tokens[source] == MASK_TOKEN else NOT_COUNTED
