"""Which cells a stream gives and in which order: what follows from the store, the seed and the options of the order."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import ConfigError
from annatac_scale.store.schema import BLOCK_CELLS
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.order import EpochOrder
from annatac_scale.stream.selection import Selection, sorted_ids
from annatac_scale.stream.split import Split, split_cells

if TYPE_CHECKING:
    import pyarrow.compute as pc

Ints = NDArray[np.int64]


class PinnedOrder(TypedDict):
    """What the order of cells follows from, besides the seed. samples, cells: digests (hex)"""

    global_batch_size: int
    lanes: int
    window: int
    n_samples: int
    samples: str
    cells: str


class StreamState(TypedDict):
    """Where a stream is: the next batch is step ``step`` of epoch ``epoch``."""

    seed: int
    epoch: int
    step: int
    order: PinnedOrder


@dataclass(frozen=True, eq=False)
class OrderOptions:
    """The options of a stream that its order follows from; see ``BatchStream``."""

    global_batch_size: int
    lanes: int
    window: int
    cells: NDArray[np.integer] | None
    where: "str | pc.Expression | None"
    split: Split | None
    weights: Mapping[str, float] | None

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "lanes", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected at least 1")


class Arrangement:
    """The cells of a stream and their order. Made anew, never changed: a state is looked at before it is taken over.

    Raises ConfigError and InputError as BatchStream does.
    """

    def __init__(
        self, store: IslandStore, seed: int, options: OrderOptions, whole_store: IslandStore | None = None
    ) -> None:
        self.store, self.seed, self._options = store, seed, options
        self._whole_store = whole_store or store
        self._cells = _chosen(store, options)
        self.selection = Selection(store, self._cells, options.weights, seed)
        self.order = EpochOrder(
            self.selection.block_sizes,
            options.global_batch_size,
            seed,
            options.lanes,
            options.window * BLOCK_CELLS,
        )

    @cached_property
    def pinned(self) -> PinnedOrder:
        """What a state says of the order."""
        samples = hashlib.sha256()
        for name, sample in self.store.samples.items():
            samples.update(f"{name} {sample.n_cells} {sample.x_sha256}\n".encode())
        return {
            "global_batch_size": self._options.global_batch_size,
            "lanes": self._options.lanes,
            "window": self._options.window,
            "n_samples": len(self.store.samples),
            "samples": samples.hexdigest(),
            "cells": self._cells_sha256(),
        }

    def _cells_sha256(self) -> str:
        """Digest of which cells come, and how often."""
        weights = sorted((name, float(weight)) for name, weight in (self._options.weights or {}).items())
        digest = hashlib.sha256(json.dumps(weights).encode())
        digest.update(self.selection.block_sizes.tobytes())
        if self._cells is not None:
            digest.update(self._cells.data)
        return digest.hexdigest()

    def of_state(self, state: StreamState) -> "Arrangement":
        """The arrangement that a state is of: samples that were added to the store since then are left out.

        Raises ConfigError where the state is of other cells or another order, or of a step beyond the epoch's end.
        """
        _check_state(state)
        pinned, store = state["order"], self._whole_store
        if pinned["n_samples"] < len(store.samples):
            store = store.first(pinned["n_samples"])
        found = Arrangement(store, state["seed"], self._options, self._whole_store)
        now, then = dict(found.pinned), dict(pinned)
        changed = [f"{name} {then[name]!r}, here {now[name]!r}" for name in now if then[name] != now[name]]
        if changed:
            raise ConfigError(
                f"{store.path}: the state is of a stream of other cells or another order ({'; '.join(changed)}); use "
                "the same store, cells and options again, or start anew"
            )
        if state["epoch"] < 0 or not 0 <= state["step"] <= found.order.n_steps:
            raise ConfigError(
                f"step {state['step']} of {found.order.n_steps} in epoch {state['epoch']}: the state is damaged; start "
                "the epoch anew"
            )
        return found


def _chosen(store: IslandStore, options: OrderOptions) -> Ints | None:
    """Ids of the cells that take part, increasing; None for all."""
    cells = None if options.cells is None else sorted_ids(store, np.array(options.cells))
    if options.where is not None:
        from annatac_scale.stream.where import cells_where  # needs pyarrow's compute, which takes 30 MB

        fulfil = cells_where(store, options.where)
        cells = fulfil if cells is None else np.intersect1d(cells, fulfil)
    return cells if options.split is None else split_cells(store, options.split, cells)


def _check_state(state: Mapping[str, Any]) -> None:
    """Raise ConfigError for what no ``state_dict`` gave."""
    order = state.get("order")
    wrong = [name for name in ("seed", "epoch", "step") if not isinstance(state.get(name), int)]
    if not isinstance(order, Mapping):
        wrong.append("order")
    else:
        wrong += [name for name in PinnedOrder.__annotations__ if name not in order]
    if wrong:
        found = state.get(wrong[0])
        raise ConfigError(f"{wrong[0]} = {found!r} in the state of a stream: give what state_dict() gave")
