"""Where a sample came from: the record that tells whether a conversion was done already, and what differs if not."""

import hashlib
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from annatac_scale.errors import InputError

_PACKAGES = ("annatac_scale", "anndata", "dask", "h5py", "numba", "numpy", "pandas", "scipy", "zarr")
_HASH_BYTES = 1 << 22


def now() -> str:
    """The time as text, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that took part."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def fingerprint(files: Mapping[str, Path], known: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """role, path, size, mtime_ns and sha256 of files given by role, in the order of the roles.

    known: an earlier record; where path, size and time of a file are as they were, its digest is taken from there.
    """
    earlier = {entry["path"]: entry for entry in known or ()}
    return [_entry(role, os.path.abspath(path), earlier) for role, path in sorted(files.items())]


def _entry(role: str, path: str, earlier: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    try:
        status = os.stat(path)
        entry = {"role": role, "path": path, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        before = earlier.get(path, {})
        same = all(before.get(key) == entry[key] for key in ("size", "mtime_ns"))
        return {**entry, "sha256": before["sha256"] if same else _sha256(path)}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def difference(
    then: Mapping[str, Any], kind: str, files: Mapping[str, Path], options: Mapping[str, Any]
) -> str:
    """What differs between a sample's record and a conversion asked for now, "" where nothing does.

    Paths and times do not count: a file that was moved or copied is the same file.
    """
    if then.get("kind") != kind:
        return f"it was made from {then.get('kind')}, now {kind}"
    for name in sorted({*then.get("options", {}), *options}):
        before, after = then["options"].get(name), options.get(name)
        if before != after:
            return f"it was made with {name} = {before}, now {after}"
    inputs = {entry["role"]: entry for entry in fingerprint(files, then["inputs"])}
    before_inputs = {entry["role"]: entry for entry in then["inputs"]}
    for role in sorted({*inputs, *before_inputs}):
        if role not in inputs or role not in before_inputs:
            return f"it was made {'with' if role in before_inputs else 'without'} a file for {role}"
        if inputs[role]["sha256"] != before_inputs[role]["sha256"]:
            return f"{inputs[role]['path']} ({role}) has other content than then"
    return ""
