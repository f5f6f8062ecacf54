"""One shard of a sample's X, looked at to the last byte."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from annatac_scale.errors import StoreError
from annatac_scale.store.codec import decode_block, encode_block
from annatac_scale.store.findings import SAMPLE_AGAIN, DamageError, Finding
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Place
from annatac_scale.store.schema import BLOCK_CELLS, SHARD_BLOCKS, SHARD_CELLS
from annatac_scale.store.shards import shard_name
from annatac_scale.store.zstd import content_size

_ABSENT = 2**64 - 1
_INDEX_BYTES = SHARD_BLOCKS * 16 + 4
_HEAD_BYTES = 4 * (BLOCK_CELLS + 1)
_ZSTD = Zstd()
_CLOSED = encode_block(OpenIslands.empty(), BLOCK_CELLS)


@dataclass(frozen=True)
class SampleX:
    """The X of a sample, and what its shards are held against.

    x: its folder; shard_open: open islands of each shard, as the index says
    measured: bool [n_islands], None where it cannot be read
    """

    x: Place
    n_cells: int
    n_islands: int
    shard_open: Sequence[int]
    measured: NDArray[np.bool_] | None

    @property
    def n_shards(self) -> int:
        """Shards that its cells need."""
        return -(-self.n_cells // SHARD_CELLS)

    def cells_of(self, shard: int) -> int:
        """Cells of a shard."""
        return min(SHARD_CELLS, self.n_cells - shard * SHARD_CELLS)


@dataclass(frozen=True)
class ShardFound:
    """What a shard holds.

    n_open: int32, of each cell; sha256: hex, of its encoded blocks. Both None where not all could be read
    """

    n_cells: int
    n_open: NDArray[np.int32] | None
    sha256: str | None
    findings: list[Finding]
    notes: list[str]


class _Shard:
    """A shard being looked at."""

    def __init__(self, sample: SampleX, shard: int) -> None:
        self.sample = sample
        self.shard = shard
        self.name = shard_name(shard)
        self.place = f"{sample.x.location}/{self.name}"
        self.n_cells = sample.cells_of(shard)

    def damage(self, where: str, found: str, expected: str) -> DamageError:
        return DamageError(Finding(f"{self.place}{where}", found, expected, SAMPLE_AGAIN))

    def bytes_at(self, where: str, start: int, length: int) -> bytes:
        try:
            data = self.sample.x.read_range(self.name, start, length)
        except FileNotFoundError as error:
            raise self.damage(where, "no such file", "one") from error
        except StoreError as error:
            raise self.damage(where, f"what cannot be read ({error})", "a readable file") from error
        if len(data) != length:
            raise self.damage(where, f"{len(data):,} bytes", f"{length:,}: the file was cut short")
        body, crc = data[:-4], struct.unpack("<I", data[-4:])[0]
        if google_crc32c.value(body) != crc:
            raise self.damage(
                where, f"crc32c {google_crc32c.value(body):08x}", f"{crc:08x}, which is recorded"
            )
        return body

    def pairs(self) -> list[tuple[int, int]] | None:
        """Where each block lies, its size; None where there is no file and need not be one."""
        try:
            size = self.sample.x.size(self.name)
        except (OSError, StoreError) as error:
            raise self.damage("", f"what cannot be looked at ({error})", "a file, or none") from error
        said = self.sample.shard_open[self.shard]
        if size is None:
            if said:
                raise self.damage("", "no such file", f"one: its cells have {said:,} open islands")
            return None
        if size < _INDEX_BYTES:
            raise self.damage("", f"{size:,} bytes", f"at least {_INDEX_BYTES}: the file was cut short")
        index = self.bytes_at(", shard index", -_INDEX_BYTES, _INDEX_BYTES)
        self.end = size - _INDEX_BYTES
        return [(start, length) for start, length in struct.iter_unpack("<2Q", index)]

    def block(self, within: int, start: int, length: int) -> tuple[bytes, OpenIslands]:
        """A block in the island codec, and its cells."""
        number = self.shard * SHARD_BLOCKS + within
        where, n_rows = f", block {number}", max(0, min(BLOCK_CELLS, self.n_cells - within * BLOCK_CELLS))
        if (start, length) == (_ABSENT, _ABSENT):
            return _CLOSED, OpenIslands.empty(n_rows)
        if n_rows == 0:
            raise self.damage(where, "a block", "none: it lies beyond the sample's last cell")
        if length < 5 or start + length > self.end:
            raise self.damage(where, f"bytes {start:,} to {start + length:,}", f"a part of 0 to {self.end:,}")
        encoded = self._decompressed(where, self.bytes_at(where, start, length))
        try:
            rows = decode_block(encoded, BLOCK_CELLS, self.sample.n_islands)
        except StoreError as error:
            raise self.damage(where, f"what breaks the island codec ({error})", "an encoded block") from error
        beyond = int(rows.offsets[-1] - rows.offsets[n_rows])
        if beyond:
            raise self.damage(where, f"{beyond:,} open islands after the sample's last cell", "none there")
        return encoded, rows[:n_rows]

    def _decompressed(self, where: str, frame: bytes) -> bytes:
        most = _HEAD_BYTES + BLOCK_CELLS * self.sample.n_islands  # no row takes more than a byte an island
        says = content_size(frame)
        if says is not None and says > most:
            raise self.damage(where, f"a frame of {says:,} bytes", f"at most {most:,}")
        try:
            return bytes(_ZSTD.decode(frame))
        except (RuntimeError, ValueError, OverflowError, MemoryError) as error:
            raise self.damage(where, f"what zstd cannot decompress ({error})", "a zstd frame") from error

    def unmeasured(self, within: int, rows: OpenIslands) -> Finding | None:
        """The first open island that was not measured."""
        measured = self.sample.measured
        if measured is None:
            return None
        wrong = np.flatnonzero(~measured[rows.islands])
        if not len(wrong):
            return None
        row = int(np.searchsorted(rows.offsets, wrong[0], side="right")) - 1
        number = self.shard * SHARD_BLOCKS + within
        return Finding(
            f"{self.place}, block {number}, cell {number * BLOCK_CELLS + row}",
            f"island {int(rows.islands[wrong[0]])} open, which is not measured ({len(wrong):,} such in the block)",
            "open islands only where var says that they are measured",
            "convert the sample again",
        )


def check_shard(sample: SampleX, shard: int) -> ShardFound:
    """Read all of a shard; whatever is wrong with it is a finding."""
    looked = _Shard(sample, shard)
    findings: list[Finding] = []
    notes: list[str] = []
    n_open: list[NDArray[np.int32]] = []
    digest, whole = hashlib.sha256(), True
    for within, part in _parts(looked, findings):
        if part is None:
            whole = False
            continue
        encoded, rows, there = part
        if len(rows):
            digest.update(encoded)
            n_open.append(rows.n_open.astype(np.int32))
        if there and not len(rows.islands):
            notes.append(
                f"{looked.place}, block {shard * SHARD_BLOCKS + within}: stored without an open island"
            )
        wrong = looked.unmeasured(within, rows)
        findings += [wrong] if wrong else []
    if not whole:
        return ShardFound(looked.n_cells, None, None, findings, notes)
    counts = np.concatenate(n_open)
    total = int(counts.sum(dtype=np.int64))
    if total != sample.shard_open[shard]:
        expected = f"{sample.shard_open[shard]:,}, the index's shard_open"
        findings.append(Finding(looked.place, f"{total:,} open islands", expected))
    return ShardFound(looked.n_cells, counts, digest.hexdigest(), findings, notes)


def _parts(
    looked: _Shard, findings: list[Finding]
) -> Iterator[tuple[int, tuple[bytes, OpenIslands, bool] | None]]:
    """Each block of a shard: its bytes, its cells, whether it is stored; None where it is damaged."""
    absent = (_ABSENT, _ABSENT)
    try:
        pairs = looked.pairs() or [absent] * SHARD_BLOCKS
    except DamageError as error:
        findings.append(error.finding)
        yield 0, None
        return
    for within, pair in enumerate(pairs):
        try:
            yield within, (*looked.block(within, *pair), pair != absent)
        except DamageError as error:
            findings.append(error.finding)
            yield within, None
