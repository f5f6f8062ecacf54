"""Spills: what one range of a fragment file told of its barcodes, in a file that is read by slices.

The counts of a barcode are its islands in increasing order, each as the LEB128 number ``2 * gap + (count > 1)``, gap
being the islands left out since the one before, and, where the count is more than 1, the LEB128 number ``count - 2``.
"""

import json
import struct
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import StoreError
from annatac_scale.store.compiled import compiled
from annatac_scale.store.place import Place

_MAGIC = b"annatac spill 1\n"
_HEAD = struct.Struct("<16sIQ")
"""Magic, crc32c of all that follows it, bytes of the JSON that follows."""
_CHECKED_FROM = 20
_HEAD_BYTES = 1 << 16
_MOST_BYTES = 15
"""Of an island's gap, at most 5, and of its count, at most 10."""


def packed(summary: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The bytes of a spill: a head of JSON that holds ``summary``, then one-dimensional ``arrays``."""
    pieces, places, at = [], {}, 0
    for name, array in arrays.items():
        places[name] = [array.dtype.str, at, len(array)]
        pieces.append(array.tobytes())
        at += array.nbytes
    body = b"".join(pieces)
    head = json.dumps({"summary": dict(summary), "arrays": places}).encode()
    crc32c = google_crc32c.extend(
        google_crc32c.value(_HEAD.pack(_MAGIC, 0, len(head))[_CHECKED_FROM:] + head), body
    )
    return b"".join([_HEAD.pack(_MAGIC, crc32c, len(head)), head, body])


class Spill:
    """A spill on disk."""

    def __init__(self, place: Place, name: str) -> None:
        self.place = place
        self.name = name

    @cached_property
    def _head(self) -> tuple[dict[str, Any], int]:
        """The head, and where the arrays begin."""
        first = self.place.read_range(self.name, 0, _HEAD_BYTES)
        magic, _, n = _HEAD.unpack_from(first)
        if magic != _MAGIC:
            raise StoreError(
                f"{self.place.location}, {self.name}: no spill of this version; remove the folder"
            )
        start = _HEAD.size + n
        if start > len(first):
            first += self.place.read_range(self.name, len(first), start - len(first))
        return json.loads(first[_HEAD.size : start]), start

    def is_whole(self) -> bool:
        """Whether it is there with all its bytes: after a power cut it may be neither."""
        try:
            data = self.place.read(self.name)
        except (FileNotFoundError, StoreError):
            return False
        if len(data) < _HEAD.size:
            return False
        magic, crc32c, _ = _HEAD.unpack_from(data)
        return bool(magic == _MAGIC and crc32c == google_crc32c.value(data[_CHECKED_FROM:]))

    @property
    def summary(self) -> dict[str, Any]:
        """What was put down when the spill was written."""
        summary: dict[str, Any] = self._head[0]["summary"]
        return summary

    def array(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """The items ``start`` to ``stop`` of an array."""
        head, begin = self._head
        dtype, at, length = head["arrays"][name]
        stop = length if stop is None else stop
        size = np.dtype(dtype).itemsize
        if start >= stop:
            return np.empty(0, dtype)
        data = self.place.read_range(self.name, begin + at + start * size, (stop - start) * size)
        return np.frombuffer(data, dtype)


def encode_counts(
    keys: NDArray[np.int64], counts: NDArray[np.int64], n_islands: int, order: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """The counts of barcodes in the given order of their numbers.

    keys: barcode * n_islands + island, increasing. Returns the bytes, and where in them and at which count each barcode
    begins, both int64 [len(order) + 1].
    """
    offsets = np.searchsorted(keys, np.append(order, -1) * n_islands)
    n = np.searchsorted(keys, (order + 1) * n_islands) - offsets[:-1]
    encoded = np.empty(_MOST_BYTES * len(keys), np.uint8)
    ends = np.zeros(len(order) + 1, np.int64)
    _encode(keys, counts, n_islands, offsets, n, encoded, ends)
    return encoded[: ends[-1]].copy(), ends, np.concatenate([[0], np.cumsum(n)])


@compiled
def _encode(keys, counts, n_islands, offsets, n, encoded, ends):  # type: ignore[no-untyped-def]
    at = 0
    for i in range(len(n)):
        after = keys[offsets[i]] // n_islands * n_islands if n[i] > 0 else 0
        for entry in range(offsets[i], offsets[i] + n[i]):
            count = counts[entry]
            at = _write_number(encoded, at, 2 * (keys[entry] - after) + (count > 1))
            if count > 1:
                at = _write_number(encoded, at, count - 2)
            after = keys[entry] + 1
        ends[i + 1] = at


@compiled
def _write_number(encoded, at, number):  # type: ignore[no-untyped-def]
    while number >= 128:
        encoded[at] = (number & 127) | 128
        number >>= 7
        at += 1
    encoded[at] = number
    return at + 1


@compiled
def decode_counts(encoded, ends, rows, cursor, islands, counts):  # type: ignore[no-untyped-def]
    """Put the counts of barcodes into the rows of a block.

    encoded: uint8; ends: int64 [n + 1], where in it each barcode begins; rows: int64 [n], its row, -1 to leave it out
    cursor: int64 [n_rows], where the next count of a row goes in ``islands`` and ``counts``, int64; it moves on
    """
    for i in range(len(rows)):
        row = rows[i]
        if row < 0:
            continue
        at, island, to = ends[i], -1, cursor[row]
        while at < ends[i + 1]:
            number, at = _read_number(encoded, at)
            island += (number >> 1) + 1
            count = 1
            if number & 1:
                more, at = _read_number(encoded, at)
                count = more + 2
            islands[to], counts[to] = island, count
            to += 1
        cursor[row] = to


@compiled
def _read_number(encoded, at):  # type: ignore[no-untyped-def]
    number, shift = 0, 0
    while encoded[at] >= 128:
        number |= (np.int64(encoded[at]) & 127) << shift
        shift += 7
        at += 1
    return number | (np.int64(encoded[at]) << shift), at + 1
