"""What a peer of the stream does in a benchmark; run with the Python that has the peer, which need not have ours.

    peer-python benchmarks/peer_stream.py TASK.json

TASK.json: {"peer": "collection" | "annbatch" | "scdataset" | "versions", ...}. Ends with one line of JSON. Peers give
their matrices alone, which is the least that they can do, or the obs columns that ``obs`` names, loaded as annbatch's
README does it. Measured are whole epochs, after batches of another one.
"""

import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any


def steady(epoch: Any, warm_up: int, n_epochs: int = 1) -> dict[str, float]:
    """CPU and wall seconds of whole epochs. epoch(number): an iterator over (cells, open islands) of its batches."""
    batches = epoch(0)
    for _, _ in zip(range(warm_up), batches, strict=False):
        pass
    batches.close()
    cells = n_open = n_batches = 0
    wall, cpu = time.perf_counter(), time.process_time()
    first: float | None = None
    numbers = range(1, n_epochs + 1)
    for batch_cells, batch_open in chain.from_iterable(map(epoch, numbers)):
        if first is None:
            first = time.perf_counter() - wall
        cells, n_open, n_batches = cells + batch_cells, n_open + batch_open, n_batches + 1
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "epochs": n_epochs,
        "cells": cells,
        "n_open": n_open,
        "batches": n_batches,
        "epochs_cpu_s": round(cpu, 4),
        "epochs_wall_s": round(wall, 4),
        "first_batch_s": round(first or 0.0, 4),
    }


def collection(task: dict[str, Any]) -> dict[str, Any]:
    """annbatch's own collection of an h5ad, by its defaults: shuffled, sharded, blosc lz4."""
    import numpy as np
    from annbatch import DatasetCollection

    DatasetCollection(task["collection"]).add_adatas([task["h5ad"]], rng=np.random.default_rng(0))
    return {"x_bytes": x_bytes(task["collection"])}


def x_bytes(folder: str) -> int:
    """Bytes on disk of the matrices of a Zarr store."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if "X" in path.relative_to(folder).parts)


def annbatch(task: dict[str, Any]) -> dict[str, Any]:
    import anndata
    import numpy as np
    import zarr
    from annbatch import Loader

    if task["zarrs"]:
        import zarrs  # noqa: F401 - registers the pipeline

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    group = zarr.open_group(task["collection"], mode="r")
    parts = [group[name] for name in sorted(group.group_keys())]
    matrices = [anndata.io.sparse_dataset(part["X"]) for part in parts]
    obs = [anndata.io.read_elem(part["obs"])[task["obs"]] for part in parts] if task.get("obs") else None
    loader = Loader(
        batch_size=task["batch"],
        chunk_size=task["chunk"],
        preload_nchunks=task["chunks"],
        shuffle=True,
        rng=np.random.default_rng(task["seed"]),
    ).add_datasets(matrices, obs)

    def epoch(number: int) -> Iterator[tuple[int, int]]:
        for batch in loader:
            yield batch["X"].shape[0], batch["X"].nnz

    return {**steady(epoch, task["warm_up"], task["epochs"]), "x_bytes": x_bytes(task["collection"])}


class Rows:
    """A matrix on disk as scDataset wants its data: indexed by rows, and with a length."""

    def __init__(self, matrix: Any) -> None:
        self._matrix = matrix

    def __len__(self) -> int:
        return int(self._matrix.shape[0])

    def __getitem__(self, rows: Any) -> Any:
        return self._matrix[rows]


def scdataset(task: dict[str, Any]) -> dict[str, Any]:
    import h5py
    from anndata.io import sparse_dataset
    from scdataset import BlockShuffling, scDataset

    with h5py.File(task["h5ad"]) as file:
        data = scDataset(
            Rows(sparse_dataset(file["X"])),
            BlockShuffling(task["block"]),
            batch_size=task["batch"],
            fetch_factor=task["fetch"],
            seed=task["seed"],
        )

        def epoch(number: int) -> Iterator[tuple[int, int]]:
            for batch in data:
                yield batch.shape[0], batch.nnz

        x_bytes = sum(file["X"][name].id.get_storage_size() for name in ("data", "indices", "indptr"))
        return {**steady(epoch, task["warm_up"], task["epochs"]), "x_bytes": x_bytes}


def versions(task: dict[str, Any]) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("annbatch", "zarrs", "zarr", "anndata", "numpy", "scipy", "scDataset", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


WORK = {work.__name__: work for work in (collection, annbatch, scdataset, versions)}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(WORK[task["peer"]](task)))


if __name__ == "__main__":
    main()
