"""Files of a store on a local disk: names beside its Zarr nodes, renames and writes that survive a power cut."""

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from annatac_scale.errors import NoRoomError, StoreError

INCOMING = ".incoming"

_WAITING = 4
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def as_store_error(error: OSError, path: Path | str, what: str) -> StoreError:
    """What the system refused, in words for the user. what: "read" or "written"."""
    found = f"{path}: cannot be {what} ({error.strerror or error})"
    if error.errno in _FULL:
        return NoRoomError(
            f"{found}; expected room for it; free some, then run the same command again: what is whole is kept"
        )
    if error.errno in _FORBIDDEN:
        return StoreError(
            f"{found}; expected a place that this user may write to; choose another, or have the permissions changed"
        )
    return StoreError(f"{found}; look at the disk, then run the same command again")


def move(source: Path, target: Path) -> None:
    """Rename for good: also on disk when this returns. ``target`` may be an empty folder."""
    os.replace(source, target)
    for folder in {source.parent, target.parent}:
        sync(folder)


def write_whole(file: Path, data: bytes) -> None:
    """Replace a file by one with these bytes, whole or not at all, and on disk when this returns."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_bytes(data)
    sync(aside)
    move(aside, file)


def flush(folder: Path) -> None:
    """Force every file and folder below ``folder``, and itself, to disk."""
    in_parallel(
        sync,
        [
            path
            for parent, _, names in os.walk(folder)
            for path in [parent, *(os.path.join(parent, name) for name in names)]
        ],
    )


def in_parallel(work: Callable[[str], None], paths: Sequence[str]) -> None:
    """Do ``work``, which waits for the disk, for all paths: the disk writes its journal once for many that wait."""
    n = min(_WAITING, len(paths))
    if n < 2:
        for path in paths:
            work(path)
        return

    def some(first: int) -> None:
        for path in paths[first::n]:
            work(path)

    with ThreadPoolExecutor(n) as threads:
        list(threads.map(some, range(n)))


def sync(path: Path | str) -> None:
    """Force a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
