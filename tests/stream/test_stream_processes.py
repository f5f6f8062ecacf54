"""The stream in processes of its own: killed and resumed, forked, spawned, as a DataLoader's worker, in Ray actors."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from known_stores import open_islands, small_space, write_store
from torch.utils.data import DataLoader

from annatac_scale.store.writer import SampleWriter, create_store
from annatac_scale.stream.dataset import IslandStream

SCRIPT = Path(__file__).with_name("stream_process.py")
OPTIONS = {"global_batch_size": 48, "seed": 5, "lanes": 4, "window": 1}
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("processes") / "known.zarr", [700, 3, 260, 1, 1101])


def start(store, state, rank, world_size):
    command = [sys.executable, str(SCRIPT), str(store), state, str(rank), str(world_size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def killed_after(store, state, rank, world_size, n_batches):
    """What a rank handed out before it was killed with SIGKILL."""
    with start(store, state, rank, world_size) as process:
        batches = [json.loads(process.stdout.readline()) for _ in range(n_batches)]
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return batches


def rest_of(store, state, rank, world_size):
    with start(store, state, rank, world_size) as process:
        lines = process.stdout.read().splitlines()
    assert process.returncode == 0
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_killed_run_goes_on_at_another_world_size_without_repeats_or_gaps(known, seed):
    draw = random.Random(seed)
    done, state, step = [], "-", 0
    for _ in range(3):
        world_size = draw.choice([1, 2, 3, 4])
        n_batches = draw.randint(1, 12)
        ranks = [
            killed_after(known.store.path, state, rank, world_size, n_batches) for rank in range(world_size)
        ]
        done += [cell for batches in ranks for batch in batches for cell in batch["cells"]]
        states = {json.dumps(batches[-1]["state"]) for batches in ranks}
        assert len(states) == 1
        (state,) = states
        step += n_batches
        assert json.loads(state)["step"] == step
    done += [cell for batch in rest_of(known.store.path, state, 0, 1) for cell in batch["cells"]]
    assert sorted(done) == list(range(2065))


def test_a_killed_process_leaves_no_file_and_no_shared_memory(known):
    def there():
        shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
        return set(Path(known.store.path).rglob("*")), shared

    before = there()
    killed_after(known.store.path, "-", 0, 1, 5)
    files, shared = there()
    assert files == before[0]
    assert not {name for name in shared - before[1] if "annatac" in name or "island" in name}


def ids_of(batches):
    return [batch.cell_ids.tolist() for batch in batches]


def put_epoch(stream, answers):
    answers.put((ids_of(stream), stream.state_dict()["epoch"]))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_stream_works_in_a_process_started_any_way_though_it_was_used_before(known, method):
    stream = IslandStream(known.store, **OPTIONS)
    expected = ids_of(stream)
    stream.set_epoch(0)
    half = iter(stream)
    first = next(half).cell_ids.tolist()
    assert first == expected[0]
    stream.load_state_dict({**stream.state_dict(), "step": 0})
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=put_epoch, args=(stream, answers))
    process.start()
    try:
        assert answers.get(timeout=TIMEOUT_S) == (expected, 1)
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
    finally:
        process.kill()
        half.close()


@pytest.mark.parametrize(
    ("method", "n_workers"), [("fork", 1), ("fork", 2), ("fork", 3), ("spawn", 2), ("forkserver", 2)]
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
def test_a_data_loader_gives_the_same_batches_in_the_same_order(known, method, n_workers):
    stream = IslandStream(known.store, obs=["sample"], **OPTIONS)
    loader = DataLoader(stream, batch_size=None, num_workers=n_workers, multiprocessing_context=method)
    loaded = list(loader)
    assert len(loader) == len(loaded) == len(stream)
    for batch, again in zip(stream, loaded, strict=True):
        assert batch.cell_ids.tolist() == again.cell_ids.tolist()
        assert batch.islands.tolist() == again.islands.tolist()
        assert batch.levels.tolist() == again.levels.tolist()
        assert batch.obs["sample"].tolist() == again.obs["sample"].tolist()


def test_a_data_loader_without_workers_is_resumed_by_the_streams_own_state(known):
    stream = IslandStream(known.store, **OPTIONS)
    expected = ids_of(stream)
    stream.set_epoch(0)
    seen = []
    for batch in DataLoader(stream, batch_size=None):
        seen.append(batch.cell_ids.tolist())
        if len(seen) == 9:
            break
    again = IslandStream(known.store, **OPTIONS)
    again.load_state_dict(stream.state_dict())
    assert seen + ids_of(DataLoader(again, batch_size=None)) == expected


def test_a_data_loader_with_workers_is_resumed_by_the_number_of_batches_seen(known):
    stream = IslandStream(known.store, **OPTIONS)
    expected = ids_of(stream)
    stream.set_epoch(0)
    iterator = iter(DataLoader(stream, batch_size=None, num_workers=2))
    seen = [next(iterator).cell_ids.tolist() for _ in range(9)]
    del iterator
    again = IslandStream(known.store, **OPTIONS)
    again.load_state_dict({**stream.state_dict(), "step": len(seen)})
    assert seen + ids_of(DataLoader(again, batch_size=None, num_workers=2)) == expected


def test_workers_that_stay_go_on_to_the_next_epoch(known):
    stream = IslandStream(known.store, **OPTIONS)
    two = [ids_of(stream), ids_of(stream)]
    stream.set_epoch(0)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    assert [ids_of(loader), ids_of(loader)] == two


def test_workers_that_stay_go_on_to_the_next_epoch_after_a_pass_that_was_broken_off(known):
    stream = IslandStream(known.store, **OPTIONS)
    stream.set_epoch(1)
    next_epoch = ids_of(stream)
    stream.set_epoch(0)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    for n_seen, _ in enumerate(loader):
        if n_seen == 4:
            break
    assert ids_of(loader) == next_epoch


def test_a_stream_is_a_torch_dataset(known):
    assert isinstance(IslandStream(known.store, **OPTIONS), torch.utils.data.IterableDataset)


def test_many_begun_and_dropped_epochs_leave_no_threads_or_open_files(known):
    stream = IslandStream(known.store, **OPTIONS)
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(20):
        for _ in stream:
            break
        stream.load_state_dict({**stream.state_dict(), "step": 0})
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_consumer_that_raises_leaves_no_threads(known):
    def consume():
        for _ in IslandStream(known.store, **OPTIONS):
            raise ZeroDivisionError

    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        consume()
    deadline = time.monotonic() + TIMEOUT_S
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


@pytest.mark.filterwarnings("ignore")
def test_ray_actors_stream_their_ranks(known):
    ray = pytest.importorskip("ray")
    # Without an address it would join the cluster of another test that runs at the same time.
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:

        @ray.remote(num_cpus=1)
        class Rank:
            def __init__(self, stream):
                self._stream = stream

            def epoch(self):
                return [batch.cell_ids.tolist() for batch in self._stream]

        ranks = [IslandStream(known.store, rank=rank, world_size=2, **OPTIONS) for rank in range(2)]
        actors = [Rank.remote(stream) for stream in ranks]
        found = ray.get([actor.epoch.remote() for actor in actors], timeout=TIMEOUT_S)
    finally:
        ray.shutdown()
    alone = ids_of(IslandStream(known.store, **OPTIONS))
    for step, parts in zip(alone, zip(*found, strict=True), strict=True):
        assert sorted(step) == sorted(cell for part in parts for cell in part)


RSS = """
import resource, sys
from annatac_scale.stream.loader import BatchStream

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

few, many = (
    BatchStream(path, global_batch_size=64, seed=1, lanes=4, window=2) for path in sys.argv[1:]
)
for _ in range(2):
    for _ in few:
        pass
before = peak()
for _ in range(3):
    n_cells = sum(len(batch) for batch in many)
assert n_cells == 60_000
print(peak() - before)
"""


def write_many(path, n_shards):
    """Cells with 1,000 open islands each: a million bytes a thousand of them, encoded, and five times that decoded."""
    space = small_space(2000)
    create_store(path, space, "insertion")
    rows = open_islands(np.random.default_rng(0).integers(1, 6, (4000, 2000)) * (np.arange(2000) % 2))
    with SampleWriter(path, "many", 4000 * n_shards) as writer:
        for shard in range(n_shards):
            writer.write_shard(shard, rows)
        barcodes = pd.Index([str(i) for i in range(4000 * n_shards)], name="barcode")
        writer.commit(pd.DataFrame(index=barcodes), np.ones(2000, bool), {})


def test_memory_does_not_grow_with_the_cells_of_a_store_nor_with_epochs(tmp_path):
    write_many(tmp_path / "few.zarr", 1)
    write_many(tmp_path / "many.zarr", 15)
    paths = [str(tmp_path / "few.zarr"), str(tmp_path / "many.zarr")]
    done = subprocess.run([sys.executable, "-c", RSS, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    encoded_window = 4 * 3 * 250 * 1000
    assert int(done.stdout) < 2 * encoded_window  # all cells are ten times that, encoded
