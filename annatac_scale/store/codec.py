"""The island codec: a block of cells as gaps and levels, one byte for nearly every open island.

Encoded block (specification: docs/store-format.md, "The island codec"):

    uint32 little-endian [n_rows + 1]   ends of the rows, counted from the end of this head; the first is 0
    bytes                               the rows, one after the other

A row lists its open islands in order. With ``gap`` the number of closed islands since the previous open one (or
since the row's start) and ``level`` in 1..5, an island is the number ``gap * 5 + level - 1``: a single byte below 255,
else byte 255 and then the number less 255 as canonical unsigned LEB128.

Neither torch, ray nor dask is imported here: reading a store with plain Zarr needs this module alone.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON, parse_named_configuration

from annatac_scale.errors import StoreError
from annatac_scale.store.compiled import compiled
from annatac_scale.store.encoded_rows import DamagedRowError, EncodedRows
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.schema import CODEC, N_LEVELS

_MAX_LEB128_BYTES = 5
LONGEST_ISLAND = 1 + _MAX_LEB128_BYTES
"""Bytes of an island at most."""


@compiled
def _encode(offsets, islands, levels, ends, out):  # type: ignore[no-untyped-def]
    """Write all rows into ``out`` and their ends into ``ends``; returns the bytes written, or -1 - row if bad."""
    position = 0
    for row in range(len(offsets) - 1):
        previous = -1
        for i in range(offsets[row], offsets[row + 1]):
            gap = np.int64(islands[i]) - previous - 1
            level = np.int64(levels[i])
            if gap < 0 or level < 1 or level > 5:
                return -1 - row
            previous = np.int64(islands[i])
            number = gap * 5 + level - 1
            if number >= 255:
                out[position] = 255
                position += 1
                number -= 255
                while number >= 128:
                    out[position] = (number & 127) | 128
                    number >>= 7
                    position += 1
            out[position] = number
            position += 1
        ends[row + 1] = position
    return position


@compiled
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
    out = np.empty(len(rows.islands) * LONGEST_ISLAND, np.uint8)
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
    all_rows = EncodedRows.of_block(encoded, n_rows)
    first, stop, _ = rows.indices(n_rows)
    try:
        return all_rows.take(np.arange(first, stop)).decode(n_islands)
    except DamagedRowError as error:
        raise StoreError(
            f"encoded block, row {first + error.row}: {error.what}; the chunk is damaged"
        ) from error


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
