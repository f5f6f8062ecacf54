"""Where files lie: a folder on disk, or a prefix in object storage, behind one small interface.

A location is a path, or a URL as ``s3://bucket/prefix``; whatever holds "://" is a URL.
"""

import os
import shutil
import stat
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import zarr

import annatac_scale.store.clients  # noqa: F401 (it has to know of forks, though object storage be read only later)
from annatac_scale.errors import InputError
from annatac_scale.store.files import as_store_error, in_parallel, sync

Location = Path | str

PARTIAL = ".partial"
"""End of the name of a file that is not whole yet; such a file is never listed."""


def is_url(location: Location) -> bool:
    """Whether a location lies in object storage."""
    return isinstance(location, str) and "://" in location


def location_of(given: Location) -> Location:
    """A location as users give it: a URL stays text, as a Path would make one slash of its two; all else is a Path."""
    return given if is_url(given) else Path(given)


def on_disk(given: Location, option: str) -> Path:
    """The path of what can only lie on a disk. ``option``: what it was given as. Raises InputError for a URL."""
    if is_url(given):
        raise InputError(f"{option} {given}: found an URL; expected a path on a disk; give one, then copy it")
    return Path(given)


def parent_of(location: Location) -> Location | None:
    """The folder that a location is in; None for a whole bucket. Raises InputError for a URL of something else."""
    if not is_url(location):
        return Path(location).absolute().parent
    from annatac_scale.store.objects import split_url

    bucket, key = split_url(str(location))
    return f"{bucket}/{key}".rpartition("/")[0] if key else None


def joined(location: Location, name: str) -> Location:
    """What is called ``name`` (relative, "/"-separated) below a location; of the same type."""
    if isinstance(location, str) and is_url(location):
        return f"{location.rstrip('/')}/{name}"
    return Path(location) / name


class Place(Protocol):
    """A folder on disk or a prefix in object storage. Names are relative to it and "/"-separated.

    Places may be pickled, and used by any number of threads. What cannot be read or written raises StoreError.
    """

    @property
    def location(self) -> str:
        """Its path or URL."""

    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError where it is not there."""

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """``length`` bytes of a file from ``start``, less at its end; ``start`` below 0 counts from its end.

        As many are read at once as there are threads that ask.

        Raises FileNotFoundError where it is not there.
        """

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is no such file."""

    def write(self, name: str, data: bytes | memoryview, wait: bool = False) -> None:
        """Write a file, whole or not at all though the process be killed; makes folders.

        wait: until a local disk has it; else a file may, after a power cut only, be there and not hold what it should
        """

    def write_all(self, files: Mapping[str, bytes], copies: Mapping[str, str] | None = None) -> None:
        """Write files that nobody reads yet, in any order; on a local disk they are waited for.

        copies: more files, new name -> present name, that are never changed in place: local ones become links
        """

    def names(self, folder: str = "") -> list[str]:
        """All files below a folder, sorted; none where it is not there."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of all files below a folder, by name, sorted."""

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders in a folder, sorted; none where it is not there."""

    def remove(self, name: str) -> None:
        """Remove a file or all files below a folder; nothing there is fine."""

    def below(self, folder: str) -> "Place":
        """The place that a folder of this one is."""


def place_of(location: Location) -> Place:
    """The place at a location; nothing is opened or made."""
    if is_url(location):
        from annatac_scale.store.objects import Prefix

        return Prefix(str(location).rstrip("/"))
    return Folder(str(location))


def open_group(location: Location) -> zarr.Group:
    """A Zarr group, for reading. Raises FileNotFoundError where there is none."""
    if is_url(location):
        from annatac_scale.store.zarr_prefix import zarr_store

        return zarr.open_group(zarr_store(str(location)), mode="r", zarr_format=3)
    return zarr.open_group(location, mode="r", zarr_format=3)


@dataclass(frozen=True)
class Folder:
    """A folder on disk, there or not."""

    location: str

    def _path(self, name: str) -> str:
        return os.path.join(self.location, name) if name else self.location

    def read(self, name: str) -> bytes:
        """As in Place."""
        return self.read_range(name, 0, -1)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """As in Place; all that follows when ``length`` is below 0."""
        try:
            with open(self._path(name), "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                first = max(0, size + start) if start < 0 else start
                return pread_all(file.fileno(), first, size - first if length < 0 else length)
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(self._path(name)) from error
        except FileNotFoundError:
            raise
        except OSError as error:
            raise as_store_error(error, self._path(name), "read") from error

    def size(self, name: str) -> int | None:
        """As in Place."""
        try:
            found = os.stat(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def write(self, name: str, data: bytes | memoryview, wait: bool = False) -> None:
        """As in Place."""
        path = self._path(name)
        folder, base = os.path.split(path)
        aside = os.path.join(folder, f".{base}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            try:
                write_new(aside, data, wait)
            except FileNotFoundError:
                os.makedirs(folder, exist_ok=True)
                write_new(aside, data, wait)
            os.replace(aside, path)
            if wait:
                sync(folder or ".")
        except OSError as error:
            self.remove(os.path.relpath(aside, self.location))
            raise as_store_error(error, path, "written") from error

    def write_all(self, files: Mapping[str, bytes], copies: Mapping[str, str] | None = None) -> None:
        """As in Place; each file is written in place."""
        made: set[str] = set()
        try:
            for name in [*files, *(copies or {})]:
                _make_parent(self._path(name), made)
            for new, present in (copies or {}).items():
                _link(self._path(present), self._path(new))
            in_parallel(lambda name: write_new(self._path(name), files[name], wait=True), list(files))
            in_parallel(sync, [folder or "." for folder in made])
        except OSError as error:
            raise as_store_error(error, error.filename or self.location, "written") from error

    def names(self, folder: str = "") -> list[str]:
        """As in Place."""
        return list(self.sizes(folder))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """As in Place."""
        found = {}
        for parent, _, names in os.walk(self._path(folder)):
            for name in names:
                if not name.endswith(PARTIAL):
                    path = os.path.join(parent, name)
                    found[os.path.relpath(path, self.location).replace(os.sep, "/")] = os.lstat(path).st_size
        return dict(sorted(found.items()))

    def folders(self, folder: str = "") -> list[str]:
        """As in Place."""
        try:
            with os.scandir(self._path(folder)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, name: str) -> None:
        """As in Place."""
        path = self._path(name)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        except (IsADirectoryError, PermissionError):
            shutil.rmtree(path, ignore_errors=True)

    def below(self, folder: str) -> "Folder":
        """As in Place."""
        return Folder(self._path(folder))


def _make_parent(path: str, made: set[str]) -> None:
    """Make the folders above a file; ``made`` collects them, and the folder that they were put into."""
    folder = os.path.dirname(path)
    if folder in made:
        return
    made.add(folder)
    try:
        os.mkdir(folder)
        made.add(os.path.dirname(folder))
    except FileExistsError:
        pass
    except FileNotFoundError:
        _make_parent(folder, made)
        os.mkdir(folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every disk has links, or as many
        shutil.copyfile(source, target)
        sync(target)


def write_new(path: str, data: bytes | memoryview, wait: bool = False) -> None:
    """Write a file that nobody reads yet; the folder must be there. wait: until it is on disk"""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
        if wait:
            os.fsync(handle)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(handle)


def pread_all(handle: int, start: int, length: int) -> bytes:
    """``length`` bytes of an open file from ``start``, less only at its end."""
    data = os.pread(handle, length, start)
    if len(data) == length:
        return data
    parts = [data]
    while parts[-1] and sum(map(len, parts)) < length:  # one call gives at most 2 GiB
        done = sum(map(len, parts))
        parts.append(os.pread(handle, length - done, start + done))
    return b"".join(parts)


class Blob(Protocol):
    """One file or object, of which any thread may read ranges; may be pickled.

    stamp: changes when its content does: the time of its last change in ns, or an object's ETag
    """

    @property
    def location(self) -> str:
        """Its path or URL."""

    @property
    def size(self) -> int:
        """Its bytes."""

    @property
    def stamp(self) -> int | str:
        """What tells this content from another."""

    def read(self, start: int, length: int) -> bytes:
        """``length`` bytes from ``start``, less only at the end. Raises InputError when it is gone or was changed."""


def blob_of(location: Location) -> Blob:
    """The file or object at a location. Raises InputError where it cannot be read."""
    if is_url(location):
        from annatac_scale.store.objects import object_blob

        return object_blob(str(location))
    path = str(location)
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected a file; check the path"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(
            f"{path}: found no plain file; expected one that can be read at any place; save it first"
        )
    return FileBlob(path, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class FileBlob:
    """A file on disk."""

    location: str
    size: int
    stamp: int

    def read(self, start: int, length: int) -> bytes:
        """As in Blob."""
        try:
            with open(self.location, "rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                if (found.st_size, found.st_mtime_ns) != (self.size, self.stamp):
                    raise InputError(
                        f"{self.location}: changed while it was read ({found.st_size:,} bytes, {self.size:,} before); "
                        "run the same command again when it is whole"
                    )
                return pread_all(file.fileno(), start, length)
        except OSError as error:
            raise InputError(
                f"{self.location}: cannot be read at byte {start:,} ({error.strerror}); expected the file that was "
                "there at the start; put it back and run the same command again"
            ) from error
