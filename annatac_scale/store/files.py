"""What lies beside the Zarr nodes of a store: its locks and ``.incoming``; renames that survive a power cut.

Locks are flock(2): a killed writer holds nothing. All that comes and goes in ``.incoming`` does so under the store's
lock. A sample is written there under its own name, which never begins with a dot, so that what belongs to it,
``.<name>.lock`` and ``.<name>.obs``, is never taken for another sample.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from annatac_scale.errors import StoreError

INCOMING = ".incoming"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def as_store_error(error: OSError, path: Path | str, what: str) -> StoreError:
    """What the system refused, in words for the user. what: "read" or "written"."""
    advice = "look at the disk, then run the same command again"
    if error.errno in _FULL:
        advice = "expected room for it; free some, then run the same command again: what is whole is kept"
    elif error.errno in _FORBIDDEN:
        advice = (
            "expected a place that this user may write to; choose another, or have the permissions changed"
        )
    return StoreError(f"{path}: cannot be {what} ({error.strerror or error}); {advice}")


def sample_aside(path: Path, sample: str) -> Path:
    """Where a sample is written before its commit."""
    return path / INCOMING / sample


def obs_aside(path: Path, sample: str) -> Path:
    """Where the obs of a committed sample, old and new, lie while it is replaced."""
    return path / INCOMING / f".{sample}.obs"


def any_obs_aside(path: Path) -> bool:
    """Whether the obs of a sample is being replaced, or was when its writer was killed."""
    return any((path / INCOMING).glob(".*.obs"))


@contextmanager
def creation_lock(path: Path) -> Iterator[None]:
    """Be alone in creating a store at ``path``; waits for others, leaves nothing beside it."""
    file = path.with_name(f".{path.name}.lock")
    lock = _wait_for(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def store_lock(path: Path) -> Iterator[None]:
    """Hold the lock of the store at ``path``; waits for other holders."""
    lock = _wait_for(path / ".lock")
    try:
        yield
    finally:
        os.close(lock)


def _wait_for(file: Path) -> int:
    while True:
        lock = _open_lock(file)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), file.stat()):
                return lock
        os.close(lock)  # its holder removed the file, or the store gave way to another one, while we waited


def _open_lock(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:  # a reader that cannot write waits for those who can
        return os.open(file, os.O_RDONLY)


def lock_sample(path: Path, sample: str) -> int | None:
    """Take the lock of whoever writes ``sample``, as a file descriptor; None where another holds it."""
    with store_lock(path):
        (path / INCOMING).mkdir(exist_ok=True)
        lock = os.open(_sample_lock(path, sample), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock


def unlock_sample(path: Path, sample: str, lock: int) -> None:
    """Give back what ``lock_sample`` took; leaves nothing in the store."""
    try:
        # The user may have removed the whole store in the meantime.
        with contextlib.suppress(FileNotFoundError), store_lock(path):
            _sample_lock(path, sample).unlink(missing_ok=True)
            remove_incoming_if_empty(path)
    finally:
        os.close(lock)


def _sample_lock(path: Path, sample: str) -> Path:
    return path / INCOMING / f".{sample}.lock"


def remove_incoming_if_empty(path: Path) -> None:
    """Remove ``.incoming`` if nobody writes; the caller holds the store's lock."""
    with contextlib.suppress(OSError):
        (path / INCOMING).rmdir()


def move(source: Path, target: Path) -> None:
    """Rename for good: also on disk when this returns. ``target`` may be an empty folder."""
    os.replace(source, target)
    for folder in {source.parent, target.parent}:
        sync(folder)


def write_whole(file: Path, text: str) -> None:
    """Replace a file by one with this text, whole or not at all."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text)
    sync(aside)
    move(aside, file)


def flush(folder: Path) -> None:
    """Force every file and folder below ``folder``, and itself, to disk."""
    for parent, _, files in os.walk(folder):
        for name in [*files, "."]:
            sync(Path(parent, name))


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
