"""The cells that a rank holds: windows are read ahead of the batches that need them, and held encoded.

A table has a slot for each cell that is held; windows fill slots and batches empty them (stream/order.py). What fills a
slot is the address of the cell's bytes: rows are decoded when their batch is made.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from itertools import groupby, pairwise
from threading import Event
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from annatac_scale.memory import keep_freed_memory
from annatac_scale.store.encoded_rows import EncodedRows
from annatac_scale.store.schema import SHARD_BLOCKS
from annatac_scale.store.store import Sample
from annatac_scale.stream.buffers import Buffer, BufferPool
from annatac_scale.stream.order import EpochPlan, Load, RankPlan, Run, Window
from annatac_scale.stream.selection import Selection

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_LOOK_EVERY_S = 0.2
_PATIENCE_S = 5.0
"""How long the end of a stream waits for reads that are under way; they end by themselves later."""

_PIECE_CELLS = 125
"""Cells whose memory goes at once: of a window of 2,000 there are 17/32 on average."""


class _Piece(NamedTuple):
    """A run of a window, ``position`` of its runs, and where it lies.

    needed: bool, which of its cells the rank takes; block: counted in the sample
    """

    position: int
    run: Run
    needed: Bools
    sample: Sample
    block: int
    first_cell: int


class _Cells(NamedTuple):
    """The cells of a piece that are needed, and their rows. position: of the window's runs; ids: int64"""

    position: int
    ids: Ints
    rows: EncodedRows


class _Coming(NamedTuple):
    """A window that is being read.

    step: that needs it first
    order: int64, its needed cells, counted along the line, in the order in which they leave
    steps, slots: int64, of each of these
    tasks: that read it
    """

    step: int
    order: Ints
    steps: Ints
    slots: Ints
    tasks: list[Future[list[_Cells]]]


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
        self._coming: deque[_Coming] = deque()
        self._stopped = Event()
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
        self._pool.shutdown(wait=False, cancel_futures=True)
        tasks = [task for coming in self._coming for task in coming.tasks if not task.cancelled()]
        if not wait(tasks, timeout=_PATIENCE_S).not_done:
            self._pool.shutdown()
        for last_step in list(self._held):
            self._let_go(last_step)

    def stop(self) -> None:
        """Let a call of ``batch`` in another thread wait no longer: it raises CancelledError."""
        self._stopped.set()

    def batch(self, step: int) -> tuple[Ints, EncodedRows]:
        """Ids (int64) and rows of the cells of a step. The rows are there until the next call, for a later step."""
        for done in range(self._step, step):
            self._let_go(done)
        self._step = step
        self._read_ahead()
        while self._coming and self._coming[0].step <= step:
            self._fill(self._coming[0])
            self._coming.popleft()
            self._read_ahead()
        slots = self._ranks.slots(step)
        return self._ids[slots], EncodedRows(self._addresses[slots], self._sizes[slots], (self,))

    def _let_go(self, last_step: int) -> None:
        for buffer in self._held.pop(last_step, ()):
            self._buffers.give_back(buffer)

    def _read_ahead(self) -> None:
        while self._loads and sum(len(coming.tasks) for coming in self._coming) < self._ahead:
            self._coming.append(self._begun(self._loads.popleft()))

    def _begun(self, load: Load) -> _Coming:
        """Begin to read a window: those of its cells that the rank takes from the load's step on."""
        steps = self._ranks.steps_of(load)
        taken = steps >= load.step
        order = self._plan.permutation(load.window)[taken]
        needed = np.zeros(len(steps), np.bool_)
        needed[order] = True
        places = np.cumsum(needed) - 1
        tasks = [self._pool.submit(self._read, group) for group in self._adjacent(load.window, needed)]
        return _Coming(load.step, places[order], steps[taken], self._ranks.slots_of(load)[taken], tasks)

    def _adjacent(self, window: Window, needed: Bools) -> Iterator[list[_Piece]]:
        """The needed parts of a window in groups of blocks of one shard, which the store reads in few requests."""
        pieces, start = [], 0
        for position, run in enumerate(self._plan.runs(window)):
            own = needed[start : start + run.stop - run.start]
            start += len(own)
            if own.any():
                pieces.append(_Piece(position, run, own, *self._selection.block(run.block)))
        pieces.sort(key=lambda piece: (piece.sample.first_cell, piece.block))
        for _, group in groupby(pieces, lambda piece: (piece.sample.first_cell, piece.block // SHARD_BLOCKS)):
            yield list(group)

    def _read(self, pieces: Sequence[_Piece]) -> list[_Cells]:
        """Read pieces of one sample."""
        blocks = pieces[0].sample.read_rows([piece.block for piece in pieces])
        found = []
        for piece, block in zip(pieces, blocks, strict=True):
            run = piece.run
            ids = self._selection.ids(run.block, run.start, run.stop, self._plan.epoch)[piece.needed]
            rows = block.take(ids - piece.first_cell)
            if 2 * len(ids) < len(block):  # else a few cells would keep the memory of all of their block
                rows = EncodedRows.of_bytes(*rows.packed())
            found.append(_Cells(piece.position, ids, rows))
        return found

    def _fill(self, coming: _Coming) -> None:
        """Put a window's cells into the table, their rows copied in the order in which they leave it.

        So a window's memory goes piece by piece, as its cells do, and on average little more than half of it is held.
        """
        parts = [part for task in coming.tasks for part in self._result(task)]
        if not parts:  # the other ranks take all of it
            return
        parts.sort(key=lambda part: part.position)
        order, steps, slots = coming.order, coming.steps, coming.slots
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

    def _result(self, task: Future[list[_Cells]]) -> list[_Cells]:
        """What a task read, unless the reader is stopped first: object storage may not answer for long."""
        while not task.done() and not wait([task], timeout=_LOOK_EVERY_S).done:
            if self._stopped.is_set():
                raise CancelledError
        return task.result()
