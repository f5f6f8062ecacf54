"""Rows decoded where they lie, against rows decoded block by block."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.errors import StoreError
from annatac_scale.store.codec import decode_block, encode_block
from annatac_scale.store.encoded_rows import DamagedRowError, EncodedRows
from annatac_scale.store.open_islands import OpenIslands

N_ISLANDS = 3000


def random_cells(seed, n_cells):
    rng = np.random.default_rng(seed)
    rows = [
        np.flatnonzero(rng.random(N_ISLANDS) < share) for share in rng.choice([0, 0.003, 0.3, 1], n_cells)
    ]
    islands = np.concatenate([np.empty(0, int), *rows]).astype(np.int32)
    levels = rng.integers(1, 6, len(islands)).astype(np.uint8)
    return OpenIslands(np.cumsum([0, *map(len, rows)]), islands, levels)


def listed(cells):
    """[(island, level), ...] of each cell."""
    rows = [cells[i : i + 1] for i in range(len(cells))]
    return [list(zip(row.islands.tolist(), row.levels.tolist(), strict=True)) for row in rows]


@given(st.integers(0, 99), st.lists(st.integers(0, 7), max_size=3), st.data())
def test_rows_of_many_blocks_are_decoded_in_any_order(seed, sizes, data):
    blocks = [random_cells(seed + i, size) for i, size in enumerate(sizes)]
    known = [row for block in blocks for row in listed(block)]
    rows = EncodedRows.concatenate(
        [EncodedRows.of_block(encode_block(block, len(block)), len(block)) for block in blocks]
    )
    assert len(rows) == len(known)
    order = data.draw(st.lists(st.sampled_from(range(len(known))), max_size=12) if known else st.just([]))
    taken = rows.take(np.array(order, np.int64))
    assert listed(taken.decode(N_ISLANDS)) == [known[i] for i in order]
    packed = EncodedRows.of_bytes(*taken.packed())
    assert listed(packed.decode(N_ISLANDS)) == [known[i] for i in order]


@given(st.integers(0, 99), st.integers(0, 1000))
def test_new_numbers_are_those_of_renumbering_after_decoding(seed, n_kept):
    cells = random_cells(seed, 5)
    kept = np.sort(np.random.default_rng(seed).permutation(N_ISLANDS)[:n_kept])
    new_of_old = np.full(N_ISLANDS, -1, np.int32)
    new_of_old[kept] = np.arange(n_kept)
    rows = EncodedRows.of_block(encode_block(cells, 5), 5)
    assert listed(rows.decode(N_ISLANDS, new_of_old)) == listed(cells.renumber(new_of_old))


def test_rows_keep_the_bytes_alive_that_they_lie_in():
    cells = random_cells(4, 50)
    rows = EncodedRows.of_block(encode_block(cells, 50), 50)[10:20]
    for _ in range(100):  # memory that was given back would be taken again by these
        encode_block(random_cells(5, 50), 50)
    assert listed(rows.decode(N_ISLANDS)) == listed(cells)[10:20]


def test_a_damaged_row_is_named_by_its_place_among_those_that_were_asked_for():
    good, bad = b"\x00\x05", b"\xff\x80"
    data = np.frombuffer(good + bad + good, np.uint8)
    rows = EncodedRows.of_bytes(data, np.array([0, 2, 4, 6]))
    with pytest.raises(DamagedRowError, match="row 2: a row that ends within an island") as caught:
        rows.take(np.array([0, 2, 1])).decode(100)
    assert caught.value.row == 2
    assert listed(rows.take(np.array([0, 2])).decode(100)) == [[(0, 1), (2, 1)]] * 2


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=5), st.integers(0, 200))
def test_any_bytes_give_valid_rows_or_an_error_and_no_row_reads_the_next_one(data, ends, n_islands):
    offsets = np.array([0, *(min(end, len(data)) for end in sorted(ends))])
    rows = EncodedRows.of_bytes(np.frombuffer(data, np.uint8), offsets)
    for i in range(len(rows)):
        alone = EncodedRows.of_bytes(
            np.frombuffer(data[offsets[i] : offsets[i + 1]], np.uint8),
            np.array([0, offsets[i + 1] - offsets[i]]),
        )
        try:
            found = listed(rows[i : i + 1].decode(n_islands))
        except DamagedRowError:
            with pytest.raises(DamagedRowError):
                alone.decode(n_islands)
            continue
        assert found == listed(alone.decode(n_islands))
        islands = [island for island, _ in found[0]]
        assert islands == sorted(set(islands))
        assert all(0 <= island < n_islands for island in islands)
        assert all(1 <= level <= 5 for _, level in found[0])


@pytest.mark.parametrize("ends", [[1, 2, 4], [0, 3, 2], [0, 2, 5], [0, 2**31, 4]])
def test_a_head_that_does_not_fit_its_block_is_refused(ends):
    block = np.array(ends, "<u4").tobytes() + b"\x00\x01\x02\x03"
    with pytest.raises(StoreError, match="row ends must rise from 0 to its 4 bytes"):
        EncodedRows.of_block(block, 2)
    with pytest.raises(StoreError, match="its head alone takes 12"):
        decode_block(block[:11], 2, 100)


def test_numbers_for_fewer_islands_than_there_are_are_refused():
    rows = EncodedRows.of_bytes(np.array([254], np.uint8), np.array([0, 1]))
    with pytest.raises(ValueError, match="of 10 islands do not do for 51"):
        rows.decode(51, np.arange(10, dtype=np.int32))


@pytest.mark.parametrize("offsets", [[0, 5], [-1, 2], [0, 3, 2], [2, 1]])
def test_rows_that_reach_outside_their_bytes_are_refused(offsets):
    with pytest.raises(ValueError, match="at most 4"):
        EncodedRows.of_bytes(np.zeros(4, np.uint8), np.array(offsets))


@pytest.mark.parametrize("data", [np.zeros(8, np.uint8)[::2], np.zeros(4, np.int64)])
def test_bytes_that_do_not_lie_side_by_side_are_refused(data):
    with pytest.raises(ValueError, match="contiguous uint8"):
        EncodedRows.of_bytes(data, np.array([0, 4]))
