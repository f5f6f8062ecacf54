"""The cells that a rank holds: windows are read ahead of the batches that need them, and held encoded.

A table has a slot for each cell that is held; windows fill slots and batches empty them (stream/order.py). What fills a
slot is the address of the cell's bytes: rows are decoded when their batch is made.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, pairwise
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from annatac_scale.memory import keep_freed_memory
from annatac_scale.store.encoded_rows import EncodedRows
from annatac_scale.store.schema import SHARD_BLOCKS
from annatac_scale.store.store import Sample
from annatac_scale.stream.buffers import Buffer, BufferPool
from annatac_scale.stream.order import EpochPlan, Load, RankPlan, Run
from annatac_scale.stream.selection import Selection

Ints = NDArray[np.int64]

_PIECE_CELLS = 125
"""Cells whose memory goes at once: of a window of 2,000 there are 17/32 on average."""


class _Piece(NamedTuple):
    """A run of a window, ``position`` of its runs, and where it lies: block: counted in the sample"""

    position: int
    run: Run
    sample: Sample
    block: int
    first_cell: int


class _Cells(NamedTuple):
    """The cells of a run and their rows. position: of the window's runs; ids: int64"""

    position: int
    ids: Ints
    rows: EncodedRows


class RankReader:
    """Reads what the steps of a rank need, from ``first_step`` on.

    threads: that read and decompress; with object storage behind them they mostly wait
    ahead: blocks that are read before a step needs them, and at least one window
    buffers: where the memory of the cells that are held comes from, and goes
    """

    def __init__(
        self,
        selection: Selection,
        plan: EpochPlan,
        ranks: RankPlan,
        first_step: int,
        threads: int,
        ahead: int,
        buffers: BufferPool,
    ) -> None:
        self._selection, self._plan, self._ranks = selection, plan, ranks
        self._ahead = ahead
        self._loads = deque(ranks.loads(first_step))
        self._coming: deque[tuple[Load, list[Future[list[_Cells]]]]] = deque()
        self._buffers = buffers
        self._held: dict[int, list[Buffer]] = {}
        self._step = first_step
        self._ids = np.zeros(ranks.n_slots, np.int64)
        self._addresses = np.zeros(ranks.n_slots, np.int64)
        self._sizes = np.zeros(ranks.n_slots, np.int64)
        self._pool = ThreadPoolExecutor(threads, "island-stream-read")
        keep_freed_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        for last_step in list(self._held):
            self._let_go(last_step)

    def batch(self, step: int) -> tuple[Ints, EncodedRows]:
        """Ids (int64) and rows of the cells of a step. The rows are there until the next call, for a later step."""
        for done in range(self._step, step):
            self._let_go(done)
        self._step = step
        self._read_ahead()
        while self._coming and self._coming[0][0].step <= step:
            load, tasks = self._coming.popleft()
            self._fill(load, [part for task in tasks for part in task.result()])
            self._read_ahead()
        slots = self._ranks.slots(step)
        return self._ids[slots], EncodedRows(self._addresses[slots], self._sizes[slots], (self,))

    def _let_go(self, last_step: int) -> None:
        for buffer in self._held.pop(last_step, ()):
            self._buffers.give_back(buffer)

    def _read_ahead(self) -> None:
        while self._loads and sum(len(tasks) for _, tasks in self._coming) < self._ahead:
            load = self._loads.popleft()
            groups = self._adjacent(self._plan.runs(load.window))
            self._coming.append((load, [self._pool.submit(self._read, group) for group in groups]))

    def _adjacent(self, runs: Sequence[Run]) -> Iterator[list[_Piece]]:
        """Runs of a window in groups of blocks of one shard, which the store reads in as few requests as it can."""
        pieces = [
            _Piece(position, run, *self._selection.block(run.block)) for position, run in enumerate(runs)
        ]
        pieces.sort(key=lambda piece: (piece.sample.first_cell, piece.block))
        for _, group in groupby(pieces, lambda piece: (piece.sample.first_cell, piece.block // SHARD_BLOCKS)):
            yield list(group)

    def _read(self, pieces: Sequence[_Piece]) -> list[_Cells]:
        """Read pieces of one sample."""
        rows = pieces[0].sample.read_rows([piece.block for piece in pieces])
        found = []
        for piece, whole in zip(pieces, rows, strict=True):
            run = piece.run
            ids = self._selection.ids(run.block, run.start, run.stop, self._plan.epoch)
            found.append(_Cells(piece.position, ids, whole.take(ids - piece.first_cell)))
        return found

    def _fill(self, load: Load, parts: Sequence[_Cells]) -> None:
        """Put a window's cells into the table, their rows copied in the order in which they leave it.

        So a window's memory goes piece by piece, as its cells do, and on average little more than half of it is held.
        """
        parts = sorted(parts, key=lambda part: part.position)
        steps = self._ranks.steps_of(load)
        taken = steps >= load.step
        steps, slots = steps[taken], self._ranks.slots_of(load)[taken]
        order = self._plan.permutation(load.window)[taken]
        self._ids[slots] = np.concatenate([part.ids for part in parts])[order]
        rows = EncodedRows.concatenate([part.rows for part in parts]).take(order)
        n_pieces = -(-len(order) // _PIECE_CELLS)
        bounds = np.linspace(0, len(order), n_pieces + 1).astype(np.int64).tolist()
        for start, stop in pairwise(bounds):
            piece = rows[start:stop]
            buffer = self._buffers.take(int(piece.sizes.sum()))
            packed = EncodedRows.of_bytes(*piece.packed(buffer))
            self._addresses[slots[start:stop]] = packed.addresses
            self._sizes[slots[start:stop]] = packed.sizes
            self._held.setdefault(int(steps[stop - 1]), []).append(buffer)
