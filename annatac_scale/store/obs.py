"""The obs of samples: what a data frame on disk can hold, the digest over it, and its replacement."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store import schema
from annatac_scale.store.elements import read_elem
from annatac_scale.store.files import INCOMING, move
from annatac_scale.store.frames import frame_files
from annatac_scale.store.locks import remove_incoming_if_empty, store_lock
from annatac_scale.store.metadata import change_index, committed_samples, read_index, read_root
from annatac_scale.store.place import Location, Place, is_url, joined, open_group, place_of

_READY = "ready.json"
"""In object storage, says that all of a new obs lies aside."""

_RESERVED = ("sample", "barcode", "_index")
_NUMBERS = "iufb"
_EXACT_IN_FLOAT64 = 2**53


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
    if became_float and np.nanmax(np.abs(values), initial=0) >= _EXACT_IN_FLOAT64:
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


def replace_obs(path: Location, sample: str, obs: pd.DataFrame) -> str:
    """Replace the obs of a committed sample, X untouched; returns the new digest (hex).

    obs: as many rows as the sample has cells, indexed by the same barcodes in the same order.
    A kill in the middle leaves the old obs or the new: ``finish_obs`` decides at the next opening.
    Raises StoreError for an unknown sample and for other barcodes, InputError for columns that cannot be stored.
    """
    path = path if is_url(path) else Path(path)
    read_root(path)
    check_obs(f"{path}, sample {sample!r}", obs)
    with store_lock(path):
        there = committed_samples(path)
        if sample not in there:
            raise StoreError(f"{path}: no sample {sample!r}; it holds {there[:10]}")
        aside = place_of(path).below(_aside(sample))
        if sample in _begun(path):
            _settle_obs(path, sample)  # it may hold the only obs there is
        _check_barcodes(path, sample, obs)
        aside.write_all(frame_files("obs", storable(obs)))
        if is_url(path):
            aside.write(_READY, b"{}")
        else:
            folder, new = Path(path) / schema.SAMPLES / sample, Path(aside.location)
            move(folder / "obs", new / "old")
            move(new / "obs", folder / "obs")
        return _settle_obs(path, sample)


def _aside(sample: str) -> str:
    """Where the obs of a committed sample, old and new, lie while it is replaced."""
    return f"{INCOMING}/.{sample}.obs"


def _begun(path: Location) -> list[str]:
    """Samples whose obs is being replaced, or was when its writer was killed."""
    found = place_of(path).folders(INCOMING)
    return [name[1 : -len(".obs")] for name in found if name.startswith(".") and name.endswith(".obs")]


def _check_barcodes(path: Location, sample: str, obs: pd.DataFrame) -> None:
    place = f"{path}, sample {sample!r}"
    group = open_group(joined(path, f"{schema.SAMPLES}/{sample}"))
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


def finish_obs(path: Location) -> None:
    """Settle replacements of obs that were interrupted, if there are any.

    Raises StoreError where the store cannot be written: which obs and digest belong together is not known then.
    """
    if not _begun(path):
        return
    try:
        with store_lock(path):
            for sample in set(_begun(path)) & set(committed_samples(path)):
                _settle_obs(path, sample)
    except (OSError, StoreError) as error:
        raise StoreError(
            f"{path}: the obs of a sample was being replaced when its writer was stopped, and what it left cannot be "
            f"settled from here ({error}); run `annatac info` once where the store can be written"
        ) from error


def _settle_obs(path: Location, sample: str) -> str:
    """Bring the replacement to an end that it reached or can reach; index the digest of the obs in place."""
    name = f"{schema.SAMPLES}/{sample}"
    aside = place_of(path).below(_aside(sample))
    if is_url(path):
        _settle_objects(place_of(path), name, aside)
    elif not (Path(path) / name / "obs").exists():
        move(Path(aside.location) / "old", Path(path) / name / "obs")
    group = open_group(joined(path, name))
    measured, obs = read_elem(group["var/measured"]), read_elem(group["obs"])
    entry = next(entry for entry in read_index(path) if entry["name"] == sample)
    digest = sample_digest(read_root(path)["islands_sha256"], entry["x_sha256"], measured, storable(obs))
    change_index(path, lambda index: _set_digest(index, sample, digest))
    aside.remove(_READY)  # first: without it, what is left of the rest is not taken for an obs
    aside.remove("")
    if not is_url(path):
        remove_incoming_if_empty(Path(path))
    return digest


def _settle_objects(store: Place, name: str, aside: Place) -> None:
    """Objects are not renamed: once all of the new obs lies aside, it is copied, as often as it takes."""
    if aside.size(_READY) is None:
        return
    new = aside.names("obs")
    for file in store.below(name).names("obs"):
        if file not in new:
            store.remove(f"{name}/{file}")
    store.write_all({}, {f"{name}/{file}": f"{_aside(name.rpartition('/')[2])}/{file}" for file in new})


def _set_digest(index: list[dict[str, Any]], sample: str, digest: str) -> None:
    for entry in index:
        if entry["name"] == sample:
            entry["digest"] = digest
