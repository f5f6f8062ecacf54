"""One shard of a sample's X: up to 16 encoded blocks and their index in one file, per Zarr's sharding codec.

Blocks are written and read in encoded form, never as dense rows: a dense shard over all bins of hg38 is 2.6 GB.
Specification: zarr-specs, "Sharding codec (version 1.0)", with inner codecs island codec, zstd, crc32c and index
codecs bytes (little-endian), crc32c, the index at the file's end.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from annatac_scale.errors import StoreError
from annatac_scale.store.cache import BlockCache
from annatac_scale.store.codec import LONGEST_ISLAND, encode_block
from annatac_scale.store.encoded_rows import DamagedRowError, EncodedRows
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Place
from annatac_scale.store.schema import BLOCK_CELLS, CODEC, SHARD_BLOCKS, SHARD_CELLS, ZSTD_LEVEL
from annatac_scale.store.zstd import content_size

_ABSENT = 2**64 - 1
_RESIDUE = 0x48674BC7
_LAST_BYTE = 2**63 - 1
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


class _Chunk(NamedTuple):
    """An encoded block in its shard's file. start, size: bytes, its checksum included"""

    block: int
    shard: int
    start: int
    size: int


class ShardReader:
    """Reads encoded blocks of one sample's X, in any thread. The index of a shard is read once and kept (256 bytes).

    x: the folder of the array
    x_sha256: of the sample's X, by which a cache knows its blocks
    shard_open: open islands of each shard, by which a lost file is told from an all-closed shard
    cache: where blocks are put down once read, None: nowhere
    """

    def __init__(
        self,
        x: Place,
        n_cells: int,
        n_islands: int,
        x_sha256: str,
        shard_open: Sequence[int],
        cache: BlockCache | None = None,
    ) -> None:
        self.x = x
        self.n_cells = n_cells
        self.n_islands = n_islands
        self.x_sha256 = x_sha256
        self.shard_open = shard_open
        self.cache = cache
        self._index: dict[int, NDArray[np.uint64] | None] = {}

    def read_block(self, block: int) -> OpenIslands:
        """The cells of block ``block`` of the sample. Raises StoreError as ``read_rows`` does, and for damaged rows."""
        (rows,) = self.read_rows([block])
        try:
            return rows.decode(self.n_islands)
        except DamagedRowError as error:
            raise StoreError(f"{self._place(block)}, {error}") from error

    def read_rows(self, blocks: Sequence[int]) -> list[EncodedRows]:
        """The cells of blocks of the sample, encoded. Raises StoreError as ``read_chunks`` and ``decompress`` do."""
        chunks = self.read_chunks(blocks)
        return [self.decompress(block, chunk) for block, chunk in zip(blocks, chunks, strict=True)]

    def read_chunks(self, blocks: Sequence[int]) -> list[bytes | None]:
        """Blocks of the sample as they lie in its files; None where no island is open.

        Blocks that lie side by side in a shard are read in one request. Raises StoreError when a file is lost or cut
        short, or its bytes do not fit their checksum.
        """
        chunks = self._cached(blocks)
        missing = [block for block in blocks if block not in chunks]
        for run in self._runs(missing):
            chunks |= self._read(run)
        return [chunks.get(block) for block in blocks]

    def _cached(self, blocks: Sequence[int]) -> dict[int, bytes]:
        if self.cache is None:
            return {}
        found = {block: self.cache.get(self._key(block)) for block in blocks}
        chunks = {block: chunk for block, chunk in found.items() if chunk is not None}
        for block in [block for block, chunk in chunks.items() if not _fits_crc(chunk)]:
            self.cache.drop(self._key(block))
            del chunks[block]
        return chunks

    def _key(self, block: int) -> str:
        return f"{self.x_sha256}/{block}"

    def _runs(self, blocks: Sequence[int]) -> Iterator[list[_Chunk]]:
        """The chunks of blocks, those side by side together."""
        run: list[_Chunk] = []
        for chunk in sorted(self._chunks(blocks), key=lambda chunk: (chunk.shard, chunk.start)):
            if run and (run[-1].shard, run[-1].start + run[-1].size) != (chunk.shard, chunk.start):
                yield run
                run = []
            run.append(chunk)
        if run:
            yield run

    def _chunks(self, blocks: Sequence[int]) -> Iterator[_Chunk]:
        """Where blocks lie; those without an open island lie nowhere."""
        for block in blocks:
            shard, within = divmod(block, SHARD_BLOCKS)
            index = self._shard_index(shard)
            if index is None or index[within, 0] == _ABSENT:
                continue
            start, size = (int(number) for number in index[within])
            if size > _most_compressed(self._most_bytes(shard)):
                raise StoreError(
                    f"{self._place(block)}: {size:,} bytes are more than a full block; the file is damaged"
                )
            if start > _LAST_BYTE - size:
                raise StoreError(f"{self._place(block)}: no file has a byte {start:,}; the file is damaged")
            yield _Chunk(block, shard, start, size)

    def _read(self, run: Sequence[_Chunk]) -> dict[int, bytes]:
        shard, start = run[0].shard, run[0].start
        try:
            data = self.x.read_range(shard_name(shard), start, run[-1].start + run[-1].size - start)
        except FileNotFoundError:
            raise self._lost(shard) from None
        # Of a single chunk the slice is all of the data, which is not copied.
        chunks = {chunk.block: data[chunk.start - start : chunk.start - start + chunk.size] for chunk in run}
        for block, chunk in chunks.items():
            if not _fits_crc(chunk):
                raise _damaged(self._place(block))
            if self.cache is not None:
                self.cache.put(self._key(block), chunk)
        return chunks

    def decompress(self, block: int, chunk: bytes | None) -> EncodedRows:
        """The cells of a block that was read, encoded. Raises StoreError for what is no block."""
        n_rows = min(BLOCK_CELLS, self.n_cells - block * BLOCK_CELLS)
        if chunk is None:
            return EncodedRows.empty(n_rows)
        try:
            encoded = _decompressed(memoryview(chunk)[:-4], self._most_bytes(block // SHARD_BLOCKS))
            return EncodedRows.of_block(encoded, BLOCK_CELLS)[:n_rows]
        except StoreError as error:
            raise StoreError(f"{self._place(block)}: {error}") from error

    def _most_bytes(self, shard: int) -> int:
        """What no block of a shard takes more of, encoded."""
        n_open = min(self.shard_open[shard], BLOCK_CELLS * self.n_islands)
        return 4 * (BLOCK_CELLS + 1) + LONGEST_ISLAND * n_open

    def _place(self, block: int) -> str:
        return f"{self._location(block // SHARD_BLOCKS)}, block {block}"

    def _location(self, shard: int) -> str:
        return f"{self.x.location}/{shard_name(shard)}"

    def _lost(self, shard: int) -> StoreError:
        return StoreError(
            f"{self._location(shard)}: the file is lost; its cells have {self.shard_open[shard]:,} open islands; "
            "convert the sample again"
        )

    def _shard_index(self, shard: int) -> NDArray[np.uint64] | None:
        if shard not in self._index:
            index = self._read_index(shard)
            if index is None and self.shard_open[shard]:
                raise self._lost(shard)
            self._index[shard] = index
        return self._index[shard]

    def _read_index(self, shard: int) -> NDArray[np.uint64] | None:
        try:
            tail = self.x.read_range(shard_name(shard), -_INDEX_BYTES, _INDEX_BYTES)
        except FileNotFoundError:
            return None
        if not _fits_crc(tail):
            raise _damaged(f"{self._location(shard)}, shard index")
        if len(tail) != _INDEX_BYTES:
            raise StoreError(
                f"{self._location(shard)}: {len(tail)} bytes are too few for a shard; the file was cut short"
            )
        return np.frombuffer(tail[:-4], "<u8").reshape(SHARD_BLOCKS, 2)


def _with_crc(data: bytes) -> bytes:
    return bytes(data) + struct.pack("<I", google_crc32c.value(bytes(data)))


def _fits_crc(data: bytes) -> bool:
    """Whether bytes end with their own CRC-32C: then, and only then, the CRC of it all is a constant."""
    return len(data) >= 4 and google_crc32c.value(data) == _RESIDUE


def _damaged(place: str) -> StoreError:
    return StoreError(
        f"{place}: the bytes do not fit their crc32c; the file is damaged, convert the sample again"
    )


def _decompressed(frame: memoryview, most: int) -> bytes:
    """The content of a zstd frame. Raises StoreError where it says that it has more than ``most`` bytes."""
    size = content_size(frame)
    if size is None or size > most:
        said = "no size" if size is None else f"{size:,} bytes"
        raise StoreError(f"its zstd frame says {said}, expected at most the {most:,} bytes of a full block")
    try:
        content: bytes = _ZSTD.decode(frame)
    except RuntimeError as error:
        raise StoreError(f"no whole zstd frame ({error})") from error
    return content


def _most_compressed(size: int) -> int:
    """Bytes of a chunk of ``size`` bytes of content that zstd cannot compress, checksum included."""
    return size + size // 128 + 1024
