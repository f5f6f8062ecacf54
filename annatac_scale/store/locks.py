"""Locks of stores and folders: flock(2) on a disk, leases in object storage. Whoever is killed holds nothing.

All that comes and goes in ``.incoming`` of a local store does so under the store's lock. A draft lies there under the
name of its sample, which never begins with a dot, so that what belongs to it, ``.<name>.lock`` and ``.<name>.obs``, is
never taken for another sample.
"""

import contextlib
import errno
import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from annatac_scale.store.files import INCOMING, as_store_error
from annatac_scale.store.place import Location, is_url

if TYPE_CHECKING:
    from annatac_scale.store.leases import Lease

STORE_LOCK = ".lock"
_MOST_FILES = 1 << 17


@contextmanager
def creation_lock(path: Path) -> Iterator[None]:
    """Be alone in creating a store at ``path``; waits for others, leaves nothing beside it."""
    with folder_lock(path.parent, f".{path.name}.lock"):
        yield


@contextmanager
def folder_lock(folder: Location, name: str) -> Iterator[None]:
    """Hold the lock that the file ``name`` of a folder is; waits for other holders, leaves nothing."""
    lock: FileLock | Lease
    if is_url(folder):
        from annatac_scale.store.leases import wait_for_lease
        from annatac_scale.store.objects import Prefix

        lock = wait_for_lease(Prefix(str(folder)), name)
    else:
        file = Path(folder) / name
        lock = FileLock(file, _wait_for(file))
    try:
        yield
    finally:
        lock.release()


def try_folder_lock(folder: Location, name: str) -> "FileLock | Lease | None":
    """The same, to be given back by ``release``; None where another holds it."""
    if is_url(folder):
        from annatac_scale.store.leases import try_lease
        from annatac_scale.store.objects import Prefix

        return try_lease(Prefix(str(folder)), name)
    file = Path(folder) / name
    while True:
        handle = _open_lock(file)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        if _is_there(file, handle):
            return FileLock(file, handle)
        os.close(handle)  # its holder gave it back meanwhile


class FileLock:
    """A lock that is a file, which goes with it."""

    def __init__(self, file: Path, handle: int) -> None:
        self._file, self._handle = file, handle

    def release(self) -> None:
        """Give it back."""
        self._file.unlink(missing_ok=True)
        os.close(self._handle)


@contextmanager
def store_lock(store: Location) -> Iterator[None]:
    """Hold the lock of a store; waits for other holders."""
    if is_url(store):
        from annatac_scale.store.leases import wait_for_lease
        from annatac_scale.store.objects import Prefix

        lease = wait_for_lease(Prefix(str(store)), STORE_LOCK)
        try:
            yield
        finally:
            lease.release()
        return
    lock = _wait_for(Path(store) / STORE_LOCK)
    try:
        yield
    finally:
        os.close(lock)


def _wait_for(file: Path) -> int:
    while True:
        lock = _open_lock(file)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_there(file, lock):
            return lock
        os.close(lock)  # its holder removed the file, or the store gave way to another one, while we waited


def _is_there(file: Path, lock: int) -> bool:
    """Whether an open file is the one of that name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock), file.stat())
    return False


def _open_lock(file: Path) -> int:
    try:
        return _open(file)
    except OSError as error:  # a reader that cannot write waits for those who can
        if error.errno == errno.ENOENT:
            raise
        return os.open(file, os.O_RDONLY)


def _open(file: Path) -> int:
    """Open a lock file; a run of hundreds of samples holds more than the usual number of open files."""
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno != errno.EMFILE or not _allow_more_files():
            raise
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    if 2 * lock > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:  # leave room for all else
        _allow_more_files()
    return lock


def _allow_more_files() -> bool:
    """Raise the soft limit of open files to the hard one, if that is not beyond reason; False where it is there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft >= most:
        return False
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] > soft


class LocalLock:
    """The lock of whoever writes a sample of a local store."""

    def __init__(self, store: Path, sample: str, handle: int) -> None:
        self.store = store
        self.sample = sample
        self.handle = handle

    def release(self) -> None:
        """Give it back; leaves nothing in the store."""
        try:
            # The user may have removed the whole store in the meantime.
            with contextlib.suppress(FileNotFoundError), store_lock(self.store):
                sample_lock_file(self.store, self.sample).unlink(missing_ok=True)
                remove_incoming_if_empty(self.store)
        finally:
            os.close(self.handle)


def lock_sample(store: Location, sample: str) -> "LocalLock | Lease | None":
    """Take the lock of whoever writes ``sample``, to be given back by ``release``; None where another holds it."""
    if is_url(store):
        from annatac_scale.store.leases import try_lease
        from annatac_scale.store.objects import Prefix

        return try_lease(Prefix(str(store)), f"{INCOMING}/.{sample}.lock")
    path = Path(store)
    try:
        with store_lock(path):
            (path / INCOMING).mkdir(exist_ok=True)
            handle = _open(sample_lock_file(path, sample))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise as_store_error(error, path / INCOMING, "written") from error
    return LocalLock(path, sample, handle)


def sample_lock_file(path: Path, sample: str) -> Path:
    """The file whose lock a writer of ``sample`` holds."""
    return path / INCOMING / f".{sample}.lock"


def remove_incoming_if_empty(path: Path) -> None:
    """Remove ``.incoming`` if nobody writes; the caller holds the store's lock."""
    with contextlib.suppress(OSError):
        (path / INCOMING).rmdir()
