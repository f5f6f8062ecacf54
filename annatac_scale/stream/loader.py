"""A store and the order of cells together: batches, resumable at any step on any number of ranks."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import ConfigError
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.schema import BLOCK_CELLS
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.order import EpochOrder, EpochPlan, Share, Window, default_lanes
from annatac_scale.stream.selection import Selection, sequential
from annatac_scale.stream.vocabulary import Vocabulary

__all__ = ["IslandStream", "StreamState", "sequential"]

Ints = NDArray[np.int64]
Item = TypeVar("Item")


class StreamState(TypedDict):
    """Where a stream is: the next batch is step ``step`` of epoch ``epoch``."""

    seed: int
    epoch: int
    step: int


class IslandStream:
    """The batches of one rank. Iterating gives the rest of the current epoch and moves on to the next one.

    Every cell comes once per epoch over all ranks. All ranks have equally many batches, some maybe shorter
    than others or empty. The order follows from the seed and the epoch alone (stream/order.py): the global
    batches are the same for any world size. One iterator at a time.

    store: an open store, or its path
    cells: int64 cell ids that take part, each once; None for all
    vocabulary: renumbers the islands to it and drops all others; None keeps the store's numbers
    global_batch_size: cells of a step over all ranks
    lanes: runs of cells read side by side, a divisor of the global batch and at least the world size; None
        takes the divisor nearest to 36. More lanes mix better
    window: blocks of 250 cells' worth that a lane shuffles among each other

    A rank holds about ``lanes / world_size * (window + 1) * 250`` cells, 5 bytes an open island.

    Raises ConfigError for options that do not fit together, InputError for cells that the store does not
    have, ModelError where store and vocabulary are of different islands.
    """

    def __init__(
        self,
        store: IslandStore | Path | str,
        *,
        cells: NDArray[np.integer] | None = None,
        vocabulary: Vocabulary | None = None,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        lanes: int | None = None,
        window: int = 4,
    ) -> None:
        self.store = store if isinstance(store, IslandStore) else IslandStore.open(store)
        self._selection = Selection(self.store, cells)
        if lanes is None:
            lanes = default_lanes(global_batch_size)
        self._order = EpochOrder(
            self._selection.block_sizes, global_batch_size, seed, lanes, window * BLOCK_CELLS
        )
        self._order.check_ranks(rank, world_size)
        self._rank, self._world_size = rank, world_size
        self._new_of_old: NDArray[np.int32] | None = None
        if vocabulary is not None:
            vocabulary.check_space(self.store)
            self._new_of_old = vocabulary.new_of_old()
        self._epoch = self._step = 0

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return self._order.n_steps

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; nothing happens where the stream is in that epoch already."""
        if epoch != self._epoch:
            self._epoch, self._step = epoch, 0

    def state_dict(self) -> StreamState:
        """Where the stream is: after the batches handed out, not those read ahead."""
        return {"seed": self._order.seed, "epoch": self._epoch, "step": self._step}

    def load_state_dict(self, state: StreamState) -> None:
        """Go to where a stream of the same cells, global batch, lanes and window was, at any world size.

        Raises ConfigError for a step beyond the epoch's end.
        """
        if not 0 <= state["step"] <= len(self):
            raise ConfigError(
                f"step {state['step']} of an epoch of {len(self)} steps: the state is of a stream of other "
                "cells or another global batch; use those again"
            )
        self._order = replace(self._order, seed=state["seed"])
        self._epoch, self._step = state["epoch"], state["step"]

    def __iter__(self) -> Iterator[Batch]:
        plan = self._order.epoch(self._epoch)
        reader = _WindowReader(self._selection, plan, self._new_of_old)
        steps = range(self._step, len(self))
        shares = (plan.shares(step, self._rank, self._world_size) for step in steps)
        for step, batch in zip(steps, _one_ahead(reader.batch, shares), strict=True):
            self._step = step + 1
            yield batch
        self._epoch, self._step = self._epoch + 1, 0


class _WindowReader:
    """Reads windows when a batch first touches them and lets go of those that a batch does not touch."""

    def __init__(self, selection: Selection, plan: EpochPlan, new_of_old: NDArray[np.int32] | None) -> None:
        self._selection = selection
        self._plan = plan
        self._new_of_old = new_of_old
        self._held: dict[Window, tuple[Ints, OpenIslands]] = {}

    def batch(self, shares: list[Share]) -> Batch:
        """The batch that takes these shares, in their order."""
        touched = {share.window for share in shares}
        self._held = {window: held for window, held in self._held.items() if window in touched}
        ids, parts = [np.empty(0, np.int64)], []
        for share in shares:
            if share.window not in self._held:
                self._held[share.window] = self._read(share.window)
            window_ids, rows = self._held[share.window]
            ids.append(window_ids[share.start : share.stop])
            parts.append(rows[share.start : share.stop])
        return Batch.from_open(np.concatenate(ids), OpenIslands.concatenate(parts))

    def _read(self, window: Window) -> tuple[Ints, OpenIslands]:
        """Cell ids and rows of a window, permuted: what a batch takes is a slice."""
        ids, parts = [], []
        for run in self._plan.runs(window):
            rows = self._selection.read(run.block, run.start, run.stop)
            ids.append(self._selection.ids(run.block, run.start, run.stop))
            parts.append(rows if self._new_of_old is None else rows.renumber(self._new_of_old))
        order = self._plan.permutation(window)
        return np.concatenate(ids)[order], OpenIslands.concatenate(parts).take(order)


def _one_ahead(make: Callable[[Item], Batch], items: Iterable[Item]) -> Iterator[Batch]:
    """Make a batch of each item, in order, one ahead of the consumer in a thread.

    Dropping the iterator leaves the ``with`` block, which ends the thread.
    """
    with ThreadPoolExecutor(1, "island-stream") as pool:
        ahead: Future[Batch] | None = None
        for item in items:
            following = pool.submit(make, item)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()
