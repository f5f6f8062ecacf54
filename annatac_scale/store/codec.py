"""The island codec: a block of cells as gaps and levels, one byte for nearly every open island.

Encoded block (specification: docs/store-format.md, "The island codec"):

    uint32 little-endian [n_rows + 1]   ends of the rows, counted from the end of this head; the first is 0
    bytes                               the rows, one after the other

A row lists its open islands in order. With ``gap`` the number of closed islands since the previous open one (or
since the row's start) and ``level`` in 1..5, an island is the single byte ``gap * 5 + level - 1`` when gap <= 50,
else byte 255, then gap as canonical unsigned LEB128, then one byte level.

Neither torch, ray nor dask is imported here: reading a store with plain Zarr needs this module alone.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON, parse_named_configuration

from annatac_scale.errors import StoreError
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.schema import CODEC, N_LEVELS

ESCAPE = 255
MAX_SHORT_GAP = 50
_MAX_LEB128_BYTES = 5
_LONGEST_ISLAND = 1 + _MAX_LEB128_BYTES + 1

_OK, _BAD_LEVEL, _TRUNCATED, _BAD_GAP, _PAST_END = 0, 1, 2, 3, 4
_WHAT = {
    _BAD_LEVEL: "a level outside 1..5",
    _TRUNCATED: "a row that ends within an island",
    _BAD_GAP: "a gap that is not canonical LEB128 or should have been a single byte",
    _PAST_END: "an island beyond the last one of the island space",
}


@njit(nogil=True, cache=True)
def _encode(offsets, islands, levels, ends, out):  # type: ignore[no-untyped-def]
    """Write all rows into ``out`` and their ends into ``ends``; returns the bytes written, or -1 - row if bad."""
    position = 0
    for row in range(len(offsets) - 1):
        previous = -1
        for i in range(offsets[row], offsets[row + 1]):
            gap = islands[i] - previous - 1
            level = levels[i]
            if gap < 0 or level < 1 or level > 5:
                return -1 - row
            previous = islands[i]
            if gap <= 50:
                out[position] = gap * 5 + level - 1
                position += 1
                continue
            out[position] = 255
            position += 1
            while gap >= 128:
                out[position] = (gap & 127) | 128
                gap >>= 7
                position += 1
            out[position] = gap
            out[position + 1] = level
            position += 2
        ends[row + 1] = position
    return position


@njit(nogil=True, cache=True)
def _decode(data, ends, first, n_islands, offsets, islands, levels):  # type: ignore[no-untyped-def]
    """Decode rows first..first+len(offsets)-1 of ``data``; returns (status, row). Never reads outside ``data``."""
    n = 0
    for r in range(len(offsets) - 1):
        position, end = ends[first + r], ends[first + r + 1]
        island = -1
        while position < end:
            byte = np.int64(data[position])
            position += 1
            if byte < 255:
                gap, level = byte // 5, byte % 5 + 1
            else:
                gap, shift, more = np.int64(0), 0, True
                while more:
                    if position >= end:
                        return 2, r
                    byte = np.int64(data[position])
                    position += 1
                    gap |= (byte & 127) << shift
                    more = byte >= 128
                    if shift == 28 and (more or byte > 15):
                        return 3, r
                    shift += 7
                if gap <= 50 or (byte == 0 and shift > 7):
                    return 3, r
                if position >= end:
                    return 2, r
                level = np.int64(data[position])
                position += 1
                if level < 1 or level > 5:
                    return 1, r
            island += gap + 1
            if island >= n_islands:
                return 4, r
            islands[n] = island
            levels[n] = level
            n += 1
        offsets[r + 1] = n
    return 0, 0


@njit(nogil=True, cache=True)
def _scatter(offsets, islands, levels, dense):  # type: ignore[no-untyped-def]
    """Set dense[row, island] = level for every open island."""
    for row in range(len(offsets) - 1):
        for i in range(offsets[row], offsets[row + 1]):
            dense[row, islands[i]] = levels[i]


def encode_block(rows: OpenIslands, n_rows: int) -> bytes:
    """Encode ``rows`` as a block of ``n_rows`` rows; rows past ``len(rows)`` are all closed.

    Raises StoreError when islands are not strictly increasing within a row or a level is outside 1..5.
    """
    ends = np.zeros(n_rows + 1, np.uint32)
    out = np.empty(len(rows.islands) * _LONGEST_ISLAND, np.uint8)
    size = _encode(rows.offsets, rows.islands, rows.levels, ends, out)
    if size < 0:
        raise StoreError(
            f"row {-1 - size} of the block: islands must increase strictly and levels lie in 1..{N_LEVELS}"
        )
    ends[len(rows) :] = size
    return ends.astype("<u4").tobytes() + out[:size].tobytes()


def decode_block(encoded: bytes, n_rows: int, n_islands: int, rows: slice = slice(None)) -> OpenIslands:
    """Decode rows of a block encoded with ``n_rows`` rows over ``n_islands`` islands.

    Any byte string is safe to pass: what is not a block raises StoreError, naming the row.
    """
    head = 4 * (n_rows + 1)
    if len(encoded) < head:
        raise StoreError(f"encoded block of {len(encoded)} bytes: its head alone takes {head}")
    ends = np.frombuffer(encoded, "<u4", n_rows + 1).astype(np.int64)
    data = np.frombuffer(encoded, np.uint8, offset=head)
    if ends[0] != 0 or ends[-1] != len(data) or (np.diff(ends) < 0).any():
        raise StoreError(f"encoded block: row ends must rise from 0 to its {len(data)} bytes of rows")
    first, stop, _ = rows.indices(n_rows)
    n_bytes = max(0, int(ends[max(first, stop)] - ends[first]))
    offsets = np.zeros(max(first, stop) - first + 1, np.int64)
    islands, levels = np.empty(n_bytes, np.int32), np.empty(n_bytes, np.uint8)
    status, row = _decode(data, ends, first, n_islands, offsets, islands, levels)
    if status != _OK:
        raise StoreError(f"encoded block, row {first + row}: {_WHAT[status]}; the chunk is damaged")
    n_open = offsets[-1]
    return OpenIslands(offsets, islands[:n_open], levels[:n_open])


@dataclass(frozen=True)
class IslandCodec(ArrayBytesCodec):
    """The island codec as a Zarr v3 array-to-bytes codec for uint8 chunks [rows, islands]; closed is 0."""

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """Read the codec's entry of ``zarr.json``; it has no configuration."""
        parse_named_configuration(data, CODEC, require_configuration=False)
        return cls()

    def to_dict(self) -> dict[str, JSON]:
        """The codec's entry of ``zarr.json``."""
        return {"name": CODEC}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Refuse arrays that are not two-dimensional uint8."""
        if len(shape) != 2 or dtype.to_native_dtype() != np.dtype("uint8"):
            raise StoreError(f"the {CODEC} codec holds uint8 [cells, islands], not {dtype} {shape}")

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        n_rows, n_islands = chunk_spec.shape
        rows = decode_block(chunk_data.to_bytes(), n_rows, n_islands)
        dense: NDArray[np.uint8] = np.zeros((n_rows, n_islands), np.uint8)
        _scatter(rows.offsets, rows.islands, rows.levels, dense)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(dense)

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        dense = chunk_data.as_numpy_array()
        row, island = np.nonzero(dense)
        offsets = np.searchsorted(row, np.arange(dense.shape[0] + 1)).astype(np.int64)
        levels = dense[row, island]
        encoded = encode_block(OpenIslands(offsets, island.astype(np.int32), levels), dense.shape[0])
        return chunk_spec.prototype.buffer.from_bytes(encoded)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Not known in advance: it follows the open islands."""
        raise NotImplementedError(f"{CODEC} is not of fixed size")
