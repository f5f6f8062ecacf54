"""Random stores, streamed whole: every cell exactly once, the same global batches for any ranks and threads."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from known_stores import write_store

from annatac_scale.stream.loader import BatchStream

WORLD_SIZES = (1, 2, 3, 4, 8, 16)

sample_sizes = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 700)), min_size=1, max_size=6)


def global_batches(store, options, world_size, threads, epoch):
    """[step] -> [(cell, its islands, its levels), ...] of each rank, in order of ranks."""
    streams = [
        BatchStream(store, rank=rank, world_size=world_size, threads=threads, **options)
        for rank in range(world_size)
    ]
    for stream in streams:
        stream.set_epoch(epoch)
    return [[row for batch in step for row in rows_of(batch)] for step in zip(*streams, strict=True)]


def rows_of(batch):
    for i, cell in enumerate(batch.cell_ids.tolist()):
        row = slice(batch.offsets[i], batch.offsets[i + 1])
        yield cell, tuple(batch.islands[row].tolist()), tuple(batch.levels[row].tolist())


@settings(max_examples=25)
@given(
    sizes=sample_sizes,
    share=st.integers(1, 5),
    lanes=st.sampled_from([16, 32]),
    window=st.integers(1, 2),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
    threads=st.integers(1, 5),
)
def test_each_cell_comes_once_and_global_batches_do_not_depend_on_ranks_or_threads(
    sizes, share, lanes, window, seed, epoch, threads
):
    with tempfile.TemporaryDirectory() as folder:
        known = write_store(Path(folder) / "random.zarr", sizes, seed % 1000)
        options = {"global_batch_size": lanes * share, "seed": seed, "lanes": lanes, "window": window}
        alone = global_batches(known.store, options, 1, 1, epoch)
        cells = sorted(row for step in alone for row in step)
        assert cells == [
            (cell, tuple(np.flatnonzero(levels)), tuple(levels[levels > 0]))
            for cell, levels in enumerate(known.levels)
        ]
        assert all(len(step) == lanes * share for step in alone[:-1])
        for world_size in WORLD_SIZES:
            ranks = global_batches(known.store, options, world_size, threads, epoch)
            assert [sorted(step) for step in ranks] == [sorted(step) for step in alone]
