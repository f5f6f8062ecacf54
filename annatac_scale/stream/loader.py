"""A store and the order of cells together: batches, resumable at any step on any number of ranks."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import ConfigError
from annatac_scale.store.cache import BlockCache
from annatac_scale.store.encoded_rows import EncodedRows
from annatac_scale.store.place import is_url
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.arrangement import Arrangement, OrderOptions, StreamState
from annatac_scale.stream.batch import Batch, EncodedBatch, RowsOrigin
from annatac_scale.stream.buffers import BufferPool
from annatac_scale.stream.order import default_lanes
from annatac_scale.stream.reader import RankReader
from annatac_scale.stream.split import Split
from annatac_scale.stream.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pyarrow.compute as pc

Ints = NDArray[np.int64]
Item = TypeVar("Item")
Made = TypeVar("Made")

LOCAL_THREADS, REMOTE_THREADS = 2, 64
DEFAULT_WINDOW = 8


class BatchStream:
    """The batches of one rank. Iterating gives the rest of the current epoch and moves on to the next one.

    Every cell comes once per epoch over all ranks. All ranks have equally many batches, some maybe shorter
    than others or empty. The order follows from the seed and the epoch alone (stream/order.py): the global
    batches are the same for any world size and any number of threads. One iterator at a time.

    store: an open store, or its path or URL
    global_batch_size: cells of a step over all ranks
    cells: int64 cell ids that may take part, each once; None for all
    where: of these, the cells whose obs columns fulfil it, as "tissue == 'lung'", or a pyarrow expression
    split: of these, one part of a split into training and validation
    weights: by sample, how often each of its cells comes per epoch; 1 where it is not named
    obs: obs columns that batches carry, see ``Batch.obs``
    vocabulary: renumbers the islands to it and drops all others; None keeps the store's numbers
    lanes: runs of cells read side by side, a divisor of the global batch and at least the world size; None
        takes the divisor nearest to 36. More lanes mix better
    window: blocks of 250 cells' worth that a lane shuffles among each other
    threads: that read, ahead of the one that decompresses and makes batches; None takes 2, or 64 for a store in
        object storage
    cache: keeps the blocks that are read on a local disk; for a store that is given by its URL

    A rank holds at most ``lanes / world_size * (window + 1) * 250`` cells, encoded, on average little more than half of
    them, and reads ``window + 2 * threads`` blocks ahead; a set of up to ``lanes * window`` blocks is held whole.
    docs/guide.md, "The stream", has it in bytes.

    Raises ConfigError for options that do not fit together, InputError for cells, columns or samples that the store
    does not have, ModelError where store and vocabulary are of different islands.
    """

    def __init__(
        self,
        store: IslandStore | Path | str,
        *,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        cells: NDArray[np.integer] | None = None,
        where: "str | pc.Expression | None" = None,
        split: Split | None = None,
        weights: Mapping[str, float] | None = None,
        obs: Sequence[str] = (),
        vocabulary: Vocabulary | None = None,
        lanes: int | None = None,
        window: int = DEFAULT_WINDOW,
        threads: int | None = None,
        cache: BlockCache | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise ConfigError(f"threads = {threads}: expected at least 1")
        if not isinstance(store, IslandStore):
            store = IslandStore.open(store, cache)
        lanes = default_lanes(max(global_batch_size, 1)) if lanes is None else lanes
        options = OrderOptions(global_batch_size, lanes, window, cells, where, split, weights)
        self._arrangement = Arrangement(store, int(seed), options)
        self._arrangement.order.check_ranks(rank, world_size)
        self._rank, self._world_size = rank, world_size
        self._obs, self._columns = tuple(obs), _Columns(store, obs)
        self._threads = threads or (REMOTE_THREADS if is_url(store.path) else LOCAL_THREADS)
        self._ahead = window + 2 * self._threads
        if vocabulary is not None:
            vocabulary.check_space(store)
        new_of_old = None if vocabulary is None else vocabulary.new_of_old()
        self._origin = RowsOrigin(str(store.path), store.n_islands, new_of_old)
        self._buffers = BufferPool()
        self._epoch = self._step = 0

    @property
    def store(self) -> IslandStore:
        """The store, without samples that a resumed stream leaves out."""
        return self._arrangement.store

    @property
    def categories(self) -> dict[str, list[str]]:
        """The texts of the obs columns that are text: ``batch.obs[name]`` holds their numbers, -1 where missing."""
        return self._columns.categories

    @property
    def n_cells(self) -> int:
        """Cells of an epoch over all ranks; with weights, a cell counts as often as it comes."""
        return self._arrangement.order.n_cells

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return self._arrangement.order.n_steps

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, from 0 on; nothing happens where the stream is in that epoch already."""
        if epoch < 0:
            raise ConfigError(f"epoch = {epoch}: expected at least 0")
        if epoch != self._epoch:
            self._epoch, self._step = epoch, 0

    def state_dict(self) -> StreamState:
        """Where the stream is: after the batches handed out, not those read ahead."""
        arrangement = self._arrangement
        return {
            "seed": arrangement.seed,
            "epoch": self._epoch,
            "step": self._step,
            "order": arrangement.pinned,
        }

    def load_state_dict(self, state: StreamState) -> None:
        """Go to where a stream of the same cells, global batch, lanes and window was, at any world size.

        Samples that were added to the store since then stay out. Raises ConfigError where anything else that the order
        follows from is not what it was, and for a step beyond the epoch's end.
        """
        arrangement = self._arrangement.of_state(state)
        if arrangement.store is not self.store:
            # A sample that came later may have changed what a column holds.
            self._columns = _Columns(arrangement.store, self._obs)
        self._arrangement = arrangement
        self._epoch, self._step = state["epoch"], state["step"]

    def __iter__(self) -> Generator[Batch, None, None]:
        return self._each(self._batch)

    def encoded(self) -> Iterator[EncodedBatch]:
        """The same batches, still encoded: less work here and a quarter of the bytes on the way to a device."""
        return self._each(self._encoded_batch)

    def _each(
        self, make: Callable[[Ints, EncodedRows], Made], share: int = 0, shares: int = 1
    ) -> Generator[Made, None, None]:
        """What ``make`` makes of the batches from here on; of these, every ``shares``-th from number ``share`` on."""
        steps = range(self._step + share, len(self), shares)
        plan = self._arrangement.order.epoch(self._epoch)
        ranks = plan.of_rank(self._rank, self._world_size)
        selection = self._arrangement.selection
        reader = RankReader(selection, plan, ranks, steps.start, self._threads, self._ahead, self._buffers)
        # The batch ahead ends before the reader gives away the memory that it is made from.
        with (
            reader,
            closing(_one_ahead(lambda step: make(*reader.batch(step)), steps, reader.stop)) as made,
        ):
            for step, batch in zip(steps, made, strict=True):
                self._step = step + 1
                yield batch
        self._epoch, self._step = self._epoch + 1, 0

    def _batch(self, cell_ids: Ints, rows: EncodedRows) -> Batch:
        return Batch.from_open(cell_ids, self._origin.decode(cell_ids, rows), self._columns.of(cell_ids))

    def _encoded_batch(self, cell_ids: Ints, rows: EncodedRows) -> EncodedBatch:
        return EncodedBatch(cell_ids, *rows.packed(), self._origin, self._columns.of(cell_ids))


class _Columns:
    """Columns of obs as arrays with a value a cell of the store."""

    def __init__(self, store: IslandStore, names: Sequence[str]) -> None:
        self.categories: dict[str, list[str]] = {}
        self._values: dict[str, NDArray[Any]] = {}
        if not names:
            return
        import pyarrow as pa

        from annatac_scale.store.columns import obs_columns

        table = obs_columns(store, names)
        for name in names:
            column = table[name].combine_chunks()
            if pa.types.is_dictionary(column.type):
                self.categories[name] = column.dictionary.to_pylist()
                column = column.indices.fill_null(-1)
            elif pa.types.is_boolean(column.type) and column.null_count:
                column = column.cast(pa.int8()).fill_null(-1)
            self._values[name] = column.to_numpy(zero_copy_only=False)

    def of(self, cell_ids: Ints) -> dict[str, NDArray[Any]]:
        return {name: values[cell_ids] for name, values in self._values.items()}


def _one_ahead(
    make: Callable[[Item], Made], items: Iterable[Item], stop: Callable[[], None]
) -> Generator[Made, None, None]:
    """Make something of each item, in order, one ahead of the consumer in a thread.

    Dropping the iterator leaves the ``with`` block, which ends the thread. stop: called before that is waited for
    """
    with ThreadPoolExecutor(1, "island-stream") as pool:
        ahead: Future[Made] | None = None
        try:
            for item in items:
                following = pool.submit(make, item)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()
        finally:
            stop()
