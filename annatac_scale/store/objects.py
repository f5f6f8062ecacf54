"""Object storage: a prefix as a Place, an object as a Blob, and writes that fail if someone else was faster.

Through obstore: its puts take conditions (If-None-Match, If-Match), which a commit needs, and pyarrow's do not; it took
half of pyarrow's time a request. Credentials, region and endpoint come from the usual environment alone.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

import obstore
import zarr
from obstore.exceptions import AlreadyExistsError, BaseError, NotModifiedError, PreconditionError
from obstore.store import ObjectStore, from_url

from annatac_scale.errors import InputError, StoreError

SCHEMES = ("s3", "gs")
_PARALLEL = 16
_PARTS_FROM = 32 << 20
_RETRIES = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=90),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
_PREFIXES = ("AWS_", "GOOGLE_")


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
    def _client(self) -> ObjectStore:
        return _client(split_url(self.location)[0], _environment())

    def _key(self, name: str) -> str:
        return "/".join(part for part in (split_url(self.location)[1], name) if part)

    def _url(self, name: str) -> str:
        return f"{self.location}/{name}" if name else self.location

    def read(self, name: str) -> bytes:
        """As in Place."""
        return self.find(name).data

    def find(self, name: str) -> Found:
        """An object with its ETag. Raises FileNotFoundError where it is not there."""
        with telling(self._url(name), "read"):
            got = obstore.get(self._client, self._key(name))
            return Found(bytes(got.bytes()), str(got.meta["e_tag"]), got.meta["last_modified"])

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """As in Place."""
        wanted: Any = {"suffix": -start} if start < 0 else (start, start + length)
        with telling(self._url(name), "read"):
            return bytes(obstore.get(self._client, self._key(name), options={"range": wanted}).bytes())[
                :length
            ]

    def size(self, name: str) -> int | None:
        """As in Place."""
        try:
            with telling(self._url(name), "read"):
                return int(obstore.head(self._client, self._key(name))["size"])
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """As in Place."""
        with telling(self._url(name), "written"):
            obstore.put(self._client, self._key(name), data, use_multipart=len(data) >= _PARTS_FROM)

    def write_all(self, files: Mapping[str, bytes], copies: Mapping[str, str] | None = None) -> None:
        """As in Place."""
        present = copies or {}

        def put(name: str) -> None:
            if name in files:
                self.write(name, files[name])
                return
            with telling(self._url(name), "written"):
                obstore.copy(self._client, self._key(present[name]), self._key(name))

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
                return str(obstore.put(self._client, self._key(name), data, mode=mode)["e_tag"])
            except (AlreadyExistsError, PreconditionError):
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
            pages = obstore.list(self._client, prefix=self._key(folder) or None)
            found = {meta["path"]: meta["size"] for page in pages for meta in page}
        return {path[len(start) :].lstrip("/"): size for path, size in sorted(found.items())}

    def names(self, folder: str = "") -> list[str]:
        """As in Place."""
        return list(self.sizes(folder))

    def folders(self, folder: str = "") -> list[str]:
        """As in Place."""
        with telling(self._url(folder), "read"):
            found = obstore.list_with_delimiter(self._client, prefix=self._key(folder) or None)
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found["common_prefixes"])

    def remove(self, name: str) -> None:
        """As in Place."""
        keys = [self._key(found) for found in self.names(name)] + [self._key(name)] * bool(name)
        with telling(self._url(name), "removed"), suppress(FileNotFoundError):
            obstore.delete(self._client, keys)

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
        root, key = split_url(self.location)
        try:
            with telling(self.location, "read"):
                options: Any = {"range": (start, stop), "if_match": self.stamp}
                return bytes(obstore.get(_client(root, _environment()), key, options=options).bytes())
        except (PreconditionError, FileNotFoundError) as error:
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
            meta = obstore.head(_client(root, _environment()), key)
    except FileNotFoundError as error:
        raise InputError(f"{url}: found no such object; check the address") from error
    except StoreError as error:
        raise InputError(str(error)) from error
    return ObjectBlob(url, int(meta["size"]), str(meta["e_tag"]))


def zarr_store(url: str) -> Any:
    """What zarr reads a prefix by."""
    root, key = split_url(url)
    return zarr.storage.ObjectStore(_client(f"{root}/{key}", _environment()), read_only=True)


def split_url(url: str) -> tuple[str, str]:
    """``scheme://bucket`` and the key of a URL. Raises InputError for what is no URL of object storage."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme not in SCHEMES or not bucket:
        raise InputError(
            f"{url}: found no address of object storage; expected {' or '.join(f'{s}://bucket/name' for s in SCHEMES)}"
        )
    return f"{scheme}://{bucket}", key.strip("/")


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(_PREFIXES)))


@lru_cache(64)
def _client(url: str, environment: tuple[tuple[str, str], ...]) -> ObjectStore:
    """A client for a bucket, made once for each environment: it reads the environment when it is made."""
    endpoint = next((value for name, value in environment if name == "AWS_ENDPOINT_URL"), "")
    options: Any = {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=10),
        "timeout": timedelta(seconds=300),
    }
    retries: Any = _RETRIES
    return from_url(url, client_options=options, retry_config=retries)


@contextmanager
def telling(url: str, what: str) -> Iterator[None]:
    """Turn what the server or the way to it refused into a StoreError; conditions not met and absence go through."""
    try:
        yield
    except (AlreadyExistsError, PreconditionError, NotModifiedError):
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise StoreError(f"{url}: found no such bucket; make it, or give another one") from error
        raise FileNotFoundError(url) from error
    except BaseError as error:
        raise StoreError(
            f"{url}: cannot be {what} ({_reason(error)}); expected an answer of the object storage; check the address, "
            "the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, "
            "AWS_REGION) and AWS_ENDPOINT_URL, then run the same command again"
        ) from error


def _reason(error: BaseError) -> str:
    """The first line of an error of obstore, which tells its whole source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
