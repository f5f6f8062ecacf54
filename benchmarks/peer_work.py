"""What a peer does in a benchmark; run with the Python that has the peers, which need not have ours.

    peer-python benchmarks/peer_work.py TASK.json

TASK.json: {"peer": "snapatac2" | "matrices" | "bpcells" | "inflate" | "versions", ...}. Ends with one line of JSON.
SnapATAC2 writes its stores to files, as its tutorial does for large data, and ours does always; this costs it less
CPU than its mode in memory (measured, 2.9.0).
"""

import json
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return round(used.ru_utime + used.ru_stime, 3)


def snapatac2(task: dict[str, Any]) -> dict[str, float]:
    """Import, a matrix for each of ``strategies``, and QC where ``genes`` (GTF) is given; CPU seconds of each step."""
    import snapatac2 as snap

    folder = Path(task["folder"])
    steps = [("start", cpu_s())]
    data = snap.pp.import_fragments(
        Path(task["fragments"]),
        task["sizes"],
        file=folder / "fragments.h5ad",
        min_num_fragments=0,
        sorted_by_barcode=False,
        whitelist=Path(task["barcodes"]),
        tempdir=folder,
    )
    steps.append(("import", cpu_s()))
    if task.get("genes"):
        snap.metrics.tsse(data, Path(task["genes"]))
        snap.metrics.frip(data, {"peaks": Path(task["peaks"])})
        steps.append(("qc", cpu_s()))
    for strategy in task["strategies"]:
        matrix = snap.pp.make_peak_matrix(
            data,
            peak_file=Path(task["peaks"]),
            file=folder / f"{strategy}.h5ad",
            counting_strategy=strategy,
        )
        matrix.close()
        steps.append((strategy, cpu_s()))
    data.close()
    return {
        name: round(after - before, 3)
        for (name, after), (_, before) in zip(steps, [("", 0.0), *steps[:-1]], strict=True)
    }


def matrices(task: dict[str, Any]) -> dict[str, Any]:
    """Counts of every (peak file, strategy) as npz (CSR) with the names of rows and columns, into the folder."""
    import numpy as np
    import snapatac2 as snap

    folder = Path(task["folder"])
    data = snap.pp.import_fragments(
        Path(task["fragments"]),
        task["sizes"],
        min_num_fragments=0,
        sorted_by_barcode=False,
        whitelist=Path(task["barcodes"]),
        tempdir=folder,
    )
    for name, peaks in task["peak_files"].items():
        for strategy in task["strategies"]:
            found = snap.pp.make_peak_matrix(data, peak_file=Path(peaks), counting_strategy=strategy)
            counts = found.X[:].tocsr()
            np.savez(
                folder / f"{name}_{strategy}.npz",
                data=counts.data,
                indices=counts.indices,
                indptr=counts.indptr,
                barcodes=np.array(found.obs_names, dtype=str),
                peaks=np.array(found.var_names, dtype=str),
            )
    return {"cells": len(data.obs_names)}


def bpcells(task: dict[str, Any]) -> dict[str, float]:
    import bpcells.experimental

    keep = Path(task["barcodes"]).read_text().split()
    bpcells.experimental.import_10x_fragments(
        task["fragments"], str(Path(task["folder"]) / "bpcells"), keeper_cells=keep
    )
    return {"import": cpu_s()}


def inflate(task: dict[str, Any]) -> dict[str, float]:
    """Nothing but decompression, with ISA-L: the floor under every reader."""
    from isal import igzip

    n = 0
    with igzip.open(task["fragments"], "rb") as file:
        while piece := file.read(1 << 20):
            n += len(piece)
    return {"bytes": n}


def versions(_: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("snapatac2", "bpcells", "isal"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    tasks = {
        "snapatac2": snapatac2,
        "matrices": matrices,
        "bpcells": bpcells,
        "inflate": inflate,
        "versions": versions,
    }
    print(json.dumps(tasks[given["peer"]](given)))
