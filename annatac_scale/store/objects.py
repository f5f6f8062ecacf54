"""Object storage: a prefix as a Place, an object as a Blob, and writes that fail if someone else was faster.

Through obstore: its puts take conditions (If-None-Match, If-Match), which a commit needs, and pyarrow's do not. With
many ranges in flight, each asked for by a thread of its own, it takes less CPU than pyarrow and s3fs, and its other
calls no less (benchmarks/bench_requests.py). Credentials, region and endpoint come from the usual environment alone.
"""

import random
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store.clients import client, obstore

SCHEMES = ("s3", "gs")
_PARALLEL = 16
_PARTS_FROM = 32 << 20
_OTHER_RANGE = "Requested "
"""In obstore's message where an answer says that it is for less than was asked for."""

_TORN_S = (0.1, 0.3, 1.0, 3.0)
"""Waits, at most, before an answer that is not whole is asked for again."""


@dataclass(frozen=True)
class Found:
    """An object as it was read. etag: changes with its content; modified: by the server's clock"""

    data: bytes
    etag: str
    modified: datetime


@dataclass(frozen=True)
class Prefix:
    """A prefix in object storage, ``scheme://bucket`` or ``scheme://bucket/a/b``; all as in store.place.Place."""

    location: str

    def __post_init__(self) -> None:
        split_url(self.location)

    @property
    def _client(self) -> Any:
        return client(split_url(self.location)[0])

    def _key(self, name: str) -> str:
        return "/".join(part for part in (split_url(self.location)[1], name) if part)

    def _url(self, name: str) -> str:
        return f"{self.location}/{name}" if name else self.location

    def read(self, name: str) -> bytes:
        """As in Place."""
        return self.find(name).data

    def find(self, name: str) -> Found:
        """An object with its ETag. Raises FileNotFoundError where it is not there."""
        data, answer = _get(self._url(name), {})
        return Found(data, str(answer.meta["e_tag"]), answer.meta["last_modified"])

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """As in Place."""
        wanted = {"suffix": -start} if start < 0 else (start, start + length)
        return _get(self._url(name), {"range": wanted})[0][:length]

    def read_from(self, name: str, start: int) -> bytes:
        """All bytes of an object from ``start``."""
        return _get(self._url(name), {"range": {"offset": start}})[0]

    def size(self, name: str) -> int | None:
        """As in Place."""
        try:
            with telling(self._url(name), "read"):
                return int(obstore().head(self._client, self._key(name))["size"])
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes | memoryview, wait: bool = False) -> None:
        """As in Place; always waited for."""
        with telling(self._url(name), "written"):
            obstore().put(self._client, self._key(name), data, use_multipart=len(data) >= _PARTS_FROM)

    def write_all(self, files: Mapping[str, bytes], copies: Mapping[str, str] | None = None) -> None:
        """As in Place."""
        present = copies or {}

        def put(name: str) -> None:
            if name in files:
                self.write(name, files[name])
                return
            with telling(self._url(name), "written"):
                obstore().copy(self._client, self._key(present[name]), self._key(name))

        names = [*files, *present]
        with ThreadPoolExecutor(min(_PARALLEL, max(1, len(names)))) as threads:
            list(threads.map(put, names))

    def write_new(self, name: str, data: bytes) -> str | None:
        """Write an object that is not there, and return its ETag; None where it is there, with other content."""
        return self._put_if(name, data, "create")

    def replace(self, name: str, data: bytes, etag: str) -> str | None:
        """Replace an object that still has this ETag, and return the new one; None where it was changed or removed."""
        return self._put_if(name, data, {"e_tag": etag})

    def _put_if(self, name: str, data: bytes, mode: Any) -> str | None:
        with telling(self._url(name), "written"):
            try:
                return str(obstore().put(self._client, self._key(name), data, mode=mode)["e_tag"])
            except _refused("AlreadyExistsError", "PreconditionError"):
                pass
            except FileNotFoundError as error:
                if "NoSuchKey" in str(error):  # replaced, but removed meanwhile
                    return None
                raise
        with suppress(FileNotFoundError):
            found = self.find(name)
            if found.data == data:  # the answer was lost, the request sent again
                return found.etag
        return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """As in Place."""
        start = self._key("")
        with telling(self._url(folder), "read"):
            pages = obstore().list(self._client, prefix=self._key(folder) or None)
            found = {meta["path"]: meta["size"] for page in pages for meta in page}
        return {path[len(start) :].lstrip("/"): size for path, size in sorted(found.items())}

    def names(self, folder: str = "") -> list[str]:
        """As in Place."""
        return list(self.sizes(folder))

    def folders(self, folder: str = "") -> list[str]:
        """As in Place."""
        return sorted(_last(path) for path in self._listed(folder)["common_prefixes"])

    def listed(self, folder: str = "") -> list[str]:
        """Names of the folders and files in a folder, sorted."""
        found = self._listed(folder)
        return sorted(map(_last, [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]))

    def _listed(self, folder: str) -> Any:
        with telling(self._url(folder), "read"):
            return obstore().list_with_delimiter(self._client, prefix=self._key(folder) or None)

    def remove(self, name: str) -> None:
        """As in Place."""
        keys = [self._key(found) for found in self.names(name)] + [self._key(name)] * bool(name)
        with telling(self._url(name), "removed"), suppress(FileNotFoundError):
            obstore().delete(self._client, keys)

    def below(self, folder: str) -> "Prefix":
        """As in Place."""
        return Prefix(self._url(folder))


@dataclass(frozen=True)
class ObjectBlob:
    """An object; everything as in store.place.Blob."""

    location: str
    size: int
    stamp: str

    def read(self, start: int, length: int) -> bytes:
        """As in Blob."""
        stop = min(start + length, self.size)
        if stop <= start:
            return b""
        changed: tuple[type[Exception], ...] = (FileNotFoundError, *_refused("PreconditionError"))
        try:
            return _get(self.location, {"range": (start, stop), "if_match": self.stamp})[0]
        except changed as error:
            raise InputError(
                f"{self.location}: changed or removed while it was read; expected the object that was there at the "
                "start; run the same command again when it is whole"
            ) from error
        except StoreError as error:
            raise InputError(str(error)) from error


def object_blob(url: str) -> ObjectBlob:
    """The object at a URL. Raises InputError where it cannot be read."""
    try:
        root, key = split_url(url)
        with telling(url, "read"):
            meta = obstore().head(client(root), key)
    except FileNotFoundError as error:
        raise InputError(f"{url}: found no such object; check the address") from error
    except StoreError as error:
        raise InputError(str(error)) from error
    return ObjectBlob(url, int(meta["size"]), str(meta["e_tag"]))


def _get(url: str, options: dict[str, Any]) -> tuple[bytes, Any]:
    """An object or a range of it, whole, and obstore's answer, which has its ``meta``.

    obstore asks again after 429, 5xx, resets, and bodies that end early; an answer that looks in order, but holds less
    than it is an answer for, is asked for again here.
    """
    root, key = split_url(url)
    found = "none"
    for wait_s in (*_TORN_S, None):
        with telling(url, "read"):
            try:
                got = obstore().get(client(root, reading=True), key, options=options)
                data = bytes(got.bytes())
            except _refused("GenericError") as error:
                if _OTHER_RANGE not in str(error):
                    raise
                found = _reason(error)
            else:
                first, stop = got.range
                if len(data) == stop - first:
                    return data, got
                found = f"{len(data):,} of {stop - first:,} bytes"
        if wait_s is not None:
            time.sleep(random.uniform(0.5, 1.0) * wait_s)
    raise StoreError(
        f"{url}: cannot be read (found {found}, {len(_TORN_S) + 1} times); expected all bytes that were asked for; "
        "look what lies between here and the object storage, as a proxy, and at AWS_ENDPOINT_URL, then run the same "
        "command again"
    )


def _refused(*names: str) -> tuple[type[Exception], ...]:
    """Exceptions of obstore; each process may have its own."""
    return tuple(getattr(obstore().exceptions, name) for name in names)


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def split_url(url: str) -> tuple[str, str]:
    """``scheme://bucket`` and the key of a URL. Raises InputError for what is no URL of object storage."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme not in SCHEMES or not bucket:
        raise InputError(
            f"{url}: found no address of object storage; expected {' or '.join(f'{s}://bucket/name' for s in SCHEMES)}"
        )
    return f"{scheme}://{bucket}", key.strip("/")


@contextmanager
def telling(url: str, what: str) -> Iterator[None]:
    """Turn what the server or the way to it refused into a StoreError; conditions not met and absence go through."""
    try:
        yield
    except _refused("AlreadyExistsError", "PreconditionError", "NotModifiedError"):
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise StoreError(f"{url}: found no such bucket; make it, or give another one") from error
        raise FileNotFoundError(url) from error
    except _refused("BaseError") as error:
        raise StoreError(
            f"{url}: cannot be {what} ({_reason(error)}); expected an answer of the object storage; check the address, "
            "the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, "
            "AWS_REGION) and AWS_ENDPOINT_URL, then run the same command again"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error of obstore, which tells its whole source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
