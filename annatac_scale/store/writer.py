"""Create a store, add samples to it, replace a sample's obs. A sample is complete or invisible.

A sample is written in ``<store>/.incoming/<name>`` and renamed into ``samples/``; the index in the attributes
of ``samples/`` names it last. Whatever is not in the index was never committed. Locks are flock(2): a killed
writer holds nothing.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import anndata
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem, write_elem
from numpy.typing import NDArray

from annatac_scale.errors import InputError, StoreError
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store import schema
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.shards import create_x, write_shard

INCOMING = ".incoming"
_OBS_ASIDE = ".obs"


def create_store(path: Path | str, space: IslandSpace, counting: str) -> None:
    """Create an empty island store, or check that an existing one has the same islands and counting.

    Raises StoreError when ``path`` holds something else, or a store of other islands or counting.
    """
    path = Path(path)
    attributes = root_attributes(space, counting)
    if (path / "zarr.json").exists():
        if _is_same(path, attributes):
            return
        shutil.rmtree(path)  # a store without samples, left by a conversion that failed
    if path.exists() and any(path.iterdir()):
        raise StoreError(f"{path}: exists and is not an island store; choose another --out")
    aside = path.with_name(path.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    root = zarr.create_group(aside, attributes=attributes)
    _write_frame(root, schema.ISLANDS, islands_frame(space))
    root.create_group(schema.SAMPLES, attributes={schema.INDEX: []})
    if path.exists():
        path.rmdir()
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(aside, path)


def root_attributes(space: IslandSpace, counting: str) -> dict[str, Any]:
    """The root group's attributes (docs/store-format.md, "Root")."""
    return {
        "format": schema.FORMAT,
        "version": schema.FORMAT_VERSION,
        "assembly": space.assembly,
        "chromosomes": list(space.chromosomes),
        "width_bp": space.width_bp,
        "selection": space.selection,
        "islands_sha256": space.sha256,
        "n_islands": len(space),
        "n_levels": schema.N_LEVELS,
        "counting": counting,
    }


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


def committed_samples(path: Path | str) -> list[str]:
    """Names of the samples in order of commit."""
    return [entry["name"] for entry in read_index(Path(path))]


def read_index(path: Path) -> list[dict[str, Any]]:
    """Entries ``{name, n_cells, n_open, digest}`` of the committed samples, in order of commit."""
    samples = path / schema.SAMPLES / "zarr.json"
    try:
        index: list[dict[str, Any]] = json.loads(samples.read_text())["attributes"][schema.INDEX]
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path}: not an island store ({samples} has no index of samples)") from error
    return index


class SampleWriter:
    """Writes one sample; a context manager. Leaving it without ``commit`` removes what was written.

    ``write_shard`` may be called from several threads, once for each shard, in any order.
    Raises StoreError on entry when the sample is committed already or another process is writing it.
    """

    def __init__(self, path: Path | str, name: str, n_cells: int) -> None:
        if not re.fullmatch(schema.SAMPLE_NAME, name):
            raise InputError(
                f"sample name {name!r}: expected letters, digits, '_', '.' and '-', not starting with "
                "'.', '_' or '-'; choose one with --sample"
            )
        self.path = Path(path)
        self.name = name
        self.n_cells = n_cells
        self.folder = self.path / INCOMING / name
        self._shards: dict[int, tuple[str, int]] = {}

    def __enter__(self) -> "SampleWriter":
        self._lock = _try_lock(self.folder.with_name(self.name + ".lock"))
        if self._lock is None:
            raise StoreError(
                f"{self.path}: another process is writing sample {self.name!r}; wait for it or stop it"
            )
        if self.name in committed_samples(self.path):
            self._release()
            raise StoreError(f"{self.path}: sample {self.name!r} is there already; choose another --sample")
        shutil.rmtree(self.folder, ignore_errors=True)
        root = zarr.open_group(self.path, mode="r")
        self.islands_sha256 = str(root.attrs["islands_sha256"])
        self.n_islands: int = root.attrs["n_islands"]
        group = zarr.create_group(
            self.folder, attributes={"encoding-type": "anndata", "encoding-version": "0.1.0"}
        )
        create_x(group, self.n_cells, self.n_islands)
        return self

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

        obs: n_cells rows indexed by barcode; measured: bool [n_islands]; conversion: JSON-able.
        """
        n_shards = -(-self.n_cells // schema.SHARD_CELLS)
        missing = [shard for shard in range(n_shards) if shard not in self._shards]
        if missing or len(obs) != self.n_cells or len(measured) != self.n_islands:
            raise StoreError(
                f"sample {self.name!r} is not whole: shards missing {missing[:5]}, {len(obs)} obs rows for "
                f"{self.n_cells} cells, {len(measured)} measured flags for {self.n_islands} islands"
            )
        x_digest = hashlib.sha256("".join(self._shards[s][0] for s in range(n_shards)).encode()).hexdigest()
        n_open = sum(n for _, n in self._shards.values())
        group = zarr.open_group(self.folder, mode="r+")
        _write_frame(group, "obs", storable(obs))
        self._write_var(measured)
        write_elem(group, "uns", {})
        sample = {"n_cells": self.n_cells, "n_open": n_open, "x_sha256": x_digest}
        group.create_group(
            schema.CONVERSION,
            attributes={
                "encoding-type": "dict",
                "encoding-version": "0.1.0",
                "conversion": conversion,
                **sample,
                "complete": True,
            },
        )
        digest = sample_digest(self.islands_sha256, x_digest, measured, storable(obs))
        _flush(self.folder)
        with store_lock(self.path):
            target = self.path / schema.SAMPLES / self.name
            shutil.rmtree(target, ignore_errors=True)  # it was renamed, then killed before the index named it
            os.replace(self.folder, target)
            index = read_index(self.path)
            index.append({"name": self.name, **sample, "digest": digest})
            _write_index(self.path, index)
        return digest

    def _write_var(self, measured: NDArray[np.bool_]) -> None:
        # The islands are the same in every sample: their files are copied, only `measured` is encoded anew.
        shutil.copytree(self.path / schema.ISLANDS, self.folder / "var")
        var = zarr.open_group(self.folder / "var", mode="r+")
        _write_frame(var, "measured", np.asarray(measured, bool))
        columns = var.attrs["column-order"]
        var.attrs["column-order"] = [*columns, "measured"]  # type: ignore[misc]

    def _release(self) -> None:
        if self._lock is not None:
            self.folder.with_name(self.name + ".lock").unlink(missing_ok=True)
            os.close(self._lock)
        _remove_if_empty(self.folder.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()


def replace_obs(path: Path | str, sample: str, obs: pd.DataFrame) -> str:
    """Replace the obs of a committed sample, X untouched; returns the new digest (hex).

    obs: as many rows as the sample has cells, indexed by the same barcodes in the same order.
    A kill in the middle leaves the old obs or the new: ``finish_obs`` decides at the next opening.
    """
    path = Path(path)
    with store_lock(path):
        entry = next((entry for entry in read_index(path) if entry["name"] == sample), None)
        if entry is None:
            raise StoreError(f"{path}: no sample {sample!r}; it holds {committed_samples(path)[:10]}")
        if len(obs) != entry["n_cells"]:
            raise StoreError(f"{path}, sample {sample!r}: {len(obs)} obs rows for {entry['n_cells']} cells")
        folder, aside = path / schema.SAMPLES / sample, path / INCOMING / f"{sample}{_OBS_ASIDE}"
        shutil.rmtree(aside, ignore_errors=True)
        _write_frame(zarr.create_group(aside), "obs", storable(obs))
        _flush(aside)
        _move(folder / "obs", aside / "old")
        _move(aside / "obs", folder / "obs")
        return _settle_obs(path, sample)


def finish_obs(path: Path) -> None:
    """Settle replacements of obs that were interrupted, if there are any."""
    if any((path / INCOMING).glob(f"*{_OBS_ASIDE}")):
        with store_lock(path):
            for aside in list((path / INCOMING).glob(f"*{_OBS_ASIDE}")):
                _settle_obs(path, aside.name.removesuffix(_OBS_ASIDE))


def _settle_obs(path: Path, sample: str) -> str:
    """Put the old obs back if the new one did not arrive; index the digest of the obs in place."""
    folder, aside = path / schema.SAMPLES / sample, path / INCOMING / f"{sample}{_OBS_ASIDE}"
    if not (folder / "obs").exists():
        os.replace(aside / "old", folder / "obs")
    index = read_index(path)
    entry = next(entry for entry in index if entry["name"] == sample)
    group = zarr.open_group(folder, mode="r")
    islands_sha256 = str(zarr.open_group(path, mode="r").attrs["islands_sha256"])
    entry["digest"] = sample_digest(
        islands_sha256, entry["x_sha256"], read_elem(group["var/measured"]), storable(read_elem(group["obs"]))
    )
    _write_index(path, index)
    shutil.rmtree(aside)
    _remove_if_empty(path / INCOMING)
    return str(entry["digest"])


def storable(obs: pd.DataFrame) -> pd.DataFrame:
    """obs with every column numeric, bool or categorical of strings: what a data frame on disk can hold."""
    columns: dict[str, Any] = {}
    for name, column in obs.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            columns[str(name)] = column.cat.rename_categories(column.cat.categories.astype(str))
        elif column.dtype.kind in "iufb":
            columns[str(name)] = column
        else:
            text = column.astype("object").where(column.notna(), None)
            columns[str(name)] = pd.Categorical(text.map(str, na_action="ignore"))
    return pd.DataFrame(columns, index=pd.Index(obs.index.astype(str), name="barcode"))


def sample_digest(islands_sha256: str, x_sha256: str, measured: NDArray[np.bool_], obs: pd.DataFrame) -> str:
    """sha256 (hex) of what a sample says: islands, X, measured, obs; never of how or when it was made."""
    digest = hashlib.sha256(f"{islands_sha256}\n{x_sha256}\n".encode())
    digest.update(np.packbits(measured).tobytes())
    for name, column in [("barcode", obs.index.to_series()), *obs.items()]:
        if column.dtype.kind in "iufb":
            kind, data = column.dtype.str, column.to_numpy().tobytes()
        else:
            kind, data = "str", "\n".join(json.dumps(None if pd.isna(v) else str(v)) for v in column).encode()
        digest.update(f"\n{json.dumps(str(name))} {kind} {len(data)}\n".encode() + data)
    return digest.hexdigest()


@contextmanager
def store_lock(path: Path) -> Iterator[None]:
    """Hold the store's lock while its index changes; waits for other holders."""
    lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _try_lock(path: Path) -> int | None:
    """Hold the lock file ``path``; None where another holds it."""
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
            os.close(lock)  # its holder removed the file between our opening and locking it
        except FileNotFoundError:
            continue  # another writer, done, removed the empty folder
        except BlockingIOError:
            os.close(lock)
            return None


def _is_same(path: Path, attributes: dict[str, Any]) -> bool:
    """Whether the store is of these islands and counting; False for another one that holds no sample.

    Raises StoreError for anything else.
    """
    found = json.loads((path / "zarr.json").read_text()).get("attributes", {})
    if found.get("format") != schema.FORMAT:
        raise StoreError(f"{path}: a Zarr group, but no island store; choose another --out")
    differing = [
        k for k in ("assembly", "width_bp", "islands_sha256", "counting") if found.get(k) != attributes[k]
    ]
    if not differing:
        return True
    if committed_samples(path) or (path / INCOMING).exists():
        key = differing[0]
        raise StoreError(
            f"{path}: holds {key} {found.get(key)!r}, but {attributes[key]!r} was asked for; "
            "use the store's own, or another --out"
        )
    return False


def _write_frame(group: zarr.Group, key: str, element: Any) -> None:
    """Write a data frame or array in anndata's encoding; small arrays need no shards."""
    with anndata.settings.override(auto_shard_zarr_v3=False):
        write_elem(group, key, element)


def _write_index(path: Path, index: list[dict[str, Any]]) -> None:
    file = path / schema.SAMPLES / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["attributes"][schema.INDEX] = index
    aside = file.with_name("zarr.json.partial")
    with aside.open("w") as out:
        json.dump(metadata, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, file)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _move(source: Path, target: Path) -> None:
    os.replace(source, target)


def _flush(folder: Path) -> None:
    """Force every file below ``folder`` to disk, so that a power cut cannot leave a committed sample torn."""
    for parent, _, files in os.walk(folder):
        for name in [*files, "."]:
            handle = os.open(os.path.join(parent, name), os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
