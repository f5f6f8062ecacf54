"""Writes fragments as text: lines made by one compiled kernel, packed as BGZF, gzip, zstd or nothing.

Bytes depend on the fragments and the zlib of the machine, never on the number of threads.
"""

import gzip
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numba
import numpy as np
import pyarrow as pa

EXTENSION = {"bgzf": ".tsv.gz", "gzip": ".tsv.gz", "zstd": ".tsv.zst", "text": ".tsv"}
BLOCK_BYTES = 0xFF00  # of text in a BGZF block, as bgzip has it
_HEADER = struct.pack("<4BI2BH2BHH", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, 0)[:-2]
_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_LINES_AT_ONCE = 200_000


class Fragments(NamedTuple):
    """Columns of fragments: chromosome and barcode are indices into the writer's names."""

    chrom: np.ndarray  # uint8
    start: np.ndarray  # int32
    length: np.ndarray  # int32
    barcode: np.ndarray  # int32
    count: np.ndarray  # uint8


@numba.njit(nogil=True, cache=True)
def _put_number(buffer: np.ndarray, at: int, value: int) -> int:
    digits = 1
    bound = 10
    while value >= bound:
        bound *= 10
        digits += 1
    for place in range(at + digits - 1, at - 1, -1):
        buffer[place] = 48 + value % 10
        value //= 10
    return at + digits


@numba.njit(nogil=True, cache=True)
def _put_name(buffer: np.ndarray, at: int, names: np.ndarray, row: int, length: int) -> int:
    for place in range(length):
        buffer[at + place] = names[row, place]
    return at + length


@numba.njit(nogil=True, cache=True)
def _format(
    chrom: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    barcode: np.ndarray,
    count: np.ndarray,
    names: np.ndarray,
    name_lengths: np.ndarray,
    barcodes: np.ndarray,
    buffer: np.ndarray,
) -> int:
    at = 0
    for line in range(len(start)):
        at = _put_name(buffer, at, names, chrom[line], name_lengths[chrom[line]])
        buffer[at] = 9
        at = _put_number(buffer, at + 1, start[line])
        buffer[at] = 9
        at = _put_number(buffer, at + 1, start[line] + length[line])
        buffer[at] = 9
        at = _put_name(buffer, at + 1, barcodes, barcode[line], barcodes.shape[1])
        buffer[at] = 9
        at = _put_number(buffer, at + 1, count[line])
        buffer[at] = 10
        at += 1
    return at


def _as_bytes(names: Sequence[str]) -> np.ndarray:
    array = np.array(names, dtype=bytes)
    return array.view(np.uint8).reshape(len(array), -1)


def bgzf_block(text: bytes, level: int) -> bytes:
    """One block of at most BLOCK_BYTES of text."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    packed = packer.compress(text) + packer.flush()
    return b"".join(
        (
            _HEADER,
            struct.pack("<H", len(packed) + 25),
            packed,
            struct.pack("<II", zlib.crc32(text), len(text)),
        )
    )


class BgzfFile:
    """Write-only BGZF with threads; blocks are written in order and at most four a thread are in memory."""

    def __init__(self, file: BinaryIO, level: int, threads: int) -> None:
        self._file, self._level, self._rest = file, level, b""
        self._pool = ThreadPoolExecutor(threads)
        self._waiting: deque[Future[bytes]] = deque()
        self._most = 4 * threads

    def write(self, text: bytes) -> None:
        text = self._rest + text
        whole = len(text) - len(text) % BLOCK_BYTES
        for begin in range(0, whole, 16 * BLOCK_BYTES):
            self._submit(text[begin : min(begin + 16 * BLOCK_BYTES, whole)])
        self._rest = text[whole:]

    def close(self) -> None:
        self._submit(self._rest)
        self._drain(0)
        self._pool.shutdown()
        self._file.write(_END)

    def _submit(self, text: bytes) -> None:
        self._waiting.append(self._pool.submit(self._packed, text))
        self._drain(self._most)

    def _drain(self, most: int) -> None:
        while len(self._waiting) > most:
            self._file.write(self._waiting.popleft().result())

    def _packed(self, text: bytes) -> bytes:
        blocks = range(0, len(text), BLOCK_BYTES)
        return b"".join(bgzf_block(text[begin : begin + BLOCK_BYTES], self._level) for begin in blocks)


@contextmanager
def open_packed(path: Path, compression: str, level: int, threads: int) -> Iterator[Any]:
    """Something with ``write(bytes)`` that packs into ``path``."""
    with path.open("wb") as file:
        if compression == "bgzf":
            packed = BgzfFile(file, level, threads)
            yield packed
            packed.close()
        elif compression == "gzip":
            with gzip.GzipFile("", "wb", level, file, mtime=0) as packed_gzip:
                yield packed_gzip
        elif compression == "zstd":
            with pa.CompressedOutputStream(pa.PythonFile(file, "w"), "zstd") as packed_zstd:
                yield packed_zstd
        else:
            yield file


class FragmentWriter:
    """Formats fragments into an open packed file."""

    def __init__(self, out: Any, chromosomes: Sequence[str], barcodes: Sequence[str]) -> None:
        self._out = out
        self._names = _as_bytes(chromosomes)
        self._name_lengths = np.array([len(name) for name in chromosomes])
        self._barcodes = _as_bytes(barcodes)
        longest = self._names.shape[1] + 2 * 10 + self._barcodes.shape[1] + 3 + 5
        self._buffer = np.empty(_LINES_AT_ONCE * longest, dtype=np.uint8)

    def header(self, lines: Sequence[str]) -> None:
        self._out.write("".join(f"# {line}\n" for line in lines).encode())

    def write(self, fragments: Fragments) -> None:
        for begin in range(0, len(fragments.start), _LINES_AT_ONCE):
            part = (column[begin : begin + _LINES_AT_ONCE] for column in fragments)
            end = _format(*part, self._names, self._name_lengths, self._barcodes, self._buffer)
            self._out.write(self._buffer[:end].tobytes())
