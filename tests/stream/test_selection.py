from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from index_only import rows_of as rows_of_index
from index_only import store_of

from annatac_scale.errors import ConfigError, InputError
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


# Weights


@dataclass
class Case:
    """Samples and which of their cells are selected, weights, and a seed."""

    sizes: dict[str, int]
    cells: np.ndarray | None
    weights: dict[str, float]
    seed: int

    def selection(self):
        return Selection(store_of(self.sizes), self.cells, self.weights, self.seed)


WEIGHTS = st.sampled_from([0, 0.001, 0.25, 0.5, 1, 1.5, 2, 2.5, 3, 10.75]) | st.floats(0, 4)


@st.composite
def cases(draw):
    names = draw(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, unique=True))
    sizes = {name: draw(st.sampled_from([0, 1, 3, 249, 250, 251, 700])) for name in names}
    n_cells = sum(sizes.values())
    cells = None
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 9)))
        cells = rng.permutation(n_cells)[: draw(st.integers(0, n_cells))]
    weights = {name: draw(WEIGHTS) for name in names if draw(st.booleans())}
    return Case(sizes, cells, weights, draw(st.integers(0, 3)))


def turns_of(selection, epoch):
    """Cell id -> turns in an epoch."""
    turns = Counter()
    for entry, size in enumerate(selection.block_sizes.tolist()):
        sample, number, first_cell = selection.block(entry)
        ids = selection.ids(entry, 0, size, epoch)
        assert ids.dtype == np.int64
        assert len(ids) == size
        assert first_cell == sample.first_cell + 250 * number
        assert all(
            first_cell <= cell < min(first_cell + 250, sample.first_cell + sample.n_cells) for cell in ids
        )
        assert np.all(ids[1:] > ids[:-1])
        third = size // 3
        parts = [selection.ids(entry, *part, epoch) for part in ((0, third), (third, size))]
        np.testing.assert_array_equal(np.concatenate(parts), ids)
        turns.update(ids.tolist())
    return turns


@given(case=cases(), epoch=st.integers(0, 10**6))
def test_every_cell_has_the_turns_that_its_weight_says(case, epoch):
    rows = rows_of_index(store_of(case.sizes))
    chosen = range(len(rows)) if case.cells is None else case.cells.tolist()
    whole = {name: int(weight) for name, weight in case.weights.items()}
    n_chosen = Counter(rows[cell][0] for cell in chosen)
    more = {
        name: int(Fraction(case.weights.get(name, 1)) % 1 * n + Fraction(1, 2))
        for name, n in n_chosen.items()
    }
    if n_chosen and not any(whole.get(name, 1) or more[name] for name in n_chosen):
        with pytest.raises(
            InputError, match=r"the weights leave none of [0-9,]+ cells a turn; give a sample"
        ):
            case.selection()
        return
    selection = case.selection()
    turns = turns_of(selection, epoch)
    assert set(turns) <= set(chosen)
    for cell in chosen:
        assert turns[cell] - whole.get(rows[cell][0], 1) in (0, 1)
    for name, n in n_chosen.items():
        own = sum(turns[cell] for cell in chosen if rows[cell][0] == name)
        assert abs(own - (whole.get(name, 1) * n + more[name])) <= (
            0 if exact(case.weights.get(name, 1)) else 1
        )
    assert len(selection) == sum(turns.values())


def exact(weight):
    """Whether a float times a few hundred cells is computed without rounding."""
    return (Fraction(weight) * 2**10).denominator == 1


@given(case=cases())
def test_over_the_epochs_all_cells_of_a_block_have_equally_many_turns(case):
    try:
        selection = case.selection()
    except InputError:
        return
    for entry in np.flatnonzero(selection.block_sizes)[:40].tolist():
        n = int(selection.block_sizes[entry])
        drawn = Counter()
        for epoch in range(5):
            drawn.update(selection.ids(entry, 0, n, epoch).tolist())
        assert max(drawn.values()) - min(drawn.values()) <= 1


def test_sizes_are_those_of_all_epochs_and_parts_are_not():
    selection = Selection(store_of({"a": 1000, "b": 500}), weights={"a": 1.5, "b": 0.1}, seed=4)
    epochs = [turns_of(selection, epoch) for epoch in range(10)]
    assert {sum(turns.values()) for turns in epochs} == {1550}
    assert len({tuple(sorted(turns.items())) for turns in epochs[:2]}) == 2
    total = sum(epochs, Counter())
    assert {total[cell] for cell in range(1000)} == {15}
    assert {total[cell] for cell in range(1000, 1500)} == {1}


def test_which_cells_follows_from_seed_epoch_and_block_alone():
    weights = {"a": 0.5, "b": 0.5}
    one, other = store_of({"a": 300, "b": 250}), store_of({"b": 250, "a": 300})

    def drawn(store, seed, epoch):
        rows = rows_of_index(store)
        return {rows[cell] for cell in turns_of(Selection(store, None, weights, seed), epoch)}

    assert drawn(one, 0, 1) == drawn(other, 0, 1)
    assert drawn(one, 1, 1) != drawn(one, 0, 1)
    assert drawn(one, 0, 2) != drawn(one, 0, 1)
    firsts = [row for name, row in drawn(one, 0, 1) if name == "a" and row < 250]
    seconds = [row for name, row in drawn(one, 0, 1) if name == "b"]
    assert sorted(firsts) != sorted(seconds)


def test_the_part_of_a_block_is_a_fair_draw():
    """Over seeds each cell is drawn as often as any other, and so is each pair: binomial, within five sigma."""
    store, n = store_of({"a": 20}), 4000
    drawn = np.zeros((n, 20))
    for seed in range(n):
        drawn[seed, Selection(store, None, {"a": 0.5}, seed).ids(0, 0, 10, 3)] = 1
    assert np.abs(drawn.sum(0) - n / 2).max() < 5 * np.sqrt(n / 4)
    pairs, expected = drawn.T @ drawn, n * 10 * 9 / (20 * 19)
    off = ~np.eye(20, dtype=bool)
    assert np.abs(pairs[off] - expected).max() < 5 * np.sqrt(expected)


def test_a_tiny_weight_takes_a_few_cells_of_a_few_blocks():
    selection = Selection(store_of({"a": 100_000}), weights={"a": 0.001})
    assert len(selection) == 100
    assert selection.block_sizes.tolist() == [1] * 100


def test_weights_of_one_change_nothing(unequal_store):
    plain, weighted = Selection(unequal_store.store), Selection(unequal_store.store, weights={"s0": 1})
    assert weighted.block_sizes.tolist() == plain.block_sizes.tolist()
    for entry, size in enumerate(plain.block_sizes.tolist()):
        assert weighted.ids(entry, 0, size, 7).tolist() == plain.ids(entry, 0, size).tolist()
        assert weighted.block(entry) == plain.block(entry)


def test_rows_are_those_of_the_ids(unequal_store):
    cells = np.random.default_rng(3).permutation(2065)[:1500]
    selection = Selection(unequal_store.store, cells, {"s0": 1.3, "s2": 0.4, "s4": 0}, seed=1)
    for entry, size in enumerate(selection.block_sizes.tolist()):
        for start, stop in ((0, size), (size // 3, size)):
            ids = selection.ids(entry, start, stop, 2)
            rows = selection.read(entry, start, stop, 2)
            found = rows_of([(ids, rows)])
            assert found == {cell: unequal_store.row(cell) for cell in ids.tolist()}


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "2", None, True, [1]])
def test_a_weight_that_is_none_is_refused(tiny_store, weight):
    with pytest.raises(ConfigError, match=r"for the sample 's1'; expected a number from 0 on"):
        Selection(tiny_store.store, weights={"s1": weight})


def test_weights_that_cannot_be_meant_are_refused(tiny_store):
    with pytest.raises(
        InputError, match=r"weights name the sample 'S1', which is not there; there are s0, s1;"
    ):
        Selection(tiny_store.store, weights={"s0": 1, "S1": 2})
    with pytest.raises(InputError, match="the weights leave none of 13 cells a turn"):
        Selection(tiny_store.store, weights={"s0": 0, "s1": 0.1})
    with pytest.raises(
        ConfigError, match=r"ask for more than 67,108,864 turns of blocks in an epoch; choose smaller"
    ):
        Selection(tiny_store.store, weights={"s0": 1e300})
