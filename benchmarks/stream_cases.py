"""The cases of bench_stream.py: what runs in each, and what its figures say beside what is asked for."""

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import peers as peers_of
import slow_s3
from store_writer import Spec, make_h5ad, make_store
from turns import Rounds, Run, largest, ratio, spread, summaries, take_turns, warm

BATCH = 256
WARM_UP = 100
EPOCHS = 3
TIMES = 5
"""As many cells as in the base case has the big store, and as many epochs are measured of the base case beside it."""

MIXED = (64, 256)
LABELS = ["cell_type"]
COMPARED = [
    *product(("ragged", "encoded"), ("annbatch_zarrs", "annbatch", "scdataset")),
    *product(("ragged_labels", "encoded_labels"), ("annbatch_zarrs_labels",)),
]
PARTS = (0.05, 0.35, 0.65, 0.95)
SPACE_OF_STORE = 0.75
"""Address space that the run on the big store may have, as a share of the store's bytes."""

LINKS_MB_PER_S = (40.0, 100.0)
LATENCY_MS = 50.0
WIDE = 600_000
"""Islands of the wide stores: about all bins of hg38."""


@dataclass(frozen=True)
class Bench:
    """Where things are, what the base case is and how often it runs."""

    spec: Spec
    data: Path
    scratch: Path
    rounds: int
    peers: Mapping[str, peers_of.Peer]
    quick: bool

    def folder(self, spec: Spec) -> Path:
        return self.data / spec.folder()

    def store(self, spec: Spec) -> str:
        """Path of a store that is made where it is not there, and read once."""
        print(f"store of {spec.cells:,} cells, {spec.islands:,} islands, {spec.open:,} open", flush=True)
        path = make_store(self.folder(spec), spec)
        warm(path)
        return str(path)

    @property
    def options(self) -> dict[str, Any]:
        """Of all our streams: the defaults, but for the small set, which would be one window."""
        small = {"lanes": 8, "window": 1} if self.quick else {}
        return {"batch": BATCH, "seed": 7, "warm_up": 2 if self.quick else WARM_UP, **small}

    @property
    def fork(self) -> list[str] | None:
        return ["warm_kernels"] if self.quick else None

    def ours(self, name: str, store: str, encoded: bool = False, **more: Any) -> Run:
        task = {"work": "stream", "store": store, "encoded": encoded, **self.options}
        space_kb, env = more.pop("space_kb", None), more.pop("env", {})
        return Run(name, {**task, **more}, env=env, space_kb=space_kb, fork=self.fork)

    def work(self, name: str, work: str, store: str, **more: Any) -> Run:
        env = more.pop("env", {})
        return Run(name, {"work": work, "store": store, **self.options, **more}, env=env, fork=self.fork)

    def turns(self, runs: Sequence[Run], rounds: int | None = None) -> Rounds:
        return take_turns(runs, rounds or self.rounds, self.scratch)


def case_store(bench: Bench) -> dict[str, Any]:
    """Bytes of the base store and of stores of nearly all bins, with few and with many open."""
    wide = replace(bench.spec, islands=30_000 if bench.quick else WIDE, order="shuffled")
    few = 2_000 if bench.quick else 20_000
    specs = {
        "base": bench.spec,
        "80_of_600k": replace(wide, open=80, cells=few),
        "5000_of_600k": replace(wide, open=5_000, cells=few // 5),
    }
    found = bench.turns(
        [bench.work(name, "contents", bench.store(spec)) for name, spec in specs.items()], rounds=1
    )
    runs = {name: _by_open(rounds_of[-1]) for name, rounds_of in found.items()}
    bars = {
        f"raw_bytes_per_open_{name}": figures.get("raw_bytes_per_open")
        for name, figures in runs.items()
        if name != "base"
    }
    bars["disk_bytes_per_cell"] = runs["base"].get("store_bytes_per_cell")
    return {"specs": {name: asdict(spec) for name, spec in specs.items()}, "runs": runs, "bars": bars}


def _by_open(figures: Mapping[str, Any]) -> dict[str, Any]:
    """raw: a block before zstd, its head included"""
    if "failed" in figures:
        return {"failed": figures["failed"]}
    cells, n_open = figures["cells"], figures["n_open"]
    return {
        "cells": cells,
        "open_per_cell": round(n_open / cells, 1),
        "row_bytes_per_open": round(figures["row_bytes"] / n_open, 4),
        "raw_bytes_per_open": round(figures["block_bytes"] / n_open, 4),
        "x_bytes_per_open": round(figures["x_bytes"] / n_open, 4),
        "x_bytes_per_cell": round(figures["x_bytes"] / cells, 1),
        "store_bytes_per_cell": round(figures["store_bytes"] / cells, 1),
    }


def case_peers(bench: Bench) -> dict[str, Any]:
    """Ours, annbatch by both pipelines and scDataset over the same cells."""
    store = bench.store(bench.spec)
    runs = [
        bench.ours(f"ours_{'encoded' if encoded else 'ragged'}{end}", store, encoded, epochs=EPOCHS, **more)
        for end, more in (("", {}), ("_labels", {"obs": LABELS}))
        for encoded in (False, True)
    ]
    found = bench.turns([*runs, *_peer_runs(bench)])
    over = {f"{one}_over_{peer}": ratio(found, f"ours_{one}", peer) for one, peer in COMPARED}
    bars = {
        f"{kind}_over_annbatch_zarrs": (over[f"{kind}_over_annbatch_zarrs"] or {}).get("median")
        for kind in ("ragged", "encoded")
    }
    bars["rss_mb"] = largest(found, "rss_mb", ("ours_ragged", "ours_encoded"))
    return {
        "runs": summaries(found),
        "ratios": {name: value for name, value in over.items() if value},
        "same_cells": same_cells(found),
        "bars": bars,
    }


def same_cells(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
    """Whether all gave as many cells, and, but for encoded ones, as many open islands."""
    whole = [one for rounds_of in found.values() for one in rounds_of if "failed" not in one]
    opened = {one["n_open"] for one in whole if one["n_open"]}
    return len({one["cells"] for one in whole}) <= 1 and len(opened) <= 1


def _peer_runs(bench: Bench) -> list[Run]:
    """annbatch reads its own collection of the h5ad, scDataset the h5ad: 16,384 cells at a time, both."""
    if not bench.peers:
        return []
    folder = bench.folder(bench.spec)
    files = {"h5ad": str(make_h5ad(folder, bench.spec)), "collection": str(folder / "annbatch.zarr")}
    shared = {**files, "batch": BATCH, "seed": 7, "warm_up": bench.options["warm_up"], "epochs": EPOCHS}
    runs = []
    if "annbatch" in bench.peers:
        _make_collection(bench, files)
        task = {**shared, "peer": "annbatch", "chunk": 512, "chunks": 32}
        for name, more in (
            ("annbatch_zarrs", {"zarrs": True}),
            ("annbatch_zarrs_labels", {"zarrs": True, "obs": LABELS}),
            ("annbatch", {"zarrs": False}),
        ):
            runs.append(Run(name, {**task, **more}, bench.peers["annbatch"]))
        warm(Path(files["collection"]))
    if "scdataset" in bench.peers:
        task = {**shared, "peer": "scdataset", "block": 256, "fetch": 64}
        runs.append(Run("scdataset", task, bench.peers["scdataset"]))
        warm(Path(files["h5ad"]))
    return runs


def _make_collection(bench: Bench, files: Mapping[str, str]) -> None:
    """annbatch's collection, kept once it is whole; where it cannot be made, the runs that want it will fail."""
    collection = Path(files["collection"])
    made = collection.with_suffix(".made")
    if made.exists():
        return
    shutil.rmtree(collection, ignore_errors=True)
    run = Run("collection", {**files, "peer": "collection"}, bench.peers["annbatch"])
    if "failed" in run.measured(bench.scratch):
        shutil.rmtree(collection, ignore_errors=True)
    else:
        made.touch()


def case_big(bench: Bench) -> dict[str, Any]:
    """Five times the cells: the same cost by cell, also in an address space smaller than the store."""
    big = replace(bench.spec, cells=TIMES * bench.spec.cells)
    stores = {"base": bench.store(bench.spec), "big": bench.store(big)}
    n_bytes = sum(path.stat().st_size for path in Path(stores["big"]).rglob("*") if path.is_file())
    limit = None if bench.quick else int(SPACE_OF_STORE * n_bytes / 1024)
    runs = [
        bench.ours(
            f"{name}_{'encoded' if encoded else 'ragged'}",
            store,
            encoded,
            epochs=TIMES if name == "base" else 1,
        )
        for encoded in (False, True)
        for name, store in stores.items()
    ]
    runs.append(bench.ours("big_ragged_little_space", stores["big"], space_kb=limit))
    found = bench.turns(runs)
    ratios = {
        f"big_over_base_{kind}": ratio(found, f"big_{kind}", f"base_{kind}", "cpu_us_per_cell")
        for kind in ("ragged", "encoded")
    }
    return {
        "spec": asdict(big),
        "store_bytes": n_bytes,
        "space_kb": limit,
        "runs": summaries(found),
        "ratios": ratios,
        "bars": {name: (value or {}).get("median") for name, value in ratios.items()},
    }


def case_mixing(bench: Bench) -> dict[str, Any]:
    """Entropy of the cell types of a batch on a store that is sorted by them, at the stream's defaults."""
    store = bench.store(replace(bench.spec, order="type"))
    figures = bench.work("mixing", "mixing", store, batches=MIXED).measured(bench.scratch)
    if "failed" in figures:
        return {"runs": {"mixing": figures}, "bars": {}}
    found = {str(batch): figures[str(batch)] for batch in MIXED}
    bars = {f"mixing_{batch}": round(one["stream"] / one["random"], 4) for batch, one in found.items()}
    return {"runs": {"mixing": found}, "bars": bars}


def case_latency(bench: Bench) -> dict[str, Any]:
    """The base store over links of our own, every request 50 ms late; the order of cells is that from disk."""
    store = bench.store(bench.spec)
    url = f"s3://{Path(store).parent.name}/{Path(store).name}"
    links = LINKS_MB_PER_S[-1:] if bench.quick else LINKS_MB_PER_S
    more: dict[str, Any] = {"digest": True, "warm_up": 0}
    local = bench.ours("disk", store, **more)
    found = {"disk": [local.measured(bench.scratch)]}
    with slow_s3.running(bench.data, 0, None) as env:
        free = [bench.work("server", "fetch", url, env=env, threads=32, range_bytes=305_000)]
        free.append(bench.ours("no_latency_no_bound", url, env=env, **more))
        found.update(bench.turns(free, rounds=1))
    for rate in links:
        with slow_s3.running(bench.data, LATENCY_MS, rate) as env:
            name = f"link_{rate:.0f}_mb_per_s"
            found.update(bench.turns([bench.ours(name, url, env=env, **more)]))
        _add_share(found[name], found["disk"][0], rate)
    server = found.pop("server")[0]
    first = found[f"link_{links[0]:.0f}_mb_per_s"]
    return {
        "latency_ms": LATENCY_MS,
        "server_mb_per_s": server.get("mb_per_s"),
        "runs": {**summaries(found), **({"server": server} if "failed" in server else {})},
        "bars": {
            "link_share": statistics.median(one["link_share"] for one in first)
            if all("link_share" in one for one in first)
            else None,
            "same_order": int(
                len({one.get("ids") for rounds_of in found.values() for one in rounds_of}) == 1
            ),
        },
    }


def _add_share(rounds_of: Sequence[dict[str, Any]], disk: Mapping[str, Any], rate: float) -> None:
    """Bytes of blocks a second over an epoch, its first batch included, as a share of the link's rate."""
    for figures in rounds_of:
        if "failed" not in figures and "failed" not in disk:
            figures["link_share"] = round(disk["x_bytes"] / figures["epochs_wall_s"] / (rate * 1e6), 4)


def case_resume(bench: Bench) -> dict[str, Any]:
    """Seconds from a state within an epoch to its first batch, in a new process, imports left out."""
    store = bench.store(bench.spec)
    states = bench.work("states", "state", store, parts=PARTS).measured(bench.scratch)
    if "failed" in states:
        return {"runs": {"states": states}, "bars": {}}
    runs = [bench.work(f"step_{one['step']}", "resume", store, state=one) for one in states["states"]]
    found = bench.turns(runs)
    return {"runs": summaries(found), "bars": {"first_batch_s": largest(found, "first_batch_s", found)}}


def case_ranks(bench: Bench) -> dict[str, Any]:
    """Two ranks, a process each, at once; and one rank that is alone."""
    store = bench.store(bench.spec)
    found: dict[str, list[dict[str, Any]]] = {"alone": [], "rank_0": [], "rank_1": []}
    for number in range(bench.rounds):
        found["alone"].append(bench.ours("alone", store).measured(bench.scratch))
        meeting = bench.scratch / f"meeting_{number}" / "2"
        meeting.mkdir(parents=True)
        runs = [
            bench.ours(f"rank_{rank}", store, rank=rank, world_size=2, meet=str(meeting)) for rank in (0, 1)
        ]
        with ThreadPoolExecutor(2) as pool:
            for run, figures in zip(
                runs, pool.map(lambda run: run.measured(bench.scratch), runs), strict=True
            ):
                found[run.name].append(figures)
    both = [
        one["cells_per_s"] + other["cells_per_s"]
        for one, other in zip(found["rank_0"], found["rank_1"], strict=True)
        if "failed" not in one and "failed" not in other
    ]
    whole = {
        one.get("cells", 0) + other.get("cells", 0)
        for one, other in zip(*list(found.values())[1:], strict=True)
    }
    return {
        "runs": summaries(found),
        "both_cells_per_s": spread(both) if both else None,
        "all_cells": whole == {bench.spec.cells},
        "bars": {},
    }


def case_files(bench: Bench) -> dict[str, Any]:
    """`info --verify` and `export` of the base store, and of a tenth of its cells: whole processes."""
    specs = {"base": bench.spec, "tenth": replace(bench.spec, cells=bench.spec.cells // 10)}
    runs = []
    for size, spec in specs.items():
        store = bench.store(spec)
        runs.append(bench.work(f"verify_{size}", "verify", store))
        for kind in ("h5ad", "zarr"):
            out = str(bench.scratch / f"{size}.{kind}")
            runs.append(bench.work(f"{kind}_{size}", "export", store, out=out))
    found = {name: rounds_of[-1] for name, rounds_of in bench.turns(runs, rounds=1).items()}
    return {"runs": {name: _whole(figures) for name, figures in found.items()}, "bars": {}}


def _whole(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a whole process, start-up included."""
    if "failed" in figures:
        return {"failed": figures["failed"]}
    found = {name: figures[name] for name in ("cells", "rss_mb", "load", "sound") if name in figures}
    found["cpu_us_per_cell"] = round(figures["cpu_s"] / figures["cells"] * 1e6, 1)
    if "out_bytes" in figures:
        found["out_bytes_per_cell"] = round(figures["out_bytes"] / figures["cells"], 1)
    return found


CASES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "store": case_store,
    "peers": case_peers,
    "big": case_big,
    "mixing": case_mixing,
    "latency": case_latency,
    "resume": case_resume,
    "ranks": case_ranks,
    "files": case_files,
}
