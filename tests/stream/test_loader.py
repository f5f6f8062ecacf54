import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from known_stores import write_store
from obs_stores import obs_store

from annatac_scale.errors import AnnatacError, ConfigError, InputError, ModelError
from annatac_scale.store.obs import replace_obs
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Folder
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter
from annatac_scale.stream.buffers import BufferPool
from annatac_scale.stream.loader import BatchStream
from annatac_scale.stream.reader import RankReader
from annatac_scale.stream.split import Split
from annatac_scale.stream.vocabulary import Vocabulary

# 2,065 cells in 4 lanes of at most 250 (lanes), or together (one_window).
LANES = {"global_batch_size": 48, "seed": 5, "lanes": 4, "window": 1}
ONE_WINDOW = {"global_batch_size": 48, "seed": 5, "lanes": 4, "window": 4}
OPTIONS = [pytest.param(LANES, id="lanes"), pytest.param(ONE_WINDOW, id="one_window")]


def rows_of(batch):
    """cell id -> {island: token}"""
    rows = {}
    for index, cell in enumerate(batch.cell_ids.tolist()):
        row = slice(batch.offsets[index], batch.offsets[index + 1])
        rows[cell] = dict(zip(batch.islands[row].tolist(), batch.tokens[row].tolist(), strict=True))
    return rows


def ids(batches):
    return [batch.cell_ids.tolist() for batch in batches]


def streams(known, options, world_size, **more):
    return [
        BatchStream(known.store, rank=rank, world_size=world_size, **options, **more)
        for rank in range(world_size)
    ]


def stream_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("island-stream")]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_epoch_gives_every_cell_once_with_its_open_islands(unequal_store, options, world_size):
    rows = {}
    for stream in streams(unequal_store, options, world_size):
        batches = list(stream)
        assert len(batches) == len(stream) == -(-2065 // 48)
        for batch in batches:
            rows_here = rows_of(batch)
            assert len(rows_here) == len(batch)
            assert not rows_here.keys() & rows.keys()
            rows |= rows_here
    assert rows == {cell: unequal_store.row(cell) for cell in range(2065)}


@pytest.mark.parametrize("options", OPTIONS)
def test_global_batches_are_the_same_for_every_world_size(unequal_store, options):
    (alone,) = streams(unequal_store, options, 1)
    whole = ids(alone)
    for world_size in (2, 3, 4):
        ranks = [ids(stream) for stream in streams(unequal_store, options, world_size)]
        joined = [sorted(cell for rank in step for cell in rank) for step in zip(*ranks, strict=True)]
        assert joined == [sorted(step) for step in whole]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("stop", [0, 1, 20, 43, 44])
def test_a_stream_resumes_at_any_step_at_another_world_size(unequal_store, options, stop):
    seen, states = [], []
    for stream in streams(unequal_store, options, 3):
        stream.set_epoch(2)
        seen += [
            cell for _, batch in zip(range(stop), stream, strict=False) for cell in batch.cell_ids.tolist()
        ]
        states.append(stream.state_dict())
    assert states == [{"seed": 5, "epoch": 2, "step": stop, "order": states[0]["order"]}] * 3
    (whole,) = streams(unequal_store, options, 1)
    whole.set_epoch(2)
    uninterrupted = ids(whole)
    for stream in streams(unequal_store, options | {"seed": 1}, 2):
        stream.load_state_dict(states[0])
        stream.set_epoch(2)
        rest = ids(stream)
        assert len(rest) == 44 - stop
        for step, cells in zip(uninterrupted[stop:], rest, strict=True):
            assert set(cells) <= set(step)
        seen += [cell for cells in rest for cell in cells]
    assert sorted(seen) == list(range(2065))


def test_the_state_counts_batches_handed_out_and_not_those_read_ahead(unequal_store):
    (stream,) = streams(unequal_store, LANES, 1)
    iterator = iter(stream)
    for step in range(3):
        assert stream.state_dict()["step"] == step
        next(iterator)
    assert {**stream.state_dict(), "order": 0} == {"seed": 5, "epoch": 0, "step": 3, "order": 0}


def test_after_an_epoch_comes_the_next_one_in_another_order(unequal_store):
    (stream,) = streams(unequal_store, LANES, 1)
    first, second = ids(stream), ids(stream)
    assert {**stream.state_dict(), "order": 0} == {"seed": 5, "epoch": 2, "step": 0, "order": 0}
    assert first != second
    stream.set_epoch(0)
    assert ids(stream) == first
    stream.set_epoch(1)
    assert ids(stream) == second


def test_a_broken_off_epoch_goes_on_where_it_stopped(unequal_store):
    (stream,) = streams(unequal_store, LANES, 1)
    whole = ids(stream)
    stream.set_epoch(0)
    begun = [batch.cell_ids.tolist() for _, batch in zip(range(7), stream, strict=False)]
    assert begun + ids(stream) == whole


@pytest.mark.parametrize("options", OPTIONS)
def test_only_the_given_cells_come(unequal_store, options):
    cells = np.random.default_rng(3).permutation(2065)[:1300]
    rows = {}
    for stream in streams(unequal_store, options, 2, cells=cells):
        for batch in stream:
            rows |= rows_of(batch)
    assert rows == {cell: unequal_store.row(cell) for cell in cells.tolist()}


def test_a_vocabulary_renumbers_the_islands_and_drops_the_others(unequal_store):
    kept = [3, 4, 9, 20, 39]
    vocabulary = Vocabulary(unequal_store.store.islands_sha256, 40, np.array(kept, np.int32))
    for batch in BatchStream(unequal_store.store, vocabulary=vocabulary, **LANES):
        for cell, row in rows_of(batch).items():
            known = unequal_store.row(cell)
            assert row == {kept.index(island): level for island, level in known.items() if island in kept}


def test_ranks_without_cells_in_a_step_get_an_empty_batch(tiny_store):
    options = {"global_batch_size": 4, "seed": 0, "lanes": 4}
    batches = [list(stream) for stream in streams(tiny_store, options, 4)]
    assert [len(rank) for rank in batches] == [4] * 4
    sizes = [sorted(len(rank[step]) for rank in batches) for step in range(4)]
    assert sizes == [[1, 1, 1, 1]] * 3 + [[0, 0, 0, 1]]
    empty = next(rank[3] for rank in batches if len(rank[3]) == 0)
    assert empty.offsets.tolist() == [0]
    assert empty.islands.tolist() == []


def test_a_stream_of_no_cells_has_no_steps(tiny_store):
    stream = BatchStream(tiny_store.store, cells=np.empty(0, int), global_batch_size=4, seed=0)
    assert len(stream) == 0
    assert list(stream) == []


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_holds_no_more_than_a_window_of_each_of_its_lanes(unequal_store, world_size):
    (stream,) = streams(unequal_store, LANES, 1)
    plan = stream._arrangement.order.epoch(0)
    most_bytes = 40  # of a row: islands side by side take a byte each
    share, window = 48 // 4, 250 + 250
    options = {"threads": 2, "ahead": 1, "buffers": BufferPool()}
    with RankReader(stream._arrangement.selection, plan, plan.of_rank(0, world_size), 0, **options) as reader:
        for step in range(len(stream)):
            reader.batch(step)
            held = sum(len(buffer) for buffers in reader._held.values() for buffer in buffers)
            assert held <= 4 // world_size * (window + share) * most_bytes * 33 / 32
            assert len(reader._reads) <= 1


def test_dropping_the_iterator_ends_its_thread(unequal_store):
    assert stream_threads() == []
    (stream,) = streams(unequal_store, LANES, 1)
    iterator = iter(stream)
    next(iterator)
    assert len(stream_threads()) > 1
    del iterator
    assert stream_threads() == []
    for _ in stream:
        break
    assert stream_threads() == []
    list(stream)
    assert stream_threads() == []


def test_memory_is_not_given_away_while_the_batch_ahead_is_made_from_it(unequal_store):
    stream = BatchStream(unequal_store.store, **LANES)
    free = []

    def make(ids, rows):
        time.sleep(0.1)
        free.append(len(stream._buffers._free))

    batches = stream._each(make)
    next(batches)
    batches.close()
    assert free == [0, 0]
    assert stream._buffers._free


def test_a_damaged_block_is_an_error_of_the_batch_and_leaves_no_thread(unequal_store, tmp_path):
    copy = tmp_path / "damaged.zarr"
    shutil.copytree(unequal_store.store.path, copy)
    shard = copy / "samples" / "s4" / "X" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 255
    shard.write_bytes(data)
    stream = BatchStream(copy, **LANES)
    with pytest.raises(AnnatacError, match="s4"):
        list(stream)
    assert stream_threads() == []


def test_a_path_opens_the_store(tiny_store):
    stream = BatchStream(str(tiny_store.store.path), global_batch_size=20, seed=0)
    assert isinstance(stream.store, IslandStore)
    (batch,) = stream
    assert sorted(batch.cell_ids.tolist()) == list(range(13))


def test_options_and_stores_that_do_not_fit_are_refused(tiny_store):
    with pytest.raises(ConfigError, match="lanes = 3 does not divide the global batch of 4"):
        BatchStream(tiny_store.store, global_batch_size=4, seed=0, lanes=3)
    with pytest.raises(ConfigError, match="world size 5"):
        BatchStream(tiny_store.store, global_batch_size=4, seed=0, world_size=5)
    with pytest.raises(InputError, match="no cell 13"):
        BatchStream(tiny_store.store, cells=np.array([13]), global_batch_size=4, seed=0)
    other = Vocabulary("0" * 64, 40, np.array([1], np.int32))
    with pytest.raises(ModelError, match="sha256"):
        BatchStream(tiny_store.store, vocabulary=other, global_batch_size=4, seed=0)
    stream = BatchStream(tiny_store.store, global_batch_size=4, seed=0)
    with pytest.raises(ConfigError, match="step 5 of 4 in epoch 0"):
        stream.load_state_dict({**stream.state_dict(), "step": 5})
    state = stream.state_dict()
    for wrong, what in (
        ({"step": "5"}, "step = '5'"), ({"epoch": -1}, "in epoch -1"), ({"seed": 1.5}, "seed = 1.5"),
        ({"order": None}, "order = None"), ({"order": {}}, "global_batch_size = None"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=what):
            stream.load_state_dict({**state, **wrong})
    for option in ("threads", "window", "lanes", "global_batch_size"):
        with pytest.raises(ConfigError, match=f"{option} = 0: expected at least 1"):
            BatchStream(tiny_store.store, **{"global_batch_size": 4, "seed": 0, option: 0})
    with pytest.raises(ConfigError, match="epoch = -1"):
        stream.set_epoch(-1)


def test_batches_carry_the_obs_columns_that_were_asked_for(tmp_path):
    known = write_store(tmp_path / "labelled.zarr", [9, 4])
    labels = pd.Categorical.from_codes([0, 1, -1] * 3, ["B cell", "T cell"])
    barcodes = pd.Index([f"s0-{i}" for i in range(9)], name="barcode")
    replace_obs(known.store.path, "s0", pd.DataFrame({"type": labels, "depth": np.arange(9) * 1.5}, barcodes))
    stream = BatchStream(known.store.path, global_batch_size=5, seed=0, obs=["type", "depth", "sample"])
    assert stream.categories == {"type": ["B cell", "T cell"], "sample": ["s0", "s1"]}
    for batch in [*stream, *stream.encoded()]:
        for row, cell in enumerate(batch.cell_ids.tolist()):
            found = {name: values[row] for name, values in batch.obs.items()}
            assert found["sample"] == (cell >= 9)
            assert found["type"] == ([0, 1, -1][cell % 3] if cell < 9 else -1)
            if cell < 9:
                assert found["depth"] == cell * 1.5
            else:
                assert np.isnan(found["depth"])
        assert batch.obs["type"].dtype == np.int32


def test_truth_values_that_a_sample_lacks_are_numbers_too(tmp_path):
    some, none = pd.DataFrame({"doublet": [True, False, True]}), pd.DataFrame({"other": [1, 2]})
    stream = BatchStream(
        obs_store(tmp_path / "s", a=some, b=none), global_batch_size=5, seed=0, obs=["doublet"]
    )
    (batch,) = stream
    assert batch.obs["doublet"].dtype == np.int8
    assert dict(zip(batch.cell_ids, batch.obs["doublet"], strict=True)) == {0: 1, 1: 0, 2: 1, 3: -1, 4: -1}


def test_a_resumed_stream_has_columns_as_the_samples_of_its_state_have_them(tmp_path):
    store = obs_store(tmp_path / "growing.zarr", a=pd.DataFrame({"age": [31.0, 47.0]}))
    options = {"global_batch_size": 2, "seed": 0, "obs": ["age"]}
    state = BatchStream(store, **options).state_dict()
    with SampleWriter(store.path, "late", 1) as writer:
        writer.write_shard(0, OpenIslands.empty(1))
        writer.commit(pd.DataFrame({"age": ["old"]}, ["late0"]), np.ones(store.n_islands, bool), {})
    again = BatchStream(store.path, **options)
    assert again.categories["age"] == ["31", "47", "old"]
    again.load_state_dict(state)
    (batch,) = again
    assert not again.categories
    assert sorted(batch.obs["age"]) == [31.0, 47.0]


def test_conditions_splits_and_cells_are_taken_together(unequal_store):
    cells = np.arange(0, 2065, 2)
    options = {"where": "sample in ['s0', 's4']", "cells": cells, **LANES}
    sides = [
        {cell for batch in BatchStream(unequal_store.store, split=Split(part, 0.3), **options)
         for cell in batch.cell_ids.tolist()}
        for part in ("train", "validation")
    ]  # fmt: skip
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {cell for cell in cells.tolist() if cell < 700 or cell >= 964}
    assert 0.2 < len(sides[1]) / len(sides[0] | sides[1]) < 0.4


def test_weights_say_how_often_a_cell_comes_in_an_epoch(unequal_store):
    for rank_count in (1, 3):
        turns = Counter()
        for stream in streams(unequal_store, LANES, rank_count, weights={"s0": 2, "s1": 0, "s4": 0.5}):
            assert len(stream) == -(-stream.n_cells // 48)
            for batch in stream:
                turns.update(batch.cell_ids.tolist())
        assert [turns[cell] for cell in range(703)] == [2] * 700 + [0] * 3
        assert [turns[cell] for cell in range(703, 964)] == [1] * 261
        assert sum(turns[cell] for cell in range(964, 2065)) in (550, 551)
        assert max(turns[cell] for cell in range(964, 2065)) == 1


def test_samples_that_were_added_since_stay_out_of_a_resumed_stream(tmp_path):
    known = write_store(tmp_path / "growing.zarr", [300, 40])
    stream = BatchStream(known.store.path, global_batch_size=16, seed=3)
    whole = ids(stream)
    stream.set_epoch(0)
    begun = [batch.cell_ids.tolist() for _, batch in zip(range(5), stream, strict=False)]
    with SampleWriter(known.store.path, "late", 50) as writer:
        writer.write_shard(0, OpenIslands.empty(50))
        obs = pd.DataFrame(index=pd.Index([f"late-{i}" for i in range(50)], name="barcode"))
        writer.commit(obs, np.ones(40, bool), {})
    again = BatchStream(known.store.path, global_batch_size=16, seed=0)
    assert again.n_cells == 390
    again.load_state_dict(stream.state_dict())
    assert again.n_cells == 340
    assert begun + ids(again) == whole


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"global_batch_size": 24}, "global_batch_size 48, here 24"),
        ({"lanes": 8}, "lanes 4, here 8"),
        ({"window": 2}, "window 1, here 2"),
        ({"cells": np.arange(7)}, "cells "),
        ({"where": "sample == 's0'"}, "cells "),
        ({"weights": {"s0": 2}}, "cells "),
    ],
)
def test_a_state_of_another_order_is_refused_with_what_differs(unequal_store, changes, what):
    state = BatchStream(unequal_store.store, **LANES).state_dict()
    other = BatchStream(unequal_store.store, **(LANES | changes))
    with pytest.raises(ConfigError, match=what):
        other.load_state_dict(state)


def test_a_state_of_another_store_is_refused(unequal_store, tmp_path):
    state = BatchStream(unequal_store.store, **LANES).state_dict()
    other = write_store(tmp_path / "other.zarr", [700, 3, 260, 1, 1101], seed=9)
    with pytest.raises(ConfigError, match="samples "):
        BatchStream(other.store, **LANES).load_state_dict(state)
    fewer = write_store(tmp_path / "fewer.zarr", [700, 3])
    with pytest.raises(ConfigError, match="n_samples 5, here 2"):
        BatchStream(fewer.store, **LANES).load_state_dict(state)


def test_a_refused_state_leaves_the_stream_as_it_was(unequal_store):
    stream = BatchStream(unequal_store.store, **LANES)
    before = stream.state_dict()
    state = {**BatchStream(unequal_store.store, **(LANES | {"lanes": 8})).state_dict(), "seed": 99, "step": 3}
    with pytest.raises(ConfigError):
        stream.load_state_dict(state)
    assert stream.state_dict() == before


def test_encoded_batches_are_the_same_batches(unequal_store):
    stream = BatchStream(unequal_store.store, **LANES)
    encoded = list(stream.encoded())
    stream.set_epoch(0)
    for batch, still in zip(stream, encoded, strict=True):
        assert rows_of(still.decode()) == rows_of(batch)
        assert still.decode().cell_ids.tolist() == batch.cell_ids.tolist()


def test_a_stream_gives_the_cells_of_its_plan_in_their_order(unequal_store):
    chosen = np.sort(np.random.default_rng(3).permutation(2065)[:1300])
    for options in (LANES, ONE_WINDOW, LANES | {"cells": chosen}):
        (stream,) = streams(unequal_store, options, 1)
        plan = stream._arrangement.order.epoch(0)
        ids_of_plan = options.get("cells", np.arange(2065))
        steps = {}
        for load in plan.of_rank().loads():
            of_window = ids_of_plan[plan.cells(load.window)].tolist()
            for step, cell in zip(plan.of_rank().steps_of(load).tolist(), of_window, strict=True):
                steps.setdefault(step, []).append(cell)
        assert [sorted(batch.cell_ids.tolist()) for batch in stream] == [
            sorted(steps[step]) for step in range(len(stream))
        ]


def test_a_newer_state_is_taken_after_an_older_one(tmp_path):
    known = write_store(tmp_path / "growing.zarr", [300])
    old = BatchStream(known.store.path, global_batch_size=16, seed=3).state_dict()
    with SampleWriter(known.store.path, "late", 50) as writer:
        writer.write_shard(0, OpenIslands.empty(50))
        obs = pd.DataFrame(index=pd.Index([f"late-{i}" for i in range(50)], name="barcode"))
        writer.commit(obs, np.ones(40, bool), {})
    stream = BatchStream(known.store.path, global_batch_size=16, seed=3)
    new = stream.state_dict()
    stream.load_state_dict(old)
    assert stream.n_cells == 300
    stream.load_state_dict(new)
    assert stream.n_cells == 350


def test_blocks_of_a_window_that_lie_side_by_side_are_read_together(tmp_path, monkeypatch):
    known = write_store(tmp_path / "side.zarr", [8000])
    asked = []
    read_range = Folder.read_range

    def counted(self, name, start, length):
        asked.append(name)
        return read_range(self, name, start, length)

    monkeypatch.setattr(Folder, "read_range", counted)
    stream = BatchStream(known.store, global_batch_size=64, seed=0, window=16, threads=1)
    assert sum(len(batch) for batch in stream) == 8000
    for shard in ("c/0/0", "c/1/0"):
        assert asked.count(shard) == 2  # the index, and all 16 blocks


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_read_keeps_no_memory_for_cells_that_are_not_needed(unequal_store, options):
    (stream,) = streams(unequal_store, options, 1, cells=np.arange(0, 2065, 50))
    plan = stream._arrangement.order.epoch(0)
    options = {"threads": 1, "ahead": 1, "buffers": BufferPool()}
    with RankReader(stream._arrangement.selection, plan, plan.of_rank(), 0, **options) as reader:
        reader._read_ahead()
        while reader._windows:
            for group in reader._windows.popleft().groups:
                for _, _, rows in reader._cells(group):
                    assert sum(map(len, rows.owners)) == rows.sizes.sum()


def test_a_rank_holds_no_rows_of_the_other_ranks(unequal_store):
    for rank, stream in enumerate(streams(unequal_store, ONE_WINDOW, 4)):
        plan = stream._arrangement.order.epoch(0)
        options = {"threads": 1, "ahead": 1, "buffers": BufferPool()}
        ranks = plan.of_rank(rank, 4)
        with RankReader(stream._arrangement.selection, plan, ranks, 0, **options) as reader:
            reader._read_ahead()
            (window,) = reader._windows
            held = sum(len(ids) for group in window.groups for _, ids, _ in reader._cells(group))
        assert held == sum(len(batch) for batch in stream)


@pytest.mark.parametrize("options", OPTIONS)
def test_few_chosen_cells_of_each_block_are_held_without_the_others(unequal_store, options):
    (stream,) = streams(unequal_store, options, 1, cells=np.arange(0, 2065, 50))
    plan = stream._arrangement.order.epoch(0)
    with RankReader(
        stream._arrangement.selection, plan, plan.of_rank(), 0, threads=1, ahead=1, buffers=BufferPool()
    ) as reader:
        reader.batch(0)
        held = [buffer for buffers in reader._held.values() for buffer in buffers]
        assert sum(map(len, held)) <= 42 * 40 * 33 / 32


def test_a_store_in_object_storage_streams_like_one_on_disk(unequal_store, s3):
    from annatac_scale.store.place import place_of

    bucket = s3.bucket()
    for path in Path(unequal_store.store.path).rglob("*"):
        if path.is_file():
            place_of(f"{bucket}/atlas.zarr").write(
                str(path.relative_to(unequal_store.store.path)), path.read_bytes()
            )
    (local,) = streams(unequal_store, LANES, 1)
    remote = BatchStream(f"{bucket}/atlas.zarr", **LANES)
    for batch, again in zip(local, remote, strict=True):
        assert batch.cell_ids.tolist() == again.cell_ids.tolist()
        assert rows_of(batch) == rows_of(again)
