"""Memory against the formula of docs/guide.md, "The stream": what NumPy, Python and zstd allocate, by tracemalloc."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from index_only import store_of
from known_stores import open_islands, small_space

from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, create_store
from annatac_scale.stream.loader import BatchStream
from annatac_scale.stream.selection import Selection
from annatac_scale.stream.split import Split, split_cells

N_CELLS, B = 40_000, 1000
"""Cells of the store, and bytes of each, encoded: every second of 2,000 islands is open."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "many.zarr"
    create_store(path, small_space(2000), "insertion")
    rows = open_islands(np.random.default_rng(0).integers(1, 6, (4000, 2000)) * (np.arange(2000) % 2))
    with SampleWriter(path, "many", N_CELLS) as writer:
        for shard in range(N_CELLS // 4000):
            writer.write_shard(shard, rows)
        barcodes = pd.Index([str(i) for i in range(N_CELLS)], name="barcode")
        writer.commit(pd.DataFrame(index=barcodes), np.ones(2000, bool), {})
    return IslandStore.open(path)


def formula(lanes, window, world_size, threads, global_batch):
    held = lanes / world_size * (window + 1) * 250 * B
    read_ahead = (2 * window + 2 * threads) * 250 * B
    return held + read_ahead + 4 * global_batch / world_size * 6 * 1000


def peak_of(make, n_epochs=2):
    """Bytes that an epoch had at most, after one that compiled kernels and filled pools."""
    stream = make()
    next(iter(stream))
    tracemalloc.start()
    try:
        stream = make()
        for _ in range(n_epochs):
            n_cells = sum(len(batch) for batch in stream.encoded())
        return tracemalloc.get_traced_memory()[1], n_cells
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize(("lanes", "window", "threads"), [(4, 1, 1), (8, 2, 2), (8, 4, 4)])
def test_a_rank_takes_no_more_than_the_guide_says(store, lanes, window, threads, world_size):
    options = {"global_batch_size": 64, "seed": 1, "lanes": lanes, "window": window, "threads": threads}
    peak, n_cells = peak_of(lambda: BatchStream(store, world_size=world_size, **options))
    assert n_cells * world_size == N_CELLS
    bound = formula(lanes, window, world_size, threads, 64)
    assert 0.2 * bound < peak < bound + 500_000


@pytest.mark.parametrize("lanes", [4, 64])
def test_few_chosen_cells_do_not_take_the_memory_of_the_others(store, lanes):
    options = {"global_batch_size": 64, "seed": 1, "lanes": lanes, "window": 2, "threads": 1}
    cells = np.arange(0, N_CELLS, 20)
    peak, n_cells = peak_of(lambda: BatchStream(store, cells=cells, **options))
    assert n_cells == 2000
    chosen = len(cells) * B
    blocks_at_a_time = 16 * 250 * B  # a shard, of which all blocks have a chosen cell
    assert peak < 2 * chosen + (2 + 2 * 1 + 1) * blocks_at_a_time
    assert peak < N_CELLS * B / 1.8


def test_ranks_share_a_set_that_is_held_whole(store):
    options = {"global_batch_size": 64, "seed": 1, "lanes": 32, "window": 8, "threads": 1}
    alone, _ = peak_of(lambda: BatchStream(store, **options))
    share, _ = peak_of(lambda: BatchStream(store, world_size=32, **options))
    assert alone < 2.2 * N_CELLS * B
    assert share < 2.2 * N_CELLS * B / 32 + 16 * (8 + 2 + 1) * 250 * B


def test_choosing_takes_a_hundred_bytes_a_block_of_a_large_store():
    store = store_of({f"s{i}": 10**6 for i in range(20)})
    n_blocks = 20 * 4000
    tracemalloc.start()
    try:
        Selection(store)
        all_cells = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        Selection(store, weights={"s3": 1.5})
        weighted = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all_cells < 100 * n_blocks
    assert weighted < 200 * n_blocks


def test_a_side_of_a_split_takes_eight_bytes_a_cell_that_is_chosen():
    store = store_of({"s": 10**6})
    tracemalloc.start()
    try:
        chosen = split_cells(store, Split("train", 0.5))
        selection = Selection(store, chosen)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(selection) == len(chosen)
    assert held < 1.2 * 8 * len(chosen)
