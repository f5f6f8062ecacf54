"""The cells that a rank holds: windows are read ahead of the batches that need them, and held encoded.

A table has a slot for each cell that is held; windows fill slots and batches empty them (stream/order.py). What fills a
slot is the address of the cell's bytes: rows are decoded when their batch is made.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from itertools import groupby, islice, pairwise
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


class _Window(NamedTuple):
    """A window that is read, or will be next.

    step: that needs it first
    order: int64, its needed cells, counted along the line, in the order in which they leave
    steps, slots: int64, of each of these
    groups: of its pieces, which are read together
    """

    step: int
    order: Ints
    steps: Ints
    slots: Ints
    groups: list[list[_Piece]]


class RankReader:
    """Reads what the steps of a rank need, from ``first_step`` on.

    threads: that read; with object storage behind them they mostly wait
    ahead: groups of blocks that are read before a step needs them
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
        self._windows: deque[_Window] = deque()
        self._groups = self._begun(ranks.loads(first_step))
        self._reads: deque[Future[list[bytes | None]]] = deque()
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
        reads = [read for read in self._reads if not read.cancelled()]
        if not wait(reads, timeout=_PATIENCE_S).not_done:
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
        while self._windows and self._windows[0].step <= step:
            self._fill(self._windows[0])
            self._windows.popleft()
            self._read_ahead()
        slots = self._ranks.slots(step)
        return self._ids[slots], EncodedRows(self._addresses[slots], self._sizes[slots], (self,))

    def _let_go(self, last_step: int) -> None:
        for buffer in self._held.pop(last_step, ()):
            self._buffers.give_back(buffer)

    def _read_ahead(self) -> None:
        for pieces in islice(self._groups, max(0, self._ahead - len(self._reads))):
            blocks = [piece.block for piece in pieces]
            self._reads.append(self._pool.submit(pieces[0].sample.read_chunks, blocks))

    def _begun(self, loads: Iterable[Load]) -> Iterator[list[_Piece]]:
        """What has to be read, window by window, in groups of pieces."""
        for load in loads:
            steps = self._ranks.steps_of(load)
            taken = steps >= load.step
            order = self._plan.permutation(load.window)[taken]
            needed = np.zeros(len(steps), np.bool_)
            needed[order] = True
            places = np.cumsum(needed) - 1
            groups = list(self._adjacent(load.window, needed))
            slots = self._ranks.slots_of(load)[taken]
            self._windows.append(_Window(load.step, places[order], steps[taken], slots, groups))
            yield from groups

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

    def _fill(self, window: _Window) -> None:
        """Put a window's cells into the table, their rows copied in the order in which they leave it.

        So a window's memory goes piece by piece, as its cells do, and on average little more than half of it is held.
        """
        parts = [part for group in window.groups for part in self._cells(group)]
        if not parts:  # the other ranks take all of it
            return
        parts.sort(key=lambda part: part[0])
        order, steps, slots = window.order, window.steps, window.slots
        self._ids[slots] = np.concatenate([ids for _, ids, _ in parts])[order]
        rows = EncodedRows.concatenate([rows for _, _, rows in parts]).take(order)
        n_pieces = -(-len(order) // _PIECE_CELLS)
        bounds = np.linspace(0, len(order), n_pieces + 1).astype(np.int64).tolist()
        for start, stop in pairwise(bounds):
            piece = rows[start:stop]
            buffer = self._buffers.take(int(piece.sizes.sum()))
            _, offsets = piece.packed(buffer)
            self._addresses[slots[start:stop]] = buffer.ctypes.data + offsets[:-1]
            self._sizes[slots[start:stop]] = piece.sizes
            self._held.setdefault(int(steps[stop - 1]), []).append(buffer)

    def _cells(self, pieces: Sequence[_Piece]) -> Iterator[tuple[int, Ints, EncodedRows]]:
        """Of the pieces that were read first: position, ids and rows of the needed cells."""
        chunks = self._result(self._reads[0])
        self._reads.popleft()
        self._read_ahead()
        for piece, chunk in zip(pieces, chunks, strict=True):
            run = piece.run
            ids = self._selection.ids(run.block, run.start, run.stop, self._plan.epoch)[piece.needed]
            block = piece.sample.decompress(piece.block, chunk)
            rows = block.take(ids - piece.first_cell)
            if 2 * len(ids) < len(block):  # else a few cells would keep the memory of all of their block
                rows = EncodedRows.of_bytes(*rows.packed())
            yield piece.position, ids, rows

    def _result(self, read: Future[list[bytes | None]]) -> list[bytes | None]:
        """What was read, unless the reader is stopped first: object storage may not answer for long."""
        while not read.done() and not wait([read], timeout=_LOOK_EVERY_S).done:
            if self._stopped.is_set():
                raise CancelledError
        return read.result()
