"""What the root and the index of samples say: the attributes of two groups, read and written as JSON."""

import json
from pathlib import Path
from typing import Any

from annatac_scale.errors import StoreError
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store import schema
from annatac_scale.store.files import write_whole

_ENTRY_KEYS = {"name", "n_cells", "n_open", "x_sha256", "digest"}


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


def read_root(path: Path) -> dict[str, Any]:
    """The root attributes of the store at ``path``.

    Raises StoreError where there is no store, its major version is not ours, or an attribute is missing.
    """
    file = path / "zarr.json"
    try:
        attributes: dict[str, Any] = dict(json.loads(file.read_text()).get("attributes", {}))
    except OSError as error:
        raise StoreError(f"{path}: no island store here; make one with `annatac convert`") from error
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


def committed_samples(path: Path | str) -> list[str]:
    """Names of the samples in order of commit."""
    return [entry["name"] for entry in read_index(Path(path))]


def read_index(path: Path) -> list[dict[str, Any]]:
    """The committed samples in order of commit: ``{name, n_cells, n_open, shard_open, x_sha256, digest}`` each.

    ``shard_open`` is missing in entries that were written by format 1.0.
    """
    file = path / schema.SAMPLES / "zarr.json"
    try:
        index: list[dict[str, Any]] = json.loads(file.read_text())["attributes"][schema.INDEX]
        missing = [key for entry in index for key in _ENTRY_KEYS - entry.keys()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: not an island store ({file} has no index of samples)") from error
    if missing:
        raise StoreError(f"{file}: found no {missing[0]!r} in an entry of the index; the store is damaged")
    return index


def write_index(path: Path, index: list[dict[str, Any]]) -> None:
    """Replace the index; the caller holds the store's lock."""
    file = path / schema.SAMPLES / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["attributes"][schema.INDEX] = index
    write_whole(file, json.dumps(metadata, indent=1))
