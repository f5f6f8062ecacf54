"""Rows in the island codec, read where they lie: held in a quarter of their decoded size, decoded when they are needed.

Specification: docs/store-format.md, "The island codec". A row's memory is known by its address, so that the rows of one
batch may lie in hundreds of blocks and still are decoded by one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import StoreError
from annatac_scale.store.compiled import bytes_at, compiled, copy_bytes
from annatac_scale.store.open_islands import OpenIslands

Ints = NDArray[np.int64]

_OK, _TRUNCATED, _BAD_NUMBER, _PAST_END = 0, 1, 2, 3
_WHAT = {
    _TRUNCATED: "a row that ends within an island",
    _BAD_NUMBER: "a number that is not canonical LEB128 of at most five bytes",
    _PAST_END: "an island beyond the last one of the island space",
}

_STEP = np.array([*(byte // 5 + 1 for byte in range(255)), 0], np.int64)
"""Islands from the previous open one to the one that a byte says; the escape is 0 here and handled apart."""
_LEVEL = np.array([*(byte % 5 + 1 for byte in range(255)), 0], np.uint8)


class DamagedRowError(StoreError):
    """Bytes that no encoder writes. row: which of the rows that were to be decoded"""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(f"row {row}: {what}; the chunk is damaged")
        self.row = row
        self.what = what


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Rows of ``n`` cells in the island codec.

    addresses: int64 [n], where in memory each row begins
    sizes: int64 [n], its bytes
    owners: the objects whose memory that is
    """

    addresses: Ints
    sizes: Ints
    owners: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.addresses)

    @classmethod
    def of_block(cls, encoded: bytes, n_rows: int) -> "EncodedRows":
        """The rows of an encoded block of ``n_rows``, not copied.

        Raises StoreError where the block's head does not fit it: no row ever reaches outside.
        """
        head = 4 * (n_rows + 1)
        if len(encoded) < head:
            raise StoreError(f"encoded block of {len(encoded)} bytes: its head alone takes {head}")
        ends = np.frombuffer(encoded, "<u4", n_rows + 1).astype(np.int64)
        sizes = ends[1:] - ends[:-1]
        if ends[0] != 0 or ends[-1] != len(encoded) - head or (sizes < 0).any():
            raise StoreError(
                f"encoded block: row ends must rise from 0 to its {len(encoded) - head} bytes of rows"
            )
        address = np.frombuffer(encoded, np.uint8).ctypes.data
        return cls(address + head + ends[:-1], sizes, (encoded,))

    @classmethod
    def of_bytes(cls, data: NDArray[np.uint8], offsets: Ints) -> "EncodedRows":
        """Rows that lie one after the other: row ``i`` is ``data[offsets[i]:offsets[i + 1]]``.

        data: uint8 [n], contiguous. Raises ValueError where it is not, or a row reaches outside of it.
        """
        if data.dtype != np.uint8 or not data.flags.c_contiguous:
            raise ValueError(
                f"encoded rows are contiguous uint8, not {data.dtype} with strides {data.strides}"
            )
        if len(offsets) and not (
            offsets[0] >= 0 and offsets[-1] <= len(data) and (np.diff(offsets) >= 0).all()
        ):
            raise ValueError(f"offsets of rows must rise from 0 or more to at most {len(data)}")
        return cls(data.ctypes.data + offsets[:-1], np.diff(offsets), (data,))

    @classmethod
    def empty(cls, n_rows: int = 0) -> "EncodedRows":
        """``n_rows`` rows without an open island."""
        return cls(np.zeros(n_rows, np.int64), np.zeros(n_rows, np.int64), ())

    @classmethod
    def concatenate(cls, parts: Sequence["EncodedRows"]) -> "EncodedRows":
        """The rows of all parts, in order."""
        none = np.empty(0, np.int64)
        return cls(
            np.concatenate([none, *(part.addresses for part in parts)]),
            np.concatenate([none, *(part.sizes for part in parts)]),
            tuple(owner for part in parts for owner in part.owners),
        )

    def __getitem__(self, rows: slice) -> "EncodedRows":
        return EncodedRows(self.addresses[rows], self.sizes[rows], self.owners)

    def take(self, rows: Ints) -> "EncodedRows":
        """The given rows (positions, int64 [m]), in the given order."""
        return EncodedRows(self.addresses[rows], self.sizes[rows], self.owners)

    def packed(self, buffer: NDArray[np.uint8] | None = None) -> tuple[NDArray[np.uint8], Ints]:
        """The rows one after the other: their bytes, uint8, and where each ends, int64 [n + 1].

        buffer: for the bytes, contiguous; None makes one. Raises ValueError where they do not go into it
        """
        offsets = np.zeros(len(self) + 1, np.int64)
        np.cumsum(self.sizes, out=offsets[1:])
        data = np.empty(offsets[-1], np.uint8) if buffer is None else buffer
        if len(data) < offsets[-1] or not data.flags.c_contiguous:
            raise ValueError(f"{offsets[-1]} bytes do not go into a buffer of {len(data)}")
        _pack(self.addresses, self.sizes, data.ctypes.data)
        return data, offsets

    def decode(self, n_islands: int, new_of_old: NDArray[np.int32] | None = None) -> OpenIslands:
        """The open islands of the rows, over ``n_islands`` islands.

        new_of_old: int32 [n_islands], increasing where it is not -1: island ``i`` becomes ``new_of_old[i]``, and those
            that become -1 are dropped

        Any bytes are safe to decode: raises DamagedRowError for what no encoder writes, ValueError where numbers are
        missing.
        """
        if new_of_old is not None and len(new_of_old) < n_islands:
            raise ValueError(f"new numbers of {len(new_of_old)} islands do not do for {n_islands}")
        offsets = np.zeros(len(self) + 1, np.int64)
        # An island takes a byte at least. What is not written is never touched, so it takes no memory.
        most = int(self.sizes.sum())
        islands, levels = np.empty(most, np.int32), np.empty(most, np.uint8)
        status, row = _decode(
            self.addresses, self.sizes, new_of_old, n_islands, offsets, islands, levels, _STEP, _LEVEL
        )
        if status != _OK:
            raise DamagedRowError(row, _WHAT[status])
        n_open = offsets[-1]
        return OpenIslands(offsets, islands[:n_open], levels[:n_open])


@compiled
def _pack(addresses, sizes, target):  # type: ignore[no-untyped-def]
    for row in range(len(addresses)):
        copy_bytes(target, addresses[row], sizes[row])
        target += sizes[row]


@compiled
def _decode(addresses, sizes, new_of_old, n_islands, offsets, islands, levels, step_of, level_of):  # type: ignore[no-untyped-def]
    """Decode all rows; returns (status, row). Never reads outside of a row. Compiled twice: with new numbers, without.

    The two tables are arguments because a global one would be copied into the code and not shared between kernels.
    """
    n, one = (
        np.uint64(0),
        np.uint64(1),
    )  # unsigned: numba looks at each signed index whether it counts from the end
    for row in range(len(addresses)):
        data = bytes_at(addresses[row])
        position, end = 0, sizes[row]
        island = -1
        while position < end:
            byte = data[position]
            position += 1
            level = level_of[byte]
            island += step_of[byte]
            if byte == 255:
                number, shift, more = np.int64(255), 0, True
                while more:
                    if position >= end:
                        return 1, row
                    part = np.int64(data[position])
                    position += 1
                    number += (part & 127) << shift
                    shift += 7
                    more = part >= 128
                    if more and shift == 35:
                        return 2, row
                if part == 0 and shift > 7:
                    return 2, row
                level = np.uint8(number % 5 + 1)
                island += number // 5 + 1
            levels[n] = level
            if new_of_old is None:
                islands[n] = island
                n += one
            else:
                if island >= n_islands:
                    return 3, row
                # Written in any case and counted where it is kept: a jump would be guessed wrong too often.
                new = new_of_old[island]
                islands[n] = new
                n += np.uint64(new >= 0)
        if island >= n_islands:  # islands only rise: the last one tells of all
            return 3, row
        offsets[row + 1] = n
    return 0, 0
