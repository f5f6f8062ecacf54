"""Create a store and add samples to it. A sample is complete or invisible.

A sample is written in ``<store>/.incoming/<name>`` and renamed into ``samples/``; the index in the attributes
of ``samples/`` names it last. Whatever is not in the index was never committed.
"""

import hashlib
import re
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import zarr
from anndata.io import write_elem
from numpy.typing import NDArray

from annatac_scale.errors import InputError, StoreError
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store import schema
from annatac_scale.store.files import (
    INCOMING,
    creation_lock,
    flush,
    lock_sample,
    move,
    sample_aside,
    store_lock,
    unlock_sample,
)
from annatac_scale.store.metadata import (
    committed_samples,
    read_index,
    read_root,
    root_attributes,
    write_index,
)
from annatac_scale.store.obs import check_obs, replace_obs, sample_digest, storable, write_frame
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.shards import create_x, write_shard

__all__ = ["SampleWriter", "committed_samples", "create_store", "replace_obs"]

_SAME = ("assembly", "width_bp", "islands_sha256", "counting")


def create_store(path: Path | str, space: IslandSpace, counting: str) -> None:
    """Create an empty island store, or check that an existing one has the same islands and counting.

    A store without samples gives way to one of other islands. Several processes may create the same store at once.
    Raises StoreError when ``path`` holds something else, or a store of other islands, counting or major version.
    """
    path = Path(path)
    attributes = root_attributes(space, counting)
    if _is_same(path, attributes):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with creation_lock(path):
        if _is_same(path, attributes):
            return  # another process was faster
        _make_way(path, attributes)
        aside = _name_aside(path)
        try:
            root = zarr.create_group(aside, attributes=attributes)
            write_frame(root, schema.ISLANDS, islands_frame(space))
            root.create_group(schema.SAMPLES, attributes={schema.INDEX: []})
            flush(aside)
            move(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _is_same(path: Path, attributes: dict[str, Any]) -> bool:
    """Whether a store of these islands and counting is there."""
    try:
        found = read_root(path)
    except StoreError:
        return False
    return all(found[key] == attributes[key] for key in _SAME)


def _make_way(path: Path, attributes: dict[str, Any]) -> None:
    """Remove a store without samples, left by a conversion that failed. Raises StoreError for anything else."""
    if not (path / "zarr.json").exists():
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise StoreError(f"{path}: exists and is not an island store; choose another --out")
        return
    found = read_root(path)
    with store_lock(path):
        if committed_samples(path) or (path / INCOMING).exists():
            key = next(key for key in _SAME if found[key] != attributes[key])
            raise StoreError(
                f"{path}: holds {key} {found[key]!r}, but {attributes[key]!r} was asked for; "
                "use the store's own, or another --out"
            )
        old = _name_aside(path)
        move(path, old)
    shutil.rmtree(old)


def _name_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def islands_frame(space: IslandSpace) -> pd.DataFrame:
    """The islands as a data frame indexed by name, columns chrom (categorical), start, end, genes."""
    return pd.DataFrame(
        {
            "chrom": pd.Categorical.from_codes(space.chrom, categories=list(space.chromosomes)),
            "start": space.start,
            "end": space.end,
            "genes": pd.array(space.genes.astype(str), dtype="str"),
        },
        index=pd.Index(space.names(), name="island"),
    )


class SampleWriter:
    """Writes one sample; a context manager. Leaving it without ``commit`` removes what was written.

    ``write_shard`` may be called from several threads, once for each shard, in any order.
    Raises StoreError on entry when the sample is committed already, another process is writing it, or there is no
    store of our major version.
    """

    def __init__(self, path: Path | str, name: str, n_cells: int) -> None:
        if not re.fullmatch(schema.SAMPLE_NAME, name):
            raise InputError(
                f"sample name {name!r}: expected letters, digits, '_', '.' and '-', not starting with "
                "'.', '_' or '-', and not zarr.json; choose one with --sample"
            )
        self.path = Path(path)
        self.name = name
        self.n_cells = n_cells
        self.folder = sample_aside(self.path, name)
        self._shards: dict[int, tuple[str, int]] = {}

    def __enter__(self) -> "SampleWriter":
        read_root(self.path)  # nothing, not even a lock, is put into what is no store of ours
        lock = lock_sample(self.path, self.name)
        if lock is None:
            raise StoreError(
                f"{self.path}: another process is writing sample {self.name!r}; wait for it or stop it"
            )
        self._lock = lock
        try:
            self._begin()
        except BaseException:
            self._leave()
            raise
        return self

    def _begin(self) -> None:
        if self.name in committed_samples(self.path):
            raise StoreError(f"{self.path}: sample {self.name!r} is there already; choose another --sample")
        shutil.rmtree(self.folder, ignore_errors=True)
        root = read_root(self.path)
        self.islands_sha256: str = root["islands_sha256"]
        self.n_islands: int = root["n_islands"]
        group = zarr.create_group(
            self.folder, attributes={"encoding-type": "anndata", "encoding-version": "0.1.0"}
        )
        create_x(group, self.n_cells, self.n_islands)

    def write_shard(self, shard: int, rows: OpenIslands) -> None:
        """Write cells ``shard * 4000`` and on; all but the last shard hold 4,000 cells."""
        first = shard * schema.SHARD_CELLS
        expected = min(schema.SHARD_CELLS, self.n_cells - first)
        if len(rows) != expected:
            raise StoreError(
                f"sample {self.name!r}, shard {shard}: {len(rows)} cells given, {expected} expected"
            )
        self._shards[shard] = write_shard(self.folder / "X", shard, rows), len(rows.islands)

    def commit(self, obs: pd.DataFrame, measured: NDArray[np.bool_], conversion: dict[str, Any]) -> str:
        """Make the sample visible; returns its digest (hex).

        obs: n_cells rows indexed by barcode, each once; measured: bool [n_islands]; conversion: JSON-able.
        Raises StoreError when the sample is not whole, InputError for an obs that cannot be stored.
        """
        n_shards = -(-self.n_cells // schema.SHARD_CELLS)
        self._check_whole(n_shards, len(obs), len(measured))
        check_obs(f"{self.path}, sample {self.name!r}", obs)
        obs = storable(obs)
        shards = [self._shards[shard] for shard in range(n_shards)]
        x_sha256 = hashlib.sha256("".join(sha256 for sha256, _ in shards).encode()).hexdigest()
        shard_open = [n_open for _, n_open in shards]
        digest = sample_digest(self.islands_sha256, x_sha256, measured, obs)
        sizes = {"n_cells": self.n_cells, "n_open": sum(shard_open)}
        self._write_frames(obs, measured)
        self._complete({"conversion": conversion, **sizes, "x_sha256": x_sha256})
        entry = {"name": self.name, **sizes, "shard_open": shard_open, "x_sha256": x_sha256, "digest": digest}
        with store_lock(self.path):
            target = self.path / schema.SAMPLES / self.name
            shutil.rmtree(target, ignore_errors=True)  # it was renamed, then killed before the index named it
            move(self.folder, target)
            write_index(self.path, [*read_index(self.path), entry])
        return digest

    def _check_whole(self, n_shards: int, n_rows: int, n_flags: int) -> None:
        missing = [shard for shard in range(n_shards) if shard not in self._shards]
        if missing or n_rows != self.n_cells or n_flags != self.n_islands:
            raise StoreError(
                f"sample {self.name!r} is not whole: shards missing {missing[:5]}, {n_rows} obs rows for "
                f"{self.n_cells} cells, {n_flags} measured flags for {self.n_islands} islands"
            )

    def _write_frames(self, obs: pd.DataFrame, measured: NDArray[np.bool_]) -> None:
        group = zarr.open_group(self.folder, mode="r+")
        write_frame(group, "obs", obs)
        # The islands are the same in every sample: their files are copied, only `measured` is encoded anew.
        shutil.copytree(self.path / schema.ISLANDS, self.folder / "var")
        var = zarr.open_group(self.folder / "var", mode="r+")
        write_frame(var, "measured", np.asarray(measured, bool))
        columns = var.attrs["column-order"]
        var.attrs["column-order"] = [*columns, "measured"]  # type: ignore[misc]

    def _complete(self, attributes: dict[str, Any]) -> None:
        """Write the conversion, of which ``complete`` is the last, and force all to disk."""
        group = zarr.open_group(self.folder, mode="r+")
        write_elem(group, "uns", {})
        encoding = {"encoding-type": "dict", "encoding-version": "0.1.0"}
        group.create_group(schema.CONVERSION, attributes={**encoding, **attributes, "complete": True})
        flush(self.folder)

    def _leave(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        unlock_sample(self.path, self.name, self._lock)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
