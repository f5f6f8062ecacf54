"""What our stream does in a benchmark, in a process of its own.

    python benchmarks/stream_work.py TASK.json

TASK.json: {"work": one of WORK below, "store": PATH or URL, ...}. Ends
with one line of JSON. Imports are over when the clock starts; opening the store counts only where it says so.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peer_stream import steady, x_bytes

import annatac_scale as ats
from annatac_scale.store.place import place_of
from annatac_scale.store.schema import BLOCK_CELLS
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.loader import BatchStream

_OPTIONS = ("seed", "rank", "world_size", "lanes", "window", "threads", "obs")
_SHUFFLES = 5


def stream_of(task: dict[str, Any]) -> BatchStream:
    given = {name: task[name] for name in _OPTIONS if name in task}
    return BatchStream(task["store"], global_batch_size=task["batch"], **{"seed": 0, **given})


def stream(task: dict[str, Any]) -> dict[str, Any]:
    """Whole epochs, ragged or encoded; ``digest``: of the ids of its cells in order; ``meet``: see there."""
    opened = time.perf_counter()
    source = stream_of(task)
    opened = time.perf_counter() - opened
    ids = hashlib.sha256()

    def epoch(number: int) -> Iterator[tuple[int, int]]:
        source.set_epoch(number)
        for batch in source.encoded() if task["encoded"] else source:
            if task.get("digest"):
                ids.update(batch.cell_ids.tobytes())
            yield len(batch), 0 if task["encoded"] else int(batch.offsets[-1])

    if "meet" in task:
        meet(Path(task["meet"]), source)
    figures = steady(epoch, task["warm_up"], task.get("epochs", 1))
    found = {**figures, "open_s": round(opened, 4), "vm_peak_mb": vm_peak_mb()}
    if "://" not in task["store"]:
        found["x_bytes"] = x_bytes(task["store"])
    return {**found, "ids": ids.hexdigest()} if task.get("digest") else found


def meet(folder: Path, source: BatchStream) -> None:
    """Wait until as many processes as there are ranks have come so far; each leaves a file in the folder."""
    state = source.state_dict()
    next(iter(source))  # kernels are compiled or loaded
    source.load_state_dict(state)
    ranks = int(folder.name)
    (folder / f"{time.monotonic_ns()}").touch()
    while len(list(folder.iterdir())) < ranks:
        time.sleep(0.01)


def vm_peak_mb() -> float | None:
    """The largest address space so far; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmPeak"))


def fetch(task: dict[str, Any]) -> dict[str, Any]:
    """Ranges as a stream reads them, thrown away: what server and client can do."""
    store = IslandStore.open(task["store"])
    length = task["range_bytes"]
    ranges = []
    for name in store.samples:
        place = place_of(f"{task['store']}/samples/{name}/X")
        ranges += [
            (place, file, at) for file, size in place.sizes("c").items() for at in range(0, size, length)
        ]
    wall = time.perf_counter()
    with ThreadPoolExecutor(task["threads"]) as pool:
        n_bytes = sum(pool.map(lambda entry: len(entry[0].read_range(*entry[1:], length)), ranges))
    wall = time.perf_counter() - wall
    return {"bytes": n_bytes, "wall_s": round(wall, 4), "mb_per_s": round(n_bytes / wall / 1e6, 1)}


def contents(task: dict[str, Any]) -> dict[str, Any]:
    """What a store takes: bytes of the encoded rows, of whole blocks before zstd, of X and of everything on disk."""
    store = IslandStore.open(task["store"])
    rows = blocks = 0
    for sample in store.samples.values():
        for block in range(sample.n_blocks):
            (chunk,) = sample.read_chunks([block])
            rows += int(sample.decompress(block, chunk).sizes.sum())
            blocks += 4 * (BLOCK_CELLS + 1)
    files = (path for path in Path(task["store"]).rglob("*") if path.is_file())
    return {
        "cells": store.n_cells,
        "n_open": sum(sample.n_open for sample in store.samples.values()),
        "row_bytes": rows,
        "block_bytes": rows + blocks,
        "x_bytes": x_bytes(task["store"]),
        "store_bytes": sum(path.stat().st_size for path in files),
    }


def mixing(task: dict[str, Any]) -> dict[str, Any]:
    """Mean entropy (bits) of the labels of a batch over an epoch, and of batches of a permutation of all cells."""
    found = {}
    for batch in task["batches"]:
        source = stream_of({**task, "batch": batch})
        labels = np.unique(source.store.obs(["cell_type"])["cell_type"].astype(str), return_inverse=True)[1]
        ids = np.concatenate([part.cell_ids for part in source.encoded()])
        rng = np.random.default_rng(0)
        shuffled = [mean_entropy(labels[rng.permutation(len(labels))], batch) for _ in range(_SHUFFLES)]
        found[str(batch)] = {
            "stream": round(mean_entropy(labels[ids], batch), 4),
            "random": round(float(np.mean(shuffled)), 4),
            "in_order": round(mean_entropy(labels, batch), 4),
        }
    return found


def mean_entropy(labels: NDArray[np.integer], batch: int) -> float:
    """Mean over the whole batches that these labels are cut into, in bits."""
    n_batches, n_labels = len(labels) // batch, int(labels.max()) + 1
    rows = np.repeat(np.arange(n_batches), batch) * n_labels + labels[: n_batches * batch]
    shares = np.bincount(rows, minlength=n_batches * n_labels).reshape(n_batches, n_labels) / batch
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return float(-(shares * logs).sum(axis=1).mean())


def state(task: dict[str, Any]) -> dict[str, Any]:
    """States of a stream at parts of its epoch."""
    source = stream_of(task)
    return {"states": [{**source.state_dict(), "step": int(part * len(source))} for part in task["parts"]]}


def resume(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds from nothing but imports to the first batch at a state: the store is opened too."""
    wall, cpu = time.perf_counter(), time.process_time()
    source = stream_of(task)
    source.load_state_dict(task["state"])
    batch = next(iter(source))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"first_batch_s": round(wall, 4), "first_batch_cpu_s": round(cpu, 4), "cells": len(batch)}


def verify(task: dict[str, Any]) -> dict[str, Any]:
    """`annatac info --verify` with two threads."""
    report = ats.info(task["store"], verify=True, workers=2)
    return {"cells": report.n_cells, "sound": report.is_sound}


def export(task: dict[str, Any]) -> dict[str, Any]:
    """`annatac export`."""
    out = Path(task["out"])
    report = ats.export(task["store"], out=out)
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return {"cells": report.n_cells, "out_bytes": sum(path.stat().st_size for path in files)}


WORK = {work.__name__: work for work in (stream, fetch, contents, mixing, state, resume, verify, export)}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(WORK[task["work"]](task)))


if __name__ == "__main__":
    main()
