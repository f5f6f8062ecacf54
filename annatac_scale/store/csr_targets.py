"""Where an export is written to: an h5ad file or a Zarr v3 folder, each array piece by piece.

HDF5 compresses in one thread, at 110 MB/s. Chunks are therefore deflated here, by threads and isal, and handed over as
they are to lie in the file: any HDF5 reads them. Zarr arrays are written a shard at a time, by zarr.
"""

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import h5py
import numpy as np
import zarr
from isal import isal_zlib
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from annatac_scale.errors import StoreError
from annatac_scale.store.nodes import ARRAY, STRINGS, Encoding

CHUNK = 1 << 18
"""Values of a chunk: 1 MB of int32."""

SHARD = 1 << 23
"""Values of a Zarr shard of X: 32 MB of int32 before compression."""


class Values:
    """A one-dimensional array of ``n`` values that come in order, in runs of any length."""

    def __init__(
        self, n: int, piece: int, put: Callable[[int, NDArray[Any]], None], end: Callable[[], None]
    ) -> None:
        self.n = n
        self._piece = piece
        self._put = put
        self._end = end
        self._waiting: list[NDArray[Any]] = []
        self._n_waiting = self._n_put = 0

    def append(self, values: NDArray[Any]) -> None:
        """Add values; whole pieces are written."""
        if self._n_put + self._n_waiting + len(values) > self.n:
            raise _other_number(self.n)
        if not len(values):
            return
        self._waiting.append(values)
        self._n_waiting += len(values)
        while self._n_waiting >= self._piece:
            self._write(self._piece)

    def finish(self) -> None:
        """Write what is left; all values have to be there."""
        if self._n_waiting:
            self._write(self._n_waiting)
        self._end()
        if self._n_put != self.n:
            raise _other_number(self.n)

    def _write(self, size: int) -> None:
        together = np.concatenate(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._put(self._n_put, together[:size])
        self._waiting = [together[size:].copy()]
        self._n_put += size
        self._n_waiting -= size


def _other_number(n: int) -> StoreError:
    return StoreError(
        f"cells: found other than the {n:,} values that the store's index says; look with `annatac info --verify`"
    )


class Target(Protocol):
    """An AnnData being written; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...

    @property
    def root(self) -> Any:
        """The root group, as h5py or zarr has it."""

    def group(self, name: str, encoding: Encoding, **attributes: Any) -> None:
        """Make a group; ``name`` is "" for the root."""

    def numbers(self, name: str, n: int, dtype: "np.dtype[Any]", encoded: bool = True) -> Values:
        """Make an array of numbers or truth values; the parts of a matrix have no encoding of their own."""

    def strings(self, name: str, n: int) -> Values:
        """Make an array of strings, which come as objects."""


class H5adFile:
    """An h5ad file."""

    def __init__(self, path: Path, workers: int) -> None:
        self.root = h5py.File(path, "w")
        self._workers = workers
        self._threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        self.root.close()

    def group(self, name: str, encoding: Encoding, **attributes: Any) -> None:
        """As in Target."""
        group = self.root.require_group(name) if name else self.root
        lists = {key: _as_array(value) for key, value in attributes.items() if isinstance(value, list)}
        _describe(group.attrs, encoding, attributes | lists)

    def numbers(self, name: str, n: int, dtype: "np.dtype[Any]", encoded: bool = True) -> Values:
        """As in Target."""
        size = min(CHUNK, n)
        shuffle = dtype.itemsize > 1
        options: Any = {"chunks": (size,), "compression": "gzip", "compression_opts": 1, "shuffle": shuffle}
        made = self.root.create_dataset(name, (n,), dtype, **options if n else {})
        if encoded:
            _describe(made.attrs, ARRAY, {})
        waiting: deque[tuple[int, Future[bytes]]] = deque()

        def write(most_left: int) -> None:
            while len(waiting) > most_left:
                start, deflated = waiting.popleft()
                made.id.write_direct_chunk((start,), deflated.result())

        def put(start: int, values: NDArray[Any]) -> None:
            waiting.append((start, self._threads.submit(_deflated, values.astype(dtype, copy=False), size)))
            write(2 * self._workers)

        return Values(n, size, put, lambda: write(0))

    def strings(self, name: str, n: int) -> Values:
        """As in Target."""
        made = self.root.create_dataset(name, (n,), h5py.string_dtype())
        _describe(made.attrs, STRINGS, {})

        def put(start: int, values: NDArray[Any]) -> None:
            made[start : start + len(values)] = values

        return Values(n, CHUNK, put, lambda: None)


def _as_array(values: list[Any]) -> NDArray[Any]:
    return np.array(values, np.int64 if isinstance(values[0], int) else object)


def _deflated(values: NDArray[Any], size: int) -> bytes:
    """A chunk of ``size`` values, the last of them maybe short, as HDF5's filters shuffle and deflate leave it."""
    whole = np.zeros(size, values.dtype)
    whole[: len(values)] = values
    data = np.ascontiguousarray(whole.view(np.uint8).reshape(size, -1).T)
    return bytes(isal_zlib.compress(data.tobytes(), 1))


class ZarrFolder:
    """A folder in Zarr v3, which alone has shards: without them X would be a file for each megabyte."""

    def __init__(self, path: Path) -> None:
        self.root = zarr.open_group(path, mode="w", zarr_format=3)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def group(self, name: str, encoding: Encoding, **attributes: Any) -> None:
        """As in Target."""
        group = self.root.require_group(name) if name else self.root
        _describe(group.attrs, encoding, attributes)

    def numbers(self, name: str, n: int, dtype: "np.dtype[Any]", encoded: bool = True) -> Values:
        """As in Target."""
        chunk = min(CHUNK, max(1, n))
        n_chunks = 1 if encoded else min(SHARD // CHUNK, math.ceil(n / chunk))
        packed = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle" if dtype.itemsize > 1 else "noshuffle")
        made = self.root.create_array(
            name, shape=(n,), dtype=dtype, chunks=(chunk,), compressors=[packed],
            shards=(n_chunks * chunk,) if n_chunks > 1 else None,
        )  # fmt: skip
        if encoded:
            _describe(made.attrs, ARRAY, {})
        return _appended(made, n, max(1, n_chunks) * chunk)

    def strings(self, name: str, n: int) -> Values:
        """As in Target."""
        chunk = min(CHUNK, max(1, n))
        made = self.root.create_array(name, shape=(n,), dtype=str, chunks=(chunk,))
        _describe(made.attrs, STRINGS, {})
        return _appended(made, n, chunk)


def _appended(made: Any, n: int, piece: int) -> Values:
    def put(start: int, values: NDArray[Any]) -> None:
        made[start : start + len(values)] = values

    return Values(n, piece, put, lambda: None)


def _describe(attributes: Any, encoding: Encoding, more: dict[str, Any]) -> None:
    for name, value in {"encoding-type": encoding[0], "encoding-version": encoding[1], **more}.items():
        attributes[name] = value
