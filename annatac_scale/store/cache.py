"""Blocks of a store in object storage, kept on a local disk, up to a bound: the next epoch reads them there.

Any number of processes share one folder. ``put`` takes the folder's lock for as long as one file is written. The locked
file holds one record: (bytes of all other entries, the entry written or removed last). The size of that one entry is
looked up, so whoever is killed in between leaves a record that is right: the entry is there or is not. The only file
that is ever half is ``.aside``; the next ``put`` writes over it.
"""

import errno
import fcntl
import os
import re
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from annatac_scale.errors import InputError

_KEY = re.compile(r"[0-9A-Za-z_-]+/[0-9A-Za-z_-]+")
_LOCK, _ASIDE = ".lock", ".aside"
_MAGIC = b"annatac1"
_END = struct.Struct("<8sQII")
"""Of an entry: what it is, bytes of its data, their crc32c, that of its key."""
_RECORD = struct.Struct("<QQ200s")
"""Bytes of all other entries, when they were counted, name of the last entry; its crc32c follows."""
_COUNT_AGAIN_S = 3600
_WAIT_S = 0.2
_USER_ERRORS = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}

_turn = threading.Lock()  # of the threads of this process: they need not poll
_open_locks: set[int] = set()


def _forked() -> None:
    """In a child: a lock is held as long as any process has its file open."""
    global _turn
    _turn = threading.Lock()
    while _open_locks:
        os.close(_open_locks.pop())


os.register_at_fork(after_in_child=_forked)


@dataclass(frozen=True)
class BlockCache:
    """A folder with entries of at most ``max_bytes`` in all; may be pickled, and used by threads and processes at once.

    Nothing is evicted: an epoch reads every block once, and what had not been used for longest would be thrown out just
    before it is read again. Keys are "a/b", of letters, digits, "_" and "-". Entries are not forced to disk: a power
    cut may take some, and none is returned that is not what was put. Raises InputError where the folder cannot be
    written.

    max_bytes: of all files together; the room that a file system takes for names and the last piece of a file is more
    """

    folder: Path
    max_bytes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if self.max_bytes <= 0:
            raise InputError(f"{self.folder}: found a bound of {self.max_bytes} bytes; expected more than 0")
        try:
            os.makedirs(self.folder, exist_ok=True)
            with open(self.folder / _LOCK, "ab"):
                pass
        except OSError as error:
            raise self._forbidden(error) from error

    def get(self, key: str) -> bytes | None:
        """What was put for a key; None where nothing is, or where it is damaged, which is dropped."""
        try:
            with open(self._path(key), "rb", buffering=0) as file:
                n_bytes = os.fstat(file.fileno()).st_size - _END.size
                data = os.pread(file.fileno(), n_bytes, 0) if n_bytes >= 0 else b""
                end = os.pread(file.fileno(), _END.size, n_bytes) if n_bytes >= 0 else b""
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in _USER_ERRORS:
                raise self._forbidden(error) from error
            return None  # the disk fails: the store still has it
        if end == _end(key, data):
            return data
        self.drop(key)
        return None

    def put(self, key: str, data: bytes) -> bool:
        """Keep data for a key, unless it is kept already; False where there is no room, or another is in the way."""
        path, n_bytes = self._path(key), len(data) + _END.size
        try:
            with self._locked() as record:
                if record is None:
                    return False
                if os.path.exists(path):
                    return True
                used = self._used(record)
                if used + n_bytes > self.max_bytes:
                    return False
                return self._write(record, used, key, data)
        except OSError as error:
            if error.errno in _USER_ERRORS:
                raise self._forbidden(error) from error
            return False  # a full or failing disk: we go on without

    def drop(self, key: str) -> None:
        """Forget a key."""
        with suppress(OSError), self._locked() as record:
            if record is not None:
                # One that was cut short frees less than it took: the hourly count finds the rest.
                others = self._used(record) - _size(self._path(key))
                self._note(record, max(0, others), key)
                os.unlink(self._path(key))

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key) or len(key) > 200:
            raise ValueError(f"{key!r} is no key of a cache")
        return f"{self.folder}/{key}"

    def _forbidden(self, error: OSError) -> InputError:
        return InputError(
            f"{self.folder}: cannot be used as a cache ({error.strerror}); expected a folder on a local disk that this "
            "user may write to; choose another, or have the permissions changed"
        )

    @contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The file of the lock and the record, open, while no other thread or process has it; None: it is not free."""
        os.makedirs(self.folder, exist_ok=True)
        if not _turn.acquire(timeout=_WAIT_S):
            yield None
            return
        try:
            file = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            _open_locks.add(file)
            try:
                yield file if _lock(file) else None
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # though a process that is being forked has it open
                _open_locks.discard(file)
                os.close(file)
        finally:
            _turn.release()

    def _used(self, file: int) -> int:
        """Bytes of all entries, by the record; counted where there is no good one, and each hour."""
        raw = os.pread(file, _RECORD.size + 4, 0)
        if len(raw) == _RECORD.size + 4 and raw[-4:] == _crc(raw[:-4]):
            others, counted_s, name = _RECORD.unpack(raw[:-4])
            if 0 <= time.time() - counted_s < _COUNT_AGAIN_S:
                last = name.rstrip(b"\0").decode()
                return int(others) + (_size(f"{self.folder}/{last}") if last else 0)
        used = sum(
            entry.stat().st_size
            for folder in os.scandir(self.folder)
            if folder.is_dir()
            for entry in os.scandir(folder)
        )
        self._record(file, used, int(time.time()), "")
        return used

    def _note(self, file: int, others: int, name: str) -> None:
        counted_s = _RECORD.unpack(os.pread(file, _RECORD.size, 0))[1]
        self._record(file, others, counted_s, name)

    def _record(self, file: int, others: int, counted_s: int, name: str) -> None:
        packed = _RECORD.pack(others, counted_s, name.encode())
        os.pwrite(file, packed + _crc(packed), 0)

    def _write(self, file: int, used: int, key: str, data: bytes) -> bool:
        aside, path = f"{self.folder}/{_ASIDE}", self._path(key)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(aside, "wb", buffering=0) as entry:
                for part in (data, _end(key, data)):
                    left = memoryview(part)
                    while left:
                        left = left[entry.write(left) :]
            self._note(file, used, key)
            os.rename(aside, path)
        except OSError:
            with suppress(OSError):
                os.unlink(aside)
            raise
        return True


def _end(key: str, data: bytes) -> bytes:
    return _END.pack(_MAGIC, len(data), google_crc32c.value(data), google_crc32c.value(key.encode()))


def _crc(data: bytes) -> bytes:
    return struct.pack("<I", google_crc32c.value(data))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _lock(file: int) -> bool:
    """Whether the lock was had in time; it is not waited for longer, for a cache must not stop who reads."""
    until = time.monotonic() + _WAIT_S
    wait_s = 0.0002
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, 0.01)
