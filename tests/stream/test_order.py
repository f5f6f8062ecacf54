import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annatac_scale.errors import ConfigError
from annatac_scale.stream.order import EpochOrder, default_lanes

WORLD_SIZES = (1, 2, 3, 4, 8, 16)


@st.composite
def orders(draw):
    lanes = draw(st.sampled_from([1, 2, 3, 4, 8, 9, 16]))
    return EpochOrder(
        block_sizes=np.array(draw(st.lists(st.integers(0, 7), max_size=60)), np.int64),
        global_batch=lanes * draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**70)),
        lanes=lanes,
        window_cells=draw(st.integers(1, 12)),
    )


epochs = st.integers(0, 5)


def batches_of(plan, rank=0, world_size=1, first_step=0):
    """A rank's batches, as a loader makes them: one table, from which nothing is taken twice."""
    ranks = plan.of_rank(rank, world_size)
    table = np.full(ranks.n_slots, -1)
    loads, leaves = ranks.loads(first_step), {}
    for step in range(first_step, plan.order.n_steps):
        while loads and loads[0].step == step:
            load = loads.pop(0)
            slots, cells, steps = ranks.slots_of(load), plan.cells(load.window), ranks.steps_of(load)
            own = steps >= first_step
            assert (table[slots[own]] == -1).all()
            table[slots[own]] = cells[own]
            leaves |= dict(zip(cells[own].tolist(), steps[own].tolist(), strict=True))
        taken = ranks.slots(step)
        assert {leaves.pop(cell) for cell in table[taken].tolist()} <= {step}
        yield table[taken].tolist()
        table[taken] = -1
    assert not loads
    assert not leaves


def all_batches(order, epoch, world_size=1):
    """[step][rank] -> cells."""
    plan = order.epoch(epoch)
    ranks = [list(batches_of(plan, rank, world_size)) for rank in range(world_size)]
    return [list(step) for step in zip(*ranks, strict=True)]


def shuffled(items, seed, *key):
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(len(items)).tolist()
    return [item for _, item in sorted(zip(words, items, strict=True))]


def plain_global_batches(order, epoch):
    """The module's text as lists and loops."""
    blocks, cell = [], 0
    for size in order.block_sizes.tolist():
        blocks.append(list(range(cell, cell + size)))
        cell += size
    blocks = shuffled([block for block in blocks if block], order.seed, epoch, 0)
    line = [cell for block in blocks for cell in block]
    borders = np.cumsum([len(block) for block in blocks]).tolist()
    n, size, n_lanes = len(line), order.global_batch, order.lanes
    if n <= n_lanes * order.window_cells:
        line = shuffled(line, order.seed, epoch, 1, 0)
        return [line[start : start + size] for start in range(0, n, size)]
    lanes = []
    for lane in range(n_lanes):
        start, stop = n * lane // n_lanes, n * (lane + 1) // n_lanes
        windows, limit = [[start]], order.window_cells - lane * order.window_cells // n_lanes
        for position in range(start + 1, stop):
            if position in borders and position - start >= limit:
                windows.append([])
                while position - start >= limit:
                    limit += order.window_cells
            windows[-1].append(position)
        cells = []
        for window in windows:
            cells += shuffled([line[position] for position in window], order.seed, epoch, 1, window[0])
        lanes.append(cells)
    share = size // n_lanes
    steps = range(-(-n // size))
    return [[cell for lane in lanes for cell in lane[t * share : (t + 1) * share]] for t in steps]


@settings(deadline=None)
@given(orders(), epochs)
def test_global_batches_are_those_of_the_rule_in_plain_loops(order, epoch):
    assert [step[0] for step in all_batches(order, epoch)] == plain_global_batches(order, epoch)


@settings(deadline=None)
@given(orders(), epochs, st.sampled_from(WORLD_SIZES))
def test_every_cell_comes_exactly_once_in_an_epoch(order, epoch, world_size):
    world_size = min(world_size, order.lanes)
    cells = [cell for step in all_batches(order, epoch, world_size) for rank in step for cell in rank]
    assert sorted(cells) == list(range(order.n_cells))


@settings(deadline=None)
@given(orders(), epochs)
def test_the_global_batch_and_its_order_are_the_same_for_every_world_size(order, epoch):
    alone = [step[0] for step in all_batches(order, epoch)]
    for world_size in (size for size in WORLD_SIZES if size <= order.lanes):
        for whole, ranks in zip(alone, all_batches(order, epoch, world_size), strict=True):
            assert sorted(cell for rank in ranks for cell in rank) == sorted(whole)
            for rank in ranks:
                assert [cell for cell in whole if cell in set(rank)] == rank


@settings(deadline=None)
@given(orders(), epochs)
def test_all_batches_but_the_last_are_full_and_lanes_give_equal_shares(order, epoch):
    sizes = [[len(rank) for rank in ranks] for ranks in all_batches(order, epoch, order.lanes)]
    assert [sum(step) for step in sizes[:-1]] == [order.global_batch] * (order.n_steps - 1)
    assert all(len(set(step)) == 1 for step in sizes[:-1])
    assert all(max(step) - min(step) <= 1 for step in sizes[-1:])


@settings(deadline=None)
@given(orders(), epochs, st.data())
def test_any_step_on_any_rank_is_found_without_the_steps_before_it(order, epoch, data):
    if order.n_steps:
        step = data.draw(st.integers(0, order.n_steps - 1))
        world_size = data.draw(st.integers(1, order.lanes))
        rank = data.draw(st.integers(0, world_size - 1))
        run = all_batches(order, epoch, world_size)
        again = EpochOrder(
            order.block_sizes.copy(), order.global_batch, order.seed, order.lanes, order.window_cells
        )
        rest = list(batches_of(again.epoch(epoch), rank, world_size, step))
        assert rest == [ranks[rank] for ranks in run[step:]]


@settings(deadline=None)
@given(orders(), epochs)
def test_windows_bound_what_a_rank_holds_and_blocks_are_read_once_but_at_lane_borders(order, epoch):
    plan = order.epoch(epoch)
    windows = [load.window for load in plan.of_rank().loads()]
    reads = np.zeros(len(order.block_sizes), int)
    for window in windows:
        runs = plan.runs(window)
        assert sum(run.stop - run.start for run in runs) == window.stop - window.start
        assert all(0 <= run.start < run.stop <= order.block_sizes[run.block] for run in runs)
        if plan.is_one_window:
            assert window.stop - window.start <= order.lanes * order.window_cells
        else:
            assert window.stop - window.start < order.window_cells + order.block_sizes.max()
        for run in runs:
            reads[run.block] += 1
    assert (reads[order.block_sizes > 0] >= 1).all()
    assert reads.sum() <= np.count_nonzero(order.block_sizes) + order.lanes - 1


@settings(deadline=None)
@given(orders(), epochs, st.integers(1, 9))
def test_loads_say_which_steps_need_a_window_and_come_in_their_order(order, epoch, world_size):
    world_size = min(world_size, order.lanes)
    plan = order.epoch(epoch)
    for rank in range(world_size):
        batches = list(batches_of(plan, rank, world_size))
        loads = plan.of_rank(rank, world_size).loads()
        assert [load.step for load in loads] == sorted(load.step for load in loads)
        for load in loads:
            cells = set(plan.cells(load.window).tolist())
            needed = [step for step, batch in enumerate(batches) if cells & set(batch)]
            if plan.is_one_window:  # all ranks hold it, even one that gets none of the last cells
                assert load.step == 0
            else:
                assert needed == list(range(load.step, needed[-1] + 1))


@settings(deadline=None)
@given(orders(), epochs, st.integers(1, 9))
def test_a_table_has_slots_for_one_window_and_a_share_of_each_lane(order, epoch, world_size):
    world_size = min(world_size, order.lanes)
    plan = order.epoch(epoch)
    for rank in range(world_size):
        n_slots = plan.of_rank(rank, world_size).n_slots
        if plan.is_one_window:
            assert n_slots == order.n_cells
        else:
            widest = order.window_cells + order.block_sizes.max() - 1
            share = order.global_batch // order.lanes
            assert n_slots <= -(-(order.lanes - rank) // world_size) * (widest + share)


def test_epochs_and_seeds_differ_in_blocks_and_cells():
    def first(seed, epoch, sizes, window_cells):
        return next(batches_of(EpochOrder(np.array(sizes), 4, seed, 2, window_cells).epoch(epoch)))

    for sizes, window_cells in (([50], 100), ([1] * 50, 1), ([5] * 50, 10)):
        batches = [tuple(first(s, e, sizes, window_cells)) for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))]
        assert len(set(batches)) == 4


def test_a_batch_of_a_sorted_store_draws_from_as_many_blocks_as_there_are_lanes():
    order = EpochOrder(np.full(400, 250), 64, 3, 32, 1000)
    for step in (0, 500, 1500):
        blocks = {cell // 250 for cell in next(batches_of(order.epoch(0), first_step=step))}
        assert len(blocks) >= 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 7}, "lanes = 7 does not divide the global batch of 12: choose lanes among 2, 3, 4, 6,"),
        ({"global_batch": 0}, "global_batch = 0: expected at least 1"),
        ({"window_cells": 0}, "window_cells = 0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_what_to_choose(changes, message):
    options = {"block_sizes": np.ones(3, int), "global_batch": 12, "seed": 0, "lanes": 4, "window_cells": 5}
    with pytest.raises(ConfigError, match=message):
        EpochOrder(**(options | changes))


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (0, 5, "world size 5 is more than the 4 lanes"),
        (2, 2, "rank = 2: expected 0 to 1"),
        (-1, 2, "rank = -1"),
    ],
)
def test_ranks_that_do_not_exist_are_refused(rank, world_size, message):
    order = EpochOrder(np.ones(3, int), 12, 0, 4, 5)
    with pytest.raises(ConfigError, match=message):
        order.epoch(0).of_rank(rank, world_size)


@pytest.mark.parametrize(
    ("global_batch", "lanes"), [(900, 36), (256, 32), (32, 32), (30, 30), (97, 97), (1, 1)]
)
def test_default_lanes_divide_the_global_batch(global_batch, lanes):
    assert default_lanes(global_batch) == lanes
