"""Which tokens of a cell are hidden, and what the model is asked about them.

Of a cell's n open islands ``ceil(n * fraction)`` are chosen (in float32, as the published code computes it).
They are dealt out evenly over the levels present; what a rare level cannot take goes to the others (the
published code loses it). Random numbers come from splitmix64 keyed by (seed, epoch, cell id), inside the
kernels: a cell's mask depends on nothing else, not on its batch, nor on ranks or threads. Where weights give a cell
several turns in an epoch, or a batch lists it twice, it is masked alike each time; the next epoch masks it otherwise.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import ConfigError
from annatac_scale.store.compiled import compiled, inlined
from annatac_scale.store.schema import N_LEVELS
from annatac_scale.stream.batch import MASK_TOKEN, NOT_COUNTED, Batch
from annatac_scale.stream.negatives import ClosedSampler, with_negatives
from annatac_scale.stream.splitmix import GOLDEN, cell_keys, uniform


@dataclass(frozen=True)
class MaskingOptions:
    """What to hide. Raises ConfigError where a value is out of range.

    fraction: share of a cell's open islands that are chosen
    keep: share of the chosen that stay visible (the loss counts them all the same)
    level_cap: at most this share of a level's islands in a cell is chosen, rounded down: with 0.5 a level of
        which the cell has one island is passed over, and a cell that has no level twice gets nothing hidden
    negatives: for each hidden open island hide so many measured closed ones too, and ask of all hidden ones whether
        they are open
    nearby: share of a cell's negatives, rounded, drawn not by frequency but from the neighbours of its hidden
        islands, those whose numbers differ by at most 8; where there are too few, the rest is drawn by frequency
    """

    fraction: float = 0.15
    keep: float = 0.1
    level_cap: float = 1.0
    negatives: int = 0
    nearby: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("fraction", self.fraction), ("level_cap", self.level_cap)):
            if not 0 < value <= 1:
                raise ConfigError(f"masking {name} = {value}: expected more than 0 and at most 1")
        if not 0 <= self.keep < 1:
            raise ConfigError(f"masking keep = {self.keep}: expected at least 0 and less than 1")
        if self.negatives < 0:
            raise ConfigError(f"masking negatives = {self.negatives}: expected a number of islands from 0 on")
        if not 0 <= self.nearby <= 1:
            raise ConfigError(f"masking nearby = {self.nearby}: expected at least 0 and at most 1")


def mask(
    batch: Batch, seed: int, epoch: int, options: MaskingOptions, sampler: ClosedSampler | None = None
) -> Batch:
    """The batch with some open islands hidden, and the targets of what was chosen.

    Goes before ``Batch.with_closed``: closed islands are never chosen, and no listed one becomes a negative.
    ``level_targets`` hold level - 1 at all chosen positions, also at those that stay visible.
    With ``options.negatives`` = n (which needs a sampler) each cell gets n MASK tokens on closed islands for each
    that it has on open ones, or all that can be drawn where these are fewer; ``open_targets`` are 1 at hidden
    open islands, 0 at the added ones and -100 elsewhere.
    """
    if options.negatives and sampler is None:
        raise ValueError("masking with negatives needs a ClosedSampler")
    tokens = batch.tokens.copy()
    targets = np.full(len(tokens), NOT_COUNTED, np.int16)
    keys = cell_keys(batch.cell_ids, seed, epoch)
    longest = int(np.diff(batch.offsets).max(initial=0))
    work = _Work(np.empty(longest, np.int32), *np.empty((4, _N_TOKENS), np.int64))
    rule = _Rule(np.float32(options.fraction), options.keep, options.level_cap)
    _hide_open(keys, batch.offsets, tokens, targets, rule, work)
    hidden = replace(batch, tokens=tokens, level_targets=targets)
    if sampler is None or not options.negatives:
        return hidden
    return with_negatives(hidden, keys, sampler, options.negatives, options.nearby)


_N_TOKENS = 8
"""Tokens 0 to 6, and one more: a power of two."""


class _Rule(NamedTuple):
    """What MaskingOptions say of open islands, as the kernel takes it."""

    fraction: np.float32
    keep: float
    level_cap: float


class _Work(NamedTuple):
    """Room that the kernel works in.

    places: int32 [longest row], places in the row, grouped by token
    first, held, room, quota: int64 [8], for each token where its group begins, how many places it has, how many may
        and how many are to be chosen
    """

    places: NDArray[np.int32]
    first: NDArray[np.int64]
    held: NDArray[np.int64]
    room: NDArray[np.int64]
    quota: NDArray[np.int64]


@compiled
def _hide_open(keys, offsets, tokens, targets, rule, work):  # type: ignore[no-untyped-def]
    """Choose and hide open islands of every cell in ``tokens`` and write their ``targets``."""
    for cell in range(len(keys)):
        start, end = offsets[cell], offsets[cell + 1]
        _group(start, end, tokens, work.places, work.first, work.held)
        _set_quotas(work.held, rule, work.room, work.quota)
        state = keys[cell]
        for token in range(1, N_LEVELS + 1):
            first, n = work.first[token], work.held[token]
            # The first steps of a shuffle: each place that is left is as likely as any other.
            for chosen in range(work.quota[token]):
                state += GOLDEN
                other = first + chosen + np.int64(uniform(state) * (n - chosen))
                place = start + work.places[other]
                work.places[other] = work.places[first + chosen]
                targets[place] = token - 1
                state += GOLDEN
                if uniform(state) >= rule.keep:
                    tokens[place] = MASK_TOKEN


@inlined
def _group(start, end, tokens, places, first, held):  # type: ignore[no-untyped-def]
    """Write the places of a row's tokens, grouped by token, in the order of the row within a group."""
    seven = np.uint8(_N_TOKENS - 1)
    for token in range(_N_TOKENS):
        held[token] = 0
    for i in range(start, end):
        held[tokens[i] & seven] += 1
    below = 0
    for token in range(_N_TOKENS):
        first[token] = below
        below += held[token]
    for i in range(start, end):
        token = tokens[i] & seven
        places[first[token]] = i - start
        first[token] += 1
    for token in range(_N_TOKENS):
        first[token] -= held[token]


@inlined
def _set_quotas(held, rule, room, quota):  # type: ignore[no-untyped-def]
    """How many of each level are chosen: as if dealt one by one round the levels, the largest first.

    Levels that are not full hold as many as each other: the deal goes up like water, until fewer are left to deal than
    levels have room.
    """
    n_open, with_room = 0, 0
    for token in range(1, N_LEVELS + 1):
        n_open += held[token]
        room[token] = np.int64(held[token] * rule.level_cap)
        with_room += room[token] > 0
    left, depth = np.int64(np.ceil(np.float32(n_open) * rule.fraction)), 0
    while left >= with_room > 0:
        more, with_room = left // with_room, 0
        for token in range(1, N_LEVELS + 1):
            left -= min(room[token], depth + more) - min(room[token], depth)
            with_room += room[token] > depth + more
        depth += more
    for token in range(1, N_LEVELS + 1):
        quota[token] = min(room[token], depth)
    for _ in range(min(left, with_room)):
        largest = 0
        for token in range(1, N_LEVELS + 1):
            if quota[token] == depth < room[token] and (largest == 0 or room[token] > room[largest]):
                largest = token
        quota[largest] += 1
