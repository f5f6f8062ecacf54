import numpy as np
import pytest

from annatac_scale.errors import InputError
from annatac_scale.stream.selection import Selection, sequential


def rows_of(batches):
    """cell id -> {island: level}, in the order in which cells come."""
    found = {}
    for ids, cells in batches:
        assert len(ids) == len(cells)
        for index, cell in enumerate(ids.tolist()):
            assert cell not in found
            row = slice(cells.offsets[index], cells.offsets[index + 1])
            found[cell] = dict(zip(cells.islands[row].tolist(), cells.levels[row].tolist(), strict=True))
    return found


@pytest.mark.parametrize("batch_size", [None, 1000, 250, 64])
@pytest.mark.parametrize("subset", [False, True])
def test_a_pass_gives_every_chosen_cell_once_in_order_with_its_open_islands(
    unequal_store, batch_size, subset
):
    n_cells = len(unequal_store.levels)
    cells = np.random.default_rng(0).permutation(n_cells)[:900] if subset else None
    found = rows_of(sequential(unequal_store.store, cells, batch_size))
    expected = range(n_cells) if cells is None else sorted(cells.tolist())
    assert list(found.items()) == [(cell, unequal_store.row(cell)) for cell in expected]


def test_batches_keep_to_their_block_and_size(unequal_store):
    blocks = {b.first_cell: b.n_cells for b in unequal_store.store.blocks()}
    sizes = [(int(ids[0]), len(ids)) for ids, _ in sequential(unequal_store.store)]
    assert dict(sizes) == blocks
    assert max(len(ids) for ids, _ in sequential(unequal_store.store, batch_size=64)) == 64


def test_no_cells_give_no_batches(unequal_store):
    assert list(sequential(unequal_store.store, np.empty(0, np.int64))) == []


def test_block_sizes_count_the_chosen_cells(unequal_store):
    cells = np.array([2064, 0, 701, 702, 963])
    sizes = Selection(unequal_store.store, cells).block_sizes
    blocks = unequal_store.store.blocks()
    expected = [sum(b.first_cell <= c < b.first_cell + b.n_cells for c in cells.tolist()) for b in blocks]
    assert sizes.tolist() == expected
    assert len(Selection(unequal_store.store, cells)) == 5
    assert len(Selection(unequal_store.store)) == 2065


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([-1, 3], "no cell -1; ids run from 0 to 12"),
        ([3, 13], "no cell 13"),
        ([5, 2, 5], "cell 5 is given twice"),
    ],
)
def test_cells_that_are_not_there_or_come_twice_are_refused(tiny_store, cells, message):
    with pytest.raises(InputError, match=message):
        Selection(tiny_store.store, np.array(cells))
