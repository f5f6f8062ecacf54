import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annatac_scale.errors import StoreError
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.stream.batch import Batch, EncodedBatch, RowsOrigin

N_ISLANDS = 30


@st.composite
def batches_with_samples(draw):
    """A batch as lists of dicts, the measured islands of its samples, and the sample of each cell."""
    island_sets = st.sets(st.integers(0, N_ISLANDS - 1))
    measured = [sorted(draw(island_sets)) for _ in range(draw(st.integers(1, 3)))]
    sample_of_cell, cells = [], []
    for _ in range(draw(st.integers(0, 5))):
        sample = draw(st.integers(0, len(measured) - 1))
        listed = sorted(draw(st.sets(st.sampled_from(measured[sample])))) if measured[sample] else []
        sample_of_cell.append(sample)
        cells.append({island: tuple(draw(st.integers(0, 4)) for _ in range(3)) for island in listed})
    return cells, measured, sample_of_cell


def batch_of(cells, targets=True):
    flat = [(island, *values) for cell in cells for island, values in cell.items()]
    islands, tokens, levels, opens = np.array(flat, int).reshape(-1, 4).T
    return Batch(
        np.arange(100, 100 + len(cells)),
        np.concatenate([[0], np.cumsum([len(cell) for cell in cells])]).astype(np.int64),
        islands.astype(np.int32),
        tokens.astype(np.uint8),
        levels.astype(np.int16) if targets else None,
        opens.astype(np.int16) if targets else None,
    )


def test_from_open_gives_each_open_island_its_level_as_token():
    cells = OpenIslands(np.array([0, 2, 2, 3]), np.array([4, 9, 1], np.int32), np.array([1, 5, 2], np.uint8))
    batch = Batch.from_open(np.array([7, 8, 3]), cells)
    assert batch.cell_ids.tolist() == [7, 8, 3]
    assert batch.offsets.tolist() == [0, 2, 2, 3]
    assert batch.islands.tolist() == [4, 9, 1]
    assert batch.tokens.tolist() == [1, 5, 2]
    assert batch.level_targets is None
    assert batch.open_targets is None
    assert len(batch) == 3


@settings(deadline=None)
@given(batches_with_samples())
def test_with_closed_equals_a_loop_over_measured_islands(case):
    cells, measured, sample_of_cell = case
    batch = batch_of(cells).with_closed(
        [np.array(islands, np.int32) for islands in measured], np.array(sample_of_cell, int)
    )
    expected = [
        (island, *cell.get(island, (0, -100, -100)))
        for cell, sample in zip(cells, sample_of_cell, strict=True)
        for island in measured[sample]
    ]
    found = zip(batch.islands, batch.tokens, batch.level_targets, batch.open_targets, strict=True)
    assert [tuple(int(value) for value in token) for token in found] == expected
    assert np.diff(batch.offsets).tolist() == [len(measured[sample]) for sample in sample_of_cell]
    assert batch.cell_ids.tolist() == list(range(100, 100 + len(cells)))


def test_with_closed_keeps_absent_targets_absent_and_types():
    batch = batch_of([{3: (2, 0, 0)}], targets=False).with_closed([np.array([1, 3], np.int32)], np.array([0]))
    assert batch.level_targets is None
    assert batch.open_targets is None
    assert (batch.offsets.dtype, batch.islands.dtype, batch.tokens.dtype) == (np.int64, np.int32, np.uint8)
    with_targets = batch_of([{3: (2, 0, 0)}]).with_closed([np.array([1, 3], np.int32)], np.array([0]))
    assert (with_targets.level_targets.dtype, with_targets.open_targets.dtype) == (np.int16, np.int16)


@pytest.mark.parametrize("listed", [{3: (2, 0, 0)}, {29: (1, 0, 0)}, {0: (1, 0, 0)}])
def test_with_closed_refuses_an_open_island_that_is_not_measured(listed):
    batch = batch_of([{}, listed])
    with pytest.raises(StoreError, match=rf"cell 101: island {next(iter(listed))} is open, but"):
        batch.with_closed([np.array([1, 2], np.int32)], np.array([0, 0]))


@settings(deadline=None)
@given(batches_with_samples(), st.slices(5))
def test_a_slice_holds_the_same_tokens_and_targets_of_its_cells(case, cells):
    rows = case[0]
    if cells.step not in (None, 1):
        cells = slice(cells.start, cells.stop)
    found, expected = batch_of(rows)[cells], batch_of(rows[cells])
    assert found.cell_ids.tolist() == list(range(100, 100 + len(rows)))[cells]
    for name in ("offsets", "islands", "tokens", "level_targets", "open_targets"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()


def test_damaged_bytes_of_an_encoded_batch_name_the_store_and_the_cell():
    origin = RowsOrigin("s3://bucket/atlas.zarr", 100, None)
    data = np.frombuffer(b"\x00\xff\x80", np.uint8)
    batch = EncodedBatch(np.array([7, 41]), data, np.array([0, 1, 3]), origin)
    with pytest.raises(
        StoreError, match=r"^s3://bucket/atlas.zarr: cell 41: found a row that ends within an island"
    ):
        batch.decode()


def test_the_cells_of_a_slice_keep_their_obs():
    cells = OpenIslands(np.array([0, 1, 1, 3]), np.array([4, 0, 2], np.int32), np.array([1, 2, 3], np.uint8))
    batch = Batch.from_open(np.array([7, 8, 9]), cells, {"donor": np.array([0, -1, 2])})
    assert batch[1:].obs["donor"].tolist() == [-1, 2]
    assert batch[:2].obs["donor"].tolist() == [0, -1]
