import numpy as np
import pytest

from annatac_scale.errors import InputError, ModelError
from annatac_scale.stream.vocabulary import Vocabulary, count_open

SAMPLE_STARTS = [0, 700, 703, 963, 964, 2065]


@pytest.fixture(params=["all", "some", "one_sample"])
def cells(request):
    if request.param == "all":
        return None
    if request.param == "some":
        return np.random.default_rng(0).permutation(2065)[:500]
    return np.arange(300, 320)


def test_counts_are_the_column_sums_of_open_islands(unequal_store, cells):
    chosen = slice(None) if cells is None else cells
    expected = (unequal_store.levels[chosen] > 0).sum(axis=0)
    assert count_open(unequal_store.store, cells).tolist() == expected.tolist()


@pytest.mark.parametrize("min_cells", [0, 1, 3, 70])
def test_the_vocabulary_is_measured_beside_a_chosen_cell_and_open_in_enough_of_them(
    unequal_store, cells, min_cells
):
    rows = range(2065) if cells is None else cells.tolist()
    expected = []
    for island in range(40):
        n_open = sum(bool(unequal_store.levels[row, island]) for row in rows)
        samples = {int(np.searchsorted(SAMPLE_STARTS, row, side="right")) - 1 for row in rows}
        if n_open >= min_cells and any(unequal_store.measured[sample][island] for sample in samples):
            expected.append(island)
    if expected:
        vocabulary = Vocabulary.fit(unequal_store.store, cells, min_cells)
        assert vocabulary.islands.tolist() == expected
        assert len(vocabulary) == len(expected)
    else:
        with pytest.raises(InputError, match=f"open in {min_cells} or more of the chosen cells"):
            Vocabulary.fit(unequal_store.store, cells, min_cells)


def test_known_counts_spare_the_pass_over_the_store(unequal_store):
    counts = np.zeros(40, np.int64)
    measured = np.flatnonzero(np.any(unequal_store.measured, axis=0))
    counts[measured[4]] = 3
    vocabulary = Vocabulary.fit(unequal_store.store, None, counts=counts)
    assert vocabulary.islands.tolist() == [measured[4]]


def test_new_of_old_numbers_the_islands_in_order_and_drops_the_rest():
    vocabulary = Vocabulary("abc", 6, np.array([1, 2, 5], np.int32))
    assert vocabulary.new_of_old().tolist() == [-1, 0, 1, -1, -1, 2]
    assert vocabulary.new_of_old().dtype == np.int32


def test_measured_lists_each_samples_islands_by_their_vocabulary_number(unequal_store):
    vocabulary = Vocabulary.fit(unequal_store.store, None, 40)
    assert len(vocabulary) < 40
    expected = [
        [number for number, island in enumerate(vocabulary.islands.tolist()) if mask[island]]
        for mask in unequal_store.measured
    ]
    assert [islands.tolist() for islands in vocabulary.measured(unequal_store.store)] == expected


def test_a_store_of_other_islands_is_refused(unequal_store):
    vocabulary = Vocabulary("0" * 64, 40, np.array([1], np.int32))
    with pytest.raises(ModelError, match="000000000000; convert the cells with the model's assembly"):
        vocabulary.measured(unequal_store.store)


def test_no_chosen_cells_give_no_vocabulary(unequal_store):
    with pytest.raises(InputError, match=r"at most in 0"):
        Vocabulary.fit(unequal_store.store, np.empty(0, np.int64))


def test_the_digest_depends_on_the_space_and_the_islands():
    a = Vocabulary("a" * 64, 9, np.array([1, 2], np.int32)).sha256
    assert a == Vocabulary("a" * 64, 9, np.array([1, 2], np.int32)).sha256
    assert a != Vocabulary("b" * 64, 9, np.array([1, 2], np.int32)).sha256
    assert a != Vocabulary("a" * 64, 9, np.array([1, 3], np.int32)).sha256
