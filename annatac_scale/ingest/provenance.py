"""Where a sample came from: the record that tells whether a conversion was done already, and what differs if not."""

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from annatac_scale.ingest.text import RANGE_BYTES, digest_of_pieces
from annatac_scale.store.place import Location, blob_of, is_url

_PACKAGES = ("annatac_scale", "anndata", "dask", "h5py", "numba", "numpy", "pandas", "scipy", "zarr")


def now() -> str:
    """The time as text, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that took part."""
    return dict(_versions())


def stamps(files: Mapping[str, Location]) -> list[dict[str, Any]]:
    """role, path, size and stamp (time of the last change in ns, or ETag) of files given by role, sorted by role.

    Raises InputError for a file that cannot be read.
    """
    entries = []
    for role, location in sorted(files.items()):
        path = str(location) if is_url(location) else str(Path(location).absolute())
        blob = blob_of(path)
        entries.append({"role": role, "path": path, "size": blob.size, "stamp": blob.stamp})
    return entries


def digested(
    entries: list[dict[str, Any]], known: Mapping[str, str] | None = None, piece_bytes: int = RANGE_BYTES
) -> list[dict[str, Any]]:
    """The entries with the digests of their files; ``known`` has those, by role, that are known already.

    sha256 (hex) is that of the file, or of the sha256 of its pieces where it is longer than ``piece_bytes``.
    """
    known = known or {}
    return [
        {
            **entry,
            "sha256": known.get(entry["role"]) or digest_of_pieces(entry["path"], piece_bytes),
            "piece_bytes": piece_bytes,
        }
        for entry in entries
    ]


def difference(
    then: Mapping[str, Any], kind: str, files: Mapping[str, Location], options: Mapping[str, Any]
) -> str:
    """What differs between a sample's record and a conversion asked for now, "" where nothing does.

    Paths and times do not count: a file that was moved or copied is the same file. A file that has its size and its
    stamp is not read again.
    """
    if then.get("kind") != kind:
        return f"it was made from {then.get('kind')}, now {kind}"
    for name in sorted({*then.get("options", {}), *options}):
        before, after = then["options"].get(name), options.get(name)
        if before != after:
            return f"it was made with {name} = {before}, now {after}"
    entries = {entry["role"]: entry for entry in stamps(files)}
    before_entries = {entry["role"]: entry for entry in then["inputs"]}
    for role in sorted({*entries, *before_entries}):
        if role not in entries or role not in before_entries:
            return f"it was made {'with' if role in before_entries else 'without'} a file for {role}"
        if not _is_same(before_entries[role], entries[role]):
            return f"{entries[role]['path']} ({role}) has other content than then"
    return ""


def _is_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    if before["size"] != after["size"]:
        return False
    # Records of annatac_scale 0.1.0 have the digest of the whole file.
    stamp, piece_bytes = (
        before.get("stamp", before.get("mtime_ns")),
        before.get("piece_bytes", before["size"] or 1),
    )
    if before["path"] == after["path"] and stamp == after["stamp"]:
        return True
    return bool(before["sha256"] == digest_of_pieces(after["path"], piece_bytes))
