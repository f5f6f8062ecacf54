"""The stream's cost beside its peers', on generated stores: CPU a cell, cells a second, peak memory, bytes on disk.

    python benchmarks/bench_stream.py [--quick] [--data FOLDER] [--peers FOLDER] [--cases store,peers,...]

Every run is a whole process; the runs of a case take turns, ``--rounds`` times. CPU and wall seconds are of whole
epochs within the process, after some batches of another one, with the page cache warm; peak memory is of the process.
Cases: store (bytes on disk), peers (annbatch, scDataset), big (a million cells, and less address space than the store
has bytes), mixing (cell types of a batch), latency (object storage over a slow link), resume, ranks, files (a store
verified and exported). ``--peers`` makes the peers' environments in FOLDER where they are not there yet; without it
they are skipped. Ends with one line of JSON.
"""

import argparse
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import commands
import peers as peers_of
from store_writer import add_options, spec_of
from stream_cases import BATCH, CASES, Bench
from turns import Run

RESULTS = Path(__file__).with_name("results") / "stream.json"

BARS: dict[str, tuple[str, float]] = {
    "disk_bytes_per_cell": ("<=", 1_250),
    "raw_bytes_per_open_80_of_600k": ("<=", 4),
    "raw_bytes_per_open_5000_of_600k": ("<=", 4),
    "ragged_over_annbatch_zarrs": (">=", 1.8),
    "encoded_over_annbatch_zarrs": (">=", 3.0),
    "rss_mb": ("<=", 300),
    "big_over_base_ragged": ("<=", 1.1),
    "big_over_base_encoded": ("<=", 1.1),
    "mixing_64": (">=", 0.98),
    "mixing_256": (">=", 0.98),
    "link_share": (">=", 0.8),
    "same_order": (">=", 1),
    "first_batch_s": ("<", 1.0),
}
"""What issue 4 asks for."""


def bars(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was found beside what is asked for."""
    found = {
        name: value for case in cases.values() for name, value in case["bars"].items() if value is not None
    }
    return {
        name: {"found": value, "bar": f"{BARS[name][0]} {BARS[name][1]:g}", "met": is_met(name, value)}
        for name, value in found.items()
    }


def is_met(name: str, value: float) -> bool:
    sign, bar = BARS[name]
    return {"<=": value <= bar, "<": value < bar, ">=": value >= bar}[sign]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder that keeps what is generated; default: none is kept"
    )
    parser.add_argument(
        "--peers", type=Path, help="folder of the peers' environments, made where they are missing"
    )
    parser.add_argument(
        "--peer-python", type=Path, help="Python 3.12 or later for annbatch; default: from the PATH"
    )
    commands.add_cases(parser, CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"write the JSON into results/{RESULTS.name} too")
    add_options(parser)
    return parser.parse_args()


def made_peers(options: argparse.Namespace) -> dict[str, peers_of.Peer]:
    if options.peers is None:
        print("peers: skipped, no --peers given")
        return {}
    return peers_of.make(options.peers.resolve(), options.peer_python)


def versions_of(name: str, peer: peers_of.Peer, scratch: Path) -> dict[str, str]:
    figures = Run(f"versions_{name}", {"peer": "versions"}, peer).measured(scratch)
    return {library: found for library, found in figures.items() if isinstance(found, str)}


def cpu_model() -> str:
    """As Linux names it; else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peers = made_peers(options)
        bench = Bench(
            spec_of(options),
            (options.data or folder / "data").resolve(),
            folder,
            1 if options.quick else options.rounds,
            peers,
            options.quick,
        )
        bench.data.mkdir(parents=True, exist_ok=True)
        cases = {name: CASES[name](bench) for name in options.cases}
        versions = {name: versions_of(name, peer, folder) for name, peer in peers.items()}
    report = {
        "benchmark": "stream",
        "warm": True,
        "spec": asdict(bench.spec),
        "batch": BATCH,
        "cases": cases,
        "bars": {} if options.quick else bars(cases),
        "peers": versions,
        "failed": commands.failures(cases),
        "cpu": cpu_model(),
        **commands.conditions(),
    }
    commands.end(report, RESULTS if options.save else None)


if __name__ == "__main__":
    main()
