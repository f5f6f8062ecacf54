"""What the root and the index of samples say: the attributes of two groups, read and written as JSON."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annatac_scale.errors import StoreError
from annatac_scale.store import schema
from annatac_scale.store.files import write_whole
from annatac_scale.store.place import Location, is_url, joined, place_of

if TYPE_CHECKING:
    from annatac_scale.genome.islands import IslandSpace

_INDEX_FILE = f"{schema.SAMPLES}/zarr.json"
_ATTEMPTS = 60
_ENTRY_KEYS = {"name", "n_cells", "n_open", "shard_open", "x_sha256", "digest"}


def root_attributes(space: "IslandSpace", counting: str) -> dict[str, Any]:
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


def read_root(path: Location) -> dict[str, Any]:
    """The root attributes of the store at ``path``.

    Raises StoreError where there is no store, its major version is not ours, or an attribute is missing.
    """
    file = joined(path, "zarr.json")
    try:
        text = place_of(path).read("zarr.json")
    except FileNotFoundError as error:
        raise StoreError(f"{path}: no island store here; make one with `annatac convert`") from error
    try:
        attributes: dict[str, Any] = dict(json.loads(text).get("attributes", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreError(f"{file}: found no attributes ({error}); the file is damaged") from error
    if attributes.get("format") != schema.FORMAT:
        raise StoreError(f"{path}: a Zarr group, but not an island store; give another path")
    version = str(attributes.get("version"))
    if version.split(".")[0] != schema.FORMAT_VERSION.split(".")[0]:
        raise StoreError(
            f"{path}: store format {version}, this annatac_scale reads {schema.FORMAT_VERSION}; "
            "upgrade annatac_scale, or convert again"
        )
    missing = [key for key in schema.ROOT_KEYS if key not in attributes]
    if missing:
        raise StoreError(f"{file}: found no attribute {missing[0]!r}; the store is damaged, convert again")
    if attributes["n_levels"] != schema.N_LEVELS:
        raise StoreError(
            f"{file}: found n_levels {attributes['n_levels']!r}, expected {schema.N_LEVELS}; convert again"
        )
    return attributes


def committed_samples(path: Location) -> list[str]:
    """Names of the samples in order of commit."""
    return [entry["name"] for entry in read_index(path)]


def read_index(path: Location) -> list[dict[str, Any]]:
    """The committed samples in order of commit: ``{name, n_cells, n_open, shard_open, x_sha256, digest}`` each."""
    try:
        return _index_of(path, place_of(path).read(_INDEX_FILE))
    except FileNotFoundError as error:
        raise _no_index(path) from error


def _index_of(path: Location, text: bytes) -> list[dict[str, Any]]:
    index: list[dict[str, Any]] = _parsed(path, text)["attributes"][schema.INDEX]
    return index


def _parsed(path: Location, text: bytes) -> dict[str, Any]:
    """The metadata of ``samples/``, its index checked."""
    try:
        metadata: dict[str, Any] = json.loads(text)
        missing = [
            key for entry in metadata["attributes"][schema.INDEX] for key in _ENTRY_KEYS - entry.keys()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_index(path) from error
    if missing:
        file = joined(path, _INDEX_FILE)
        raise StoreError(f"{file}: found no {missing[0]!r} in an entry of the index; the store is damaged")
    return metadata


def _no_index(path: Location) -> StoreError:
    return StoreError(f"{path}: not an island store ({joined(path, _INDEX_FILE)} has no index of samples)")


def change_index(path: Location, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Let ``change`` alter the index in place, and put it there: this is a commit.

    On a local disk the caller holds the store's lock. In object storage ``change`` is called again for what is there
    meanwhile, until no other writer was faster; whatever it raises leaves the index as it was.
    """
    if not is_url(path):
        changed = _changed(path, place_of(path).read(_INDEX_FILE), change)
        write_whole(Path(path) / _INDEX_FILE, changed)
        return
    from annatac_scale.store.objects import Prefix

    place = Prefix(str(path))
    for attempt in range(_ATTEMPTS):
        found = place.find(_INDEX_FILE)
        if place.replace(_INDEX_FILE, _changed(path, found.data, change), found.etag) is not None:
            return
        time.sleep(random.uniform(0, min(2.0, 0.01 * 2**attempt)))
    raise StoreError(
        f"{joined(path, _INDEX_FILE)}: found it changed by others {_ATTEMPTS} times while it was written; expected a "
        "quiet moment; run the same command again with fewer writers"
    )


def _changed(path: Location, text: bytes, change: Callable[[list[dict[str, Any]]], None]) -> bytes:
    metadata = _parsed(path, text)
    change(metadata["attributes"][schema.INDEX])
    return json.dumps(metadata).encode()
