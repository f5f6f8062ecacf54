"""What ranged reads of object storage cost through several clients: CPU a request, and throughput.

    python benchmarks/bench_requests.py [--quick] [--rounds 3] [--s3fs FOLDER] [--save]

``slow_s3.py`` serves one object with 50 ms of latency and no bound on its rate; 300 kB ranges at random places, 64 of
them in flight. Each client is a process of its own: ``place`` (what the store uses: obstore's ``get`` in threads, with
checks of what came), ``obstore`` (its ``get`` alone), ``obstore_ranges`` (``get_ranges``, eight a call), ``pyarrow``,
and ``s3fs``, which is skipped unless FOLDER has it (``pip install --target FOLDER s3fs``). Ends with one line of JSON.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import commands
import slow_s3
from turns import spread

RESULTS = Path(__file__).with_name("results") / "requests.json"
LATENCY_MS = 50.0
RANGE_BYTES = 300_000
IN_FLIGHT = 64
OBJECT_BYTES = 200_000_000
RANGES_A_CALL = 8

Reader = Callable[[Sequence[int]], int]
"""Reads ranges that begin at these places; returns the bytes that came."""


def place_reader() -> Reader:
    from annatac_scale.store.place import place_of

    place = place_of("s3://bucket")
    return lambda starts: sum(len(place.read_range("object", start, RANGE_BYTES)) for start in starts)


def obstore_reader() -> Reader:
    import obstore
    from obstore.store import from_url

    store = from_url("s3://bucket", client_options={"allow_http": True})
    return lambda starts: sum(
        len(obstore.get_range(store, "object", start=start, length=RANGE_BYTES)) for start in starts
    )


def obstore_ranges_reader() -> Reader:
    import obstore
    from obstore.store import from_url

    store = from_url("s3://bucket", client_options={"allow_http": True})
    return lambda starts: sum(
        len(part)
        for part in obstore.get_ranges(store, "object", starts=starts, lengths=[RANGE_BYTES] * len(starts))
    )


def pyarrow_reader() -> Reader:
    from pyarrow import fs, set_io_thread_count

    set_io_thread_count(IN_FLIGHT)
    store = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], scheme="http")

    def read(starts: Sequence[int]) -> int:
        with store.open_input_file("bucket/object") as file:
            return sum(len(file.read_at(RANGE_BYTES, start)) for start in starts)

    return read


def s3fs_reader() -> Reader:
    import s3fs

    store = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    return lambda starts: sum(
        len(store.cat_file("bucket/object", start=start, end=start + RANGE_BYTES)) for start in starts
    )


READERS: dict[str, tuple[Callable[[], Reader], int]] = {
    "place": (place_reader, 1),
    "obstore": (obstore_reader, 1),
    "obstore_ranges": (obstore_ranges_reader, RANGES_A_CALL),
    "pyarrow": (pyarrow_reader, 1),
    "s3fs": (s3fs_reader, 1),
}
"""By name how to make a reader, and how many ranges it takes at a call."""


def child(name: str, n_requests: int) -> None:
    """Read in this process and print what it cost, imports and the first requests left out."""
    make, at_a_call = READERS[name]
    read = make()
    draw = random.Random(0)
    starts = [draw.randrange(0, OBJECT_BYTES - RANGE_BYTES) for _ in range(n_requests)]
    calls = [starts[i : i + at_a_call] for i in range(0, n_requests, at_a_call)]
    with ThreadPoolExecutor(max(1, IN_FLIGHT // at_a_call)) as pool:
        list(pool.map(read, calls[: IN_FLIGHT // at_a_call]))
        cpu, wall = time.process_time(), time.perf_counter()
        n_bytes = sum(pool.map(read, calls))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert n_bytes == n_requests * RANGE_BYTES
    print(json.dumps({"cpu_us_per_request": cpu / n_requests * 1e6, "mb_per_s": n_bytes / wall / 1e6}))


def measured(name: str, n_requests: int, environment: dict[str, str], path: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name, "--requests", str(n_requests)]
    env = {**os.environ, **commands.ENVIRONMENT, **environment, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout)
    print(
        f"{name:16} {found['cpu_us_per_request']:6.0f} us a request   {found['mb_per_s']:6.0f} MB/s",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--s3fs", type=Path, help="folder that s3fs was installed into")
    parser.add_argument("--save", action="store_true", help=f"write the JSON into results/{RESULTS.name} too")
    parser.add_argument("--child", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.requests)
        return
    names = [name for name in READERS if name != "s3fs" or options.s3fs]
    if not options.s3fs:
        print("s3fs: skipped, no --s3fs given")
    n_requests, rounds = (2 * IN_FLIGHT, 1) if options.quick else (1_000, options.rounds)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bucket").mkdir()
        with (Path(folder) / "bucket" / "object").open("wb") as file:
            file.truncate(OBJECT_BYTES)
        with slow_s3.running(Path(folder), LATENCY_MS, None) as environment:
            for _ in range(rounds):
                for name in names:
                    path = os.pathsep.join(
                        [str(commands.ROOT), *([str(options.s3fs)] if name == "s3fs" else [])]
                    )
                    found[name].append(measured(name, n_requests, environment, path))
    runs = {
        name: next((one for one in of if "failed" in one), None)
        or {figure: spread(one[figure] for one in of) for figure in of[0]}
        for name, of in found.items()
    }
    report = {
        "benchmark": "requests",
        "in_flight": IN_FLIGHT,
        "range_bytes": RANGE_BYTES,
        "latency_ms": LATENCY_MS,
        "rounds": rounds,
        "runs": runs,
        "failed": [name for name, figures in runs.items() if "failed" in figures],
        **commands.conditions(),
    }
    commands.end(report, RESULTS if options.save else None)


if __name__ == "__main__":
    main()
