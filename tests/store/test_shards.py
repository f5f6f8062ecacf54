"""Blocks of a shard, read together, through a cache, and from files that somebody else made."""

import struct
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from numcodecs.zstd import Zstd

from annatac_scale.errors import StoreError
from annatac_scale.store.cache import BlockCache
from annatac_scale.store.codec import encode_block
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Folder
from annatac_scale.store.schema import BLOCK_CELLS, SHARD_BLOCKS
from annatac_scale.store.shards import ShardReader, encode_shard, shard_name

N_ISLANDS = 300
N_BLOCKS = 20


@dataclass(frozen=True)
class Counting(Folder):
    """A folder that keeps what was asked of it."""

    asked: list = field(default_factory=list, compare=False)

    def read_range(self, name, start, length):
        self.asked.append((name, start, length))
        return super().read_range(name, start, length)


def cells_of(block):
    """Cells of a block; those of block 5 are closed."""
    rng = np.random.default_rng(block)
    rows = [np.flatnonzero(rng.random(N_ISLANDS) < 0.1) for _ in range(BLOCK_CELLS)]
    if block == 5:
        rows = [np.empty(0, int)] * BLOCK_CELLS
    islands = np.concatenate(rows).astype(np.int32)
    levels = rng.integers(1, 6, len(islands)).astype(np.uint8)
    return OpenIslands(np.cumsum([0, *map(len, rows)]), islands, levels)


@pytest.fixture
def x(tmp_path):
    """The folder of an X of 20 blocks in two shards."""
    for shard in range(2):
        blocks = range(shard * SHARD_BLOCKS, min(N_BLOCKS, (shard + 1) * SHARD_BLOCKS))
        Folder(str(tmp_path / "X")).write(shard_name(shard), encode_shard(map(cells_of, blocks)).data)
    return Counting(str(tmp_path / "X"))


def reader_of(x, **options):
    return ShardReader(x, N_BLOCKS * BLOCK_CELLS, N_ISLANDS, "digest", [10**9] * 2, **options)


def assert_cells(rows, block):
    found, expected = rows.decode(N_ISLANDS), cells_of(block)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    np.testing.assert_array_equal(found.islands, expected.islands)
    np.testing.assert_array_equal(found.levels, expected.levels)


@pytest.mark.parametrize(
    ("blocks", "n_requests"),
    [
        pytest.param([3], 1, id="one"),
        pytest.param([0, 1, 2, 3], 1, id="side by side"),
        pytest.param([3, 1, 2], 1, id="side by side in any order"),
        pytest.param([4, 5, 6], 1, id="with a closed one between, which lies nowhere"),
        pytest.param([1, 3, 4, 9], 3, id="with gaps"),
        pytest.param([14, 15, 16, 17], 2, id="over two shards"),
        pytest.param(list(range(N_BLOCKS)), 2, id="all"),
        pytest.param([5], 0, id="a closed one"),
        pytest.param([], 0, id="none"),
    ],
)
def test_blocks_that_lie_side_by_side_are_read_in_one_request(x, blocks, n_requests):
    reader = reader_of(x)
    reader.read_rows(range(N_BLOCKS))  # the indexes are read by now
    x.asked.clear()
    for block, rows in zip(blocks, reader.read_rows(blocks), strict=True):
        assert_cells(rows, block)
    assert len(x.asked) == n_requests


def test_blocks_of_two_shards_are_never_taken_for_neighbours(x):
    # In the second shard block 1 begins where block 0 of the first one ends.
    Folder(x.location).write(shard_name(1), encode_shard(map(cells_of, [0, 9])).data)
    for block, rows in zip([0, 9], reader_of(x).read_rows([0, SHARD_BLOCKS + 1]), strict=True):
        assert_cells(rows, block)


def test_the_index_of_a_shard_is_read_once(x):
    reader = reader_of(x)
    for block in range(SHARD_BLOCKS):
        reader.read_rows([block])
    assert len(x.asked) == 1 + SHARD_BLOCKS - 1  # block 5 is closed


def test_blocks_come_from_the_cache_once_they_are_in_it(x, tmp_path):
    cache = BlockCache(tmp_path / "cache", 10**8)
    reader_of(x, cache=cache).read_rows([2, 3])
    x.asked.clear()
    again = reader_of(x, cache=cache)
    for block, rows in zip([2, 3], again.read_rows([2, 3]), strict=True):
        assert_cells(rows, block)
    assert x.asked == []


def test_a_block_that_was_damaged_in_the_cache_is_read_again_from_the_store(x, tmp_path):
    cache = BlockCache(tmp_path / "cache", 10**8)
    reader_of(x, cache=cache).read_rows([2])
    whole = cache.get("digest/2")
    cache.drop("digest/2")
    cache.put("digest/2", whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    (rows,) = reader_of(x, cache=cache).read_rows([2])
    assert_cells(rows, 2)
    assert cache.get("digest/2") == whole


def test_a_full_cache_leaves_reading_as_it_was(x, tmp_path):
    cache = BlockCache(tmp_path / "cache", 10)
    for _ in range(2):
        for block, rows in zip([2, 3], reader_of(x, cache=cache).read_rows([2, 3]), strict=True):
            assert_cells(rows, block)


def with_block(folder: Path, frame: bytes, size: int | None = None, start: int = 0) -> Counting:
    """An X whose only block is a frame with the right checksums; size, start: that the index says."""
    chunk = frame + struct.pack("<I", google_crc32c.value(frame))
    index = np.full((SHARD_BLOCKS, 2), 2**64 - 1, np.uint64)
    index[0] = start, len(chunk) if size is None else size
    end = index.astype("<u8").tobytes()
    Folder(str(folder)).write(shard_name(0), chunk + end + struct.pack("<I", google_crc32c.value(end)))
    return Counting(str(folder))


def encoded_block():
    return encode_block(cells_of(0), BLOCK_CELLS)


@pytest.mark.parametrize(
    ("frame", "size", "message"),
    [
        pytest.param(Zstd().encode(bytes(10**7)), None, "says 10,000,000 bytes, expected at most", id="bomb"),
        pytest.param(
            b"\x28\xb5\x2f\xfd\x00\x58" + Zstd().encode(encoded_block())[6:],
            None,
            "says no size",
            id="no size",
        ),
        pytest.param(b"no frame", None, "says no size", id="no frame"),
        pytest.param(Zstd().encode(encoded_block())[:-9], None, "no whole zstd frame", id="cut short"),
        pytest.param(Zstd().encode(b"abc"), None, "its head alone takes 1004", id="no block"),
        pytest.param(b"", 2**62, "more than a full block", id="index asks for all memory"),
    ],
)
def test_blocks_that_fit_their_checksum_and_are_none_are_refused(tmp_path, frame, size, message):
    x = with_block(tmp_path / "X", frame, size)
    with pytest.raises(StoreError, match=rf"c/0/0, block 0.*{message}"):
        ShardReader(x, BLOCK_CELLS, N_ISLANDS, "digest", [10**9]).read_rows([0])


@pytest.mark.parametrize("start", [2**62, 2**63 - 9, 2**63, 2**64 - 2])
def test_a_block_that_begins_after_the_file_is_refused(tmp_path, start):
    x = with_block(tmp_path / "X", Zstd().encode(encoded_block()), start=start)
    with pytest.raises(StoreError, match=r"c/0/0, block 0.*damaged"):
        ShardReader(x, BLOCK_CELLS, N_ISLANDS, "digest", [10**9]).read_rows([0])
