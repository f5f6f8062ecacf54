"""The order of cells: which cells make up batch ``step`` of an epoch on a rank. Pure arithmetic, no store.

An epoch lays all blocks end to end in a random order: its *line* of cells. The line is cut into C *lanes* of
equal length, each lane into *windows* of whole blocks (but for a block that two lanes share), and the cells
of a window are permuted. Each global batch takes the next r = global_batch / C cells of every lane:

    lane 0  |   window   |   window   |   window   |   step 0 takes the first r cells of every lane,
    lane 1  | window |   window   |  window    |  .|   step 1 the next r cells, ...

Lanes are dealt round robin to the ranks. Where a line is no longer than one window for each lane, the line is
one window as a whole: its permutation is cut into global batches, and these into even parts for the ranks.

Everything follows from (seed, epoch): not from ranks, threads or what ran before. Permutations sort raw words
of Philox, whose stream numpy promises to keep; it does not promise that of ``Generator.permutation``.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import ConfigError

Ints = NDArray[np.int64]

_BLOCKS, _CELLS = 0, 1
"""What a permutation is of: part of its random key."""


@dataclass(frozen=True)
class Window:
    """Cells ``start`` to ``stop`` of an epoch's line: read together and permuted together."""

    start: int
    stop: int


@dataclass(frozen=True)
class Load:
    """A window that a rank needs from ``step`` on; lane: counted over the rank's lanes."""

    step: int
    window: Window
    lane: int


@dataclass(frozen=True)
class Run:
    """Cells ``start`` to ``stop`` of a block."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The order of cells of every epoch.

    block_sizes: int64 [n_blocks], cells of each block that take part, in the order of cells
    global_batch: G, cells of a step over all ranks
    lanes: C, divides G; ranks can be no more
    window_cells: cells that a lane shuffles among each other, give or take a block

    Raises ConfigError where these do not fit together.
    """

    block_sizes: Ints
    global_batch: int
    seed: int
    lanes: int
    window_cells: int

    def __post_init__(self) -> None:
        for name in ("global_batch", "lanes", "window_cells"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed = {self.seed}: expected at least 0")
        if self.global_batch % self.lanes:
            divisors = [n for n in range(1, self.global_batch + 1) if self.global_batch % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - self.lanes))[:4])
            raise ConfigError(
                f"lanes = {self.lanes} does not divide the global batch of {self.global_batch}: choose lanes "
                f"among {', '.join(map(str, near))}, or a global batch that is a multiple of {self.lanes}"
            )

    @cached_property
    def n_cells(self) -> int:
        """Cells of an epoch: each comes exactly once."""
        return int(self.block_sizes.sum())

    @property
    def n_steps(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return -(-self.n_cells // self.global_batch)

    def check_ranks(self, rank: int, world_size: int) -> None:
        """Raise ConfigError where there is no such rank, or there are more ranks than lanes."""
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"rank = {rank}: expected 0 to {world_size - 1}, for a world size of {world_size}"
            )
        if world_size > self.lanes:
            raise ConfigError(
                f"world size {world_size} is more than the {self.lanes} lanes: choose fewer ranks, or "
                f"{world_size} or more lanes that divide the global batch of {self.global_batch}"
            )

    def epoch(self, epoch: int) -> "EpochPlan":
        """The plan of an epoch, int >= 0."""
        return EpochPlan(self, epoch)


class EpochPlan:
    """The order of one epoch. Cheap to make: one permutation of the blocks."""

    def __init__(self, order: EpochOrder, epoch: int) -> None:
        self.order = order
        self.epoch = epoch
        filled = np.flatnonzero(order.block_sizes)
        self._blocks = filled[_permutation(len(filled), order.seed, epoch, _BLOCKS)]
        self._line = _offsets(order.block_sizes[self._blocks])
        lanes = 1 if self.is_one_window else order.lanes
        self.lane_starts = order.n_cells * np.arange(lanes + 1) // lanes

    @property
    def is_one_window(self) -> bool:
        """Whether all cells are permuted together because lanes would hold a window each, or less."""
        return self.order.n_cells <= self.order.lanes * self.order.window_cells

    @cached_property
    def windows(self) -> list[Ints]:
        """For each lane the bounds of its windows on the line, int64 increasing."""
        if self.is_one_window:
            return [np.array([0, self.order.n_cells], np.int64)]
        return [self._lane_windows(lane) for lane in range(self.order.lanes)]

    def _lane_windows(self, lane: int) -> Ints:
        start, stop = self.lane_starts[lane : lane + 2]
        inside = self._line[(self._line > start) & (self._line < stop)]
        bounds = np.concatenate([[start], inside])
        # Lanes start at different phases of a window, so that they do not all read at the same step.
        phase = lane * self.order.window_cells // self.order.lanes
        number = (bounds - start + phase) // self.order.window_cells
        opens = np.concatenate([[True], number[1:] != number[:-1]])
        return np.concatenate([bounds[opens], [stop]])

    def of_rank(self, rank: int = 0, world_size: int = 1) -> "RankPlan":
        """What a rank reads, and when. Raises ConfigError where there is no such rank, or more ranks than lanes."""
        self.order.check_ranks(rank, world_size)
        return (WholePlan if self.is_one_window else LanesPlan)(self, rank, world_size)

    def permutation(self, window: Window) -> Ints:
        """The order of a window's cells, int64 [stop - start], counted from its start."""
        return _permutation(window.stop - window.start, self.order.seed, self.epoch, _CELLS, window.start)

    def runs(self, window: Window) -> list[Run]:
        """The parts of blocks that make up a window, in the order of the line."""
        first = int(np.searchsorted(self._line, window.start, side="right")) - 1
        last = int(np.searchsorted(self._line, window.stop, side="left"))
        return [
            Run(
                int(self._blocks[i]),
                max(window.start - int(self._line[i]), 0),
                min(window.stop, int(self._line[i + 1])) - int(self._line[i]),
            )
            for i in range(first, last)
        ]

    def cells(self, window: Window) -> Ints:
        """Cells of a window in their permuted order, int64, counted over all blocks in the order of ``block_sizes``."""
        first = _offsets(self.order.block_sizes)
        runs = self.runs(window)
        line = [np.arange(first[run.block] + run.start, first[run.block] + run.stop) for run in runs]
        return np.concatenate(line)[self.permutation(window)]


class RankPlan(Protocol):
    """What a rank reads and when: it keeps a table of cells, in which windows fill slots and batches empty them.

    A slot is filled again only after the step that took what was in it.
    """

    n_slots: int

    def loads(self, first_step: int = 0) -> list[Load]:
        """The windows that the steps from ``first_step`` on need, in the order in which they need them."""

    def slots_of(self, load: Load) -> Ints:
        """Where the cells of a window go in the table, in their permuted order: int64."""

    def steps_of(self, load: Load) -> Ints:
        """The step that takes each of these cells, int64, never falling; -1 for cells that other ranks take."""

    def slots(self, step: int) -> Ints:
        """The slots that a batch takes, in the order of its rows: int64."""


class LanesPlan:
    """As RankPlan, of an order in lanes: each of the rank's lanes owns a ring of slots."""

    def __init__(self, plan: EpochPlan, rank: int, world_size: int) -> None:
        order = plan.order
        lanes = slice(rank, order.lanes, world_size)
        self._windows = plan.windows[lanes]
        self._starts = plan.lane_starts[:-1][lanes]
        self._lengths = np.diff(plan.lane_starts)[lanes]
        self._share = order.global_batch // order.lanes
        # Of a lane are held: what is left of a batch's share, and the widest window that begins in it.
        self._ring = self._share + max(int(np.diff(windows).max()) for windows in self._windows)
        self.n_slots = self._ring * len(self._windows)

    def loads(self, first_step: int = 0) -> list[Load]:
        """As in RankPlan."""
        found = []
        for lane, windows in enumerate(self._windows):
            positions = windows - self._starts[lane]
            steps = np.maximum(positions[:-1] // self._share, first_step)
            last_steps = (positions[1:] - 1) // self._share
            for number in np.flatnonzero(last_steps >= first_step):
                window = Window(int(windows[number]), int(windows[number + 1]))
                found.append(Load(int(steps[number]), window, lane))
        return sorted(found, key=lambda load: (load.step, load.lane))

    def slots_of(self, load: Load) -> Ints:
        """As in RankPlan."""
        return load.lane * self._ring + self._positions(load) % self._ring

    def steps_of(self, load: Load) -> Ints:
        """As in RankPlan."""
        return self._positions(load) // self._share

    def _positions(self, load: Load) -> Ints:
        """Places of a window's cells in their lane."""
        positions: Ints = np.arange(load.window.start, load.window.stop) - self._starts[load.lane]
        return positions

    def slots(self, step: int) -> Ints:
        """As in RankPlan."""
        positions = step * self._share + np.arange(self._share)
        slots = np.arange(len(self._starts))[:, None] * self._ring + positions % self._ring
        return slots[positions < self._lengths[:, None]]


class WholePlan:
    """As RankPlan, of an order that is one window: each rank keeps all of it."""

    def __init__(self, plan: EpochPlan, rank: int, world_size: int) -> None:
        self._order, self._rank, self._world_size = plan.order, rank, world_size
        self.n_slots = plan.order.n_cells

    def loads(self, first_step: int = 0) -> list[Load]:
        """As in RankPlan."""
        return [Load(first_step, Window(0, self.n_slots), 0)] if first_step < self._order.n_steps else []

    def slots_of(self, load: Load) -> Ints:
        """As in RankPlan."""
        return np.arange(load.window.start, load.window.stop)

    def steps_of(self, load: Load) -> Ints:
        """As in RankPlan."""
        steps, place = np.divmod(np.arange(self.n_slots), self._order.global_batch)
        first, last = self._own(steps)
        return np.where((place >= first) & (place < last), steps, -1)

    def slots(self, step: int) -> Ints:
        """As in RankPlan."""
        first, last = self._own(np.array([step]))
        return step * self._order.global_batch + np.arange(first[0], last[0])

    def _own(self, steps: Ints) -> tuple[Ints, Ints]:
        """From where to where global batches are this rank's."""
        sizes = np.minimum(self._order.global_batch, self.n_slots - steps * self._order.global_batch)
        return sizes * self._rank // self._world_size, sizes * (self._rank + 1) // self._world_size


def default_lanes(global_batch: int) -> int:
    """The divisor of the global batch nearest to 36 by ratio: 36 for 900, 32 for the larger powers of two."""
    divisors = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
    return min(divisors, key=lambda n: max(n / 36, 36 / n))


def _permutation(size: int, seed: int, *key: int) -> Ints:
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(size)
    return np.argsort(words, kind="stable")


def _offsets(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
