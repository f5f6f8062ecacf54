"""The obs of samples: what a data frame on disk can hold, the digest over it, and its replacement."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem, write_elem
from numpy.typing import NDArray

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store import schema
from annatac_scale.store.files import (
    any_obs_aside,
    flush,
    move,
    obs_aside,
    remove_incoming_if_empty,
    store_lock,
)
from annatac_scale.store.metadata import committed_samples, read_index, read_root, write_index

_RESERVED = ("sample", "barcode", "_index")
_NUMBERS = "iufb"
_EXACT_IN_FLOAT64 = 2**53


def write_frame(group: zarr.Group, key: str, element: Any) -> None:
    """Write a data frame or array in anndata's encoding; small arrays need no shards."""
    with anndata.settings.override(auto_shard_zarr_v3=False):
        write_elem(group, key, element)


def check_obs(place: str, obs: pd.DataFrame) -> None:
    """Raise InputError for barcodes or columns that come twice, and for names of columns that cannot be stored."""
    barcodes = obs.index.astype(str)
    if not barcodes.is_unique:
        again = barcodes[barcodes.duplicated()][0]
        raise InputError(f"{place}: found barcode {again!r} twice; expected each once; make them unique")
    names = obs.columns.astype(str)
    if not names.is_unique:
        again = names[names.duplicated()][0]
        raise InputError(f"{place}: found the obs column {again!r} twice; expected each once; rename one")
    wrong = [name for name in names if name in _RESERVED or "/" in name]
    if wrong:
        raise InputError(
            f"{place}: found the obs column {wrong[0]!r}; expected none called {', '.join(_RESERVED)} or with a "
            "slash; rename it"
        )


def storable(obs: pd.DataFrame) -> pd.DataFrame:
    """obs with every column numeric, bool or categorical of strings: what a data frame on disk can hold.

    Nullable and Arrow numbers become plain ones, floats where some are missing; what has no such form (truth values of
    which some are missing, times, ...) becomes text.
    """
    columns = {str(name): _storable_column(column) for name, column in obs.items()}
    return pd.DataFrame(columns, index=pd.Index(obs.index.astype(str), name="barcode"))


def _storable_column(column: pd.Series) -> "NDArray[Any] | pd.Categorical":
    if isinstance(column.dtype, pd.CategoricalDtype):
        categories = column.cat.categories.astype(str)
        if categories.is_unique:
            return column.cat.rename_categories(categories).array
    numbers = _plain_numbers(column)
    if numbers is not None:
        return numbers
    text = column.astype("object").where(column.notna(), None)
    return pd.Categorical(text.map(str, na_action="ignore"))


def _plain_numbers(column: pd.Series) -> NDArray[Any] | None:
    """The values in a little-endian NumPy type of at most 8 bytes; None where there is none."""
    if column.dtype.kind not in _NUMBERS:
        return None
    values = column.to_numpy()
    if values.dtype.kind not in _NUMBERS:
        return None
    became_float = values.dtype.kind == "f" and column.dtype.kind != "f"
    if became_float and np.nanmax(np.abs(values), initial=0) > _EXACT_IN_FLOAT64:
        return None
    dtype = values.dtype if values.dtype.itemsize <= 8 else np.dtype(np.float64)
    return values.astype(dtype.newbyteorder("<"))


def sample_digest(islands_sha256: str, x_sha256: str, measured: NDArray[np.bool_], obs: pd.DataFrame) -> str:
    """sha256 (hex) of what a sample says: islands, X, measured, obs; never of how or when it was made.

    obs: as ``storable`` makes it
    """
    digest = hashlib.sha256(f"{islands_sha256}\n{x_sha256}\n".encode())
    digest.update(np.packbits(measured).tobytes())
    for name, column in [("barcode", obs.index.to_series()), *obs.items()]:
        if column.dtype.kind in _NUMBERS:
            kind, data = column.dtype.str, column.to_numpy().tobytes()
        else:
            kind, data = "str", "\n".join(json.dumps(None if pd.isna(v) else str(v)) for v in column).encode()
        digest.update(f"\n{json.dumps(str(name))} {kind} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def replace_obs(path: Path | str, sample: str, obs: pd.DataFrame) -> str:
    """Replace the obs of a committed sample, X untouched; returns the new digest (hex).

    obs: as many rows as the sample has cells, indexed by the same barcodes in the same order.
    A kill in the middle leaves the old obs or the new: ``finish_obs`` decides at the next opening.
    Raises StoreError for an unknown sample and for other barcodes, InputError for columns that cannot be stored.
    """
    path = Path(path)
    read_root(path)
    check_obs(f"{path}, sample {sample!r}", obs)
    with store_lock(path):
        if sample not in committed_samples(path):
            raise StoreError(f"{path}: no sample {sample!r}; it holds {committed_samples(path)[:10]}")
        folder, aside = path / schema.SAMPLES / sample, obs_aside(path, sample)
        if aside.exists():
            _settle_obs(path, sample)  # it may hold the only obs there is
        _check_barcodes(path, sample, obs)
        write_frame(zarr.create_group(aside), "obs", storable(obs))
        flush(aside)
        move(folder / "obs", aside / "old")
        move(aside / "obs", folder / "obs")
        return _settle_obs(path, sample)


def _check_barcodes(path: Path, sample: str, obs: pd.DataFrame) -> None:
    place = f"{path}, sample {sample!r}"
    group = zarr.open_group(path / schema.SAMPLES / sample, mode="r")
    there, given = pd.Index(read_elem(group["obs/barcode"])).astype(str), obs.index.astype(str)
    if len(given) != len(there):
        raise StoreError(f"{place}: {len(given)} obs rows for {len(there)} cells; give one a cell")
    differs = np.flatnonzero(given.to_numpy(object) != there.to_numpy(object))
    if len(differs):
        row = differs[0]
        raise StoreError(
            f"{place}, obs row {row}: found barcode {given[row]!r}, expected {there[row]!r}; "
            "give the same barcodes in the same order"
        )


def finish_obs(path: Path) -> None:
    """Settle replacements of obs that were interrupted, if there are any.

    Raises StoreError where the store cannot be written: which obs and digest belong together is not known then.
    """
    if not any_obs_aside(path):
        return
    try:
        with store_lock(path):
            for sample in committed_samples(path):
                if obs_aside(path, sample).exists():
                    _settle_obs(path, sample)
    except OSError as error:
        raise StoreError(
            f"{path}: the obs of a sample was being replaced when its writer was stopped, and what it left cannot be "
            f"settled from here ({error}); run `annatac info` once where the store can be written"
        ) from error


def _settle_obs(path: Path, sample: str) -> str:
    """Put the old obs back if the new one did not arrive; index the digest of the obs in place."""
    folder, aside = path / schema.SAMPLES / sample, obs_aside(path, sample)
    if not (folder / "obs").exists():
        move(aside / "old", folder / "obs")
    index = read_index(path)
    entry = next(entry for entry in index if entry["name"] == sample)
    group = zarr.open_group(folder, mode="r")
    measured, obs = read_elem(group["var/measured"]), read_elem(group["obs"])
    digest = sample_digest(read_root(path)["islands_sha256"], entry["x_sha256"], measured, storable(obs))
    entry["digest"] = digest
    write_index(path, index)
    shutil.rmtree(aside)
    remove_incoming_if_empty(path)
    return digest
