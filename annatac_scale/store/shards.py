"""One shard of a sample's X: up to 16 encoded blocks and their index in one file, per Zarr's sharding codec.

Blocks are written and read in encoded form, never as dense rows: a dense shard over all bins of hg38 is 2.6 GB.
Specification: zarr-specs, "Sharding codec (version 1.0)", with inner codecs island codec, zstd, crc32c and index
codecs bytes (little-endian), crc32c, the index at the file's end.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd

from annatac_scale.errors import StoreError
from annatac_scale.store.codec import decode_block, encode_block
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Place
from annatac_scale.store.schema import BLOCK_CELLS, CODEC, SHARD_BLOCKS, SHARD_CELLS, ZSTD_LEVEL

_ABSENT = 2**64 - 1
_INDEX_BYTES = SHARD_BLOCKS * 16 + 4
_ZSTD = Zstd(level=ZSTD_LEVEL)


def x_metadata(n_cells: int, n_islands: int) -> dict[str, Any]:
    """The ``zarr.json`` of ``X``, uint8 [n_cells, n_islands], whose shards ``encode_shard`` makes."""
    crc32c = {"name": "crc32c"}
    zstd = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
    sharding = {
        "chunk_shape": [BLOCK_CELLS, n_islands],
        "codecs": [{"name": CODEC}, zstd, crc32c],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, crc32c],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [n_cells, n_islands],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD_CELLS, n_islands]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {"encoding-type": "array", "encoding-version": "0.2.0"},
        "dimension_names": ["cell", "island"],
    }


def shard_name(shard: int) -> str:
    """The file of a shard below ``X`` (default chunk key encoding)."""
    return f"c/{shard}/0"


@dataclass(frozen=True)
class EncodedShard:
    """A shard as it is on disk.

    sha256: hex, of its encoded blocks before compression; data: empty if all closed; n_open: its open islands
    """

    sha256: str
    data: bytes
    n_open: int
    n_cells: int


def encode_shard(blocks: Iterable[OpenIslands]) -> EncodedShard:
    """Encode the blocks of one shard, each of 250 cells but for the last. Those without an open island are left out."""
    digest = hashlib.sha256()
    body, index = bytearray(), np.full((SHARD_BLOCKS, 2), _ABSENT, np.uint64)
    n_open = n_cells = 0
    for block, part in enumerate(blocks):
        n_open, n_cells = n_open + len(part.islands), n_cells + len(part)
        encoded = encode_block(part, BLOCK_CELLS)
        digest.update(encoded)
        if len(part.islands):
            chunk = _with_crc(_ZSTD.encode(encoded))
            index[block] = len(body), len(chunk)
            body += chunk
    if body:
        body += _with_crc(index.astype("<u8").tobytes())
    return EncodedShard(digest.hexdigest(), bytes(body), n_open, n_cells)


class ShardReader:
    """Reads encoded blocks of one sample's X. The index of a shard is read once and kept (256 bytes).

    x: the folder of the array
    shard_open: open islands of each shard, by which a lost file is told from an all-closed shard; None: not known
    """

    def __init__(
        self, x: Place, n_cells: int, n_islands: int, shard_open: Sequence[int] | None = None
    ) -> None:
        self.x = x
        self.n_cells = n_cells
        self.n_islands = n_islands
        self.shard_open = shard_open
        self._index: dict[int, np.ndarray | None] = {}

    def read_block(self, block: int) -> OpenIslands:
        """The cells of block ``block`` of the sample.

        Raises StoreError when the file is lost or cut short, or its bytes do not fit their checksum.
        """
        n_rows = min(BLOCK_CELLS, self.n_cells - block * BLOCK_CELLS)
        shard, within = divmod(block, SHARD_BLOCKS)
        index = self._shard_index(shard)
        if index is None or index[within, 0] == _ABSENT:
            return OpenIslands.empty(n_rows)
        start, size = (int(v) for v in index[within])
        place = f"{self._location(shard)}, block {block}"
        try:
            data = self.x.read_range(shard_name(shard), start, size)
        except FileNotFoundError:
            raise self._lost(shard) from None
        encoded = _ZSTD.decode(_without_crc(data, place))
        try:
            return decode_block(encoded, BLOCK_CELLS, self.n_islands, slice(0, n_rows))
        except StoreError as error:
            raise StoreError(f"{place}: {error}") from error

    def _location(self, shard: int) -> str:
        return f"{self.x.location}/{shard_name(shard)}"

    def _lost(self, shard: int) -> StoreError:
        n_open = f"{self.shard_open[shard]:,}" if self.shard_open is not None else "some"
        return StoreError(
            f"{self._location(shard)}: the file is lost; its cells have {n_open} open islands; convert the sample again"
        )

    def _shard_index(self, shard: int) -> np.ndarray | None:
        if shard not in self._index:
            index = self._read_index(shard)
            if index is None and self.shard_open is not None and self.shard_open[shard]:
                raise self._lost(shard)
            self._index[shard] = index
        return self._index[shard]

    def _read_index(self, shard: int) -> np.ndarray | None:
        try:
            tail = self.x.read_range(shard_name(shard), -_INDEX_BYTES, _INDEX_BYTES)
        except FileNotFoundError:
            return None
        pairs = np.frombuffer(_without_crc(tail, f"{self._location(shard)}, shard index"), "<u8")
        if pairs.size != 2 * SHARD_BLOCKS:
            raise StoreError(
                f"{self._location(shard)}: {len(tail)} bytes are too few for a shard; the file was cut short"
            )
        return pairs.reshape(SHARD_BLOCKS, 2)


def _with_crc(data: bytes) -> bytes:
    return bytes(data) + struct.pack("<I", google_crc32c.value(bytes(data)))


def _without_crc(data: bytes, place: str) -> bytes:
    if len(data) < 4 or struct.unpack("<I", data[-4:])[0] != google_crc32c.value(data[:-4]):
        raise StoreError(
            f"{place}: the bytes do not fit their crc32c; the file is damaged, convert the sample again"
        )
    return data[:-4]
