"""The island codec against a plain-Python reading of docs/store-format.md."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annatac_scale.errors import StoreError
from annatac_scale.store.codec import decode_block, encode_block
from annatac_scale.store.open_islands import OpenIslands

WHOLE_GENOME = 650_000


def plain_decode(encoded: bytes, n_rows: int) -> list[list[tuple[int, int]]]:
    """The specification, read literally."""
    ends = [int.from_bytes(encoded[4 * i : 4 * i + 4], "little") for i in range(n_rows + 1)]
    body = encoded[4 * (n_rows + 1) :]
    rows = []
    for start, end in itertools.pairwise(ends):
        row, island, data = [], -1, iter(body[start:end])
        for byte in data:
            number, shift, more = byte, 0, byte == 255
            while more:
                part = next(data)
                number += (part % 128) << shift
                shift += 7
                more = part >= 128
            island += number // 5 + 1
            row.append((island, number % 5 + 1))
        rows.append(row)
    return rows


def open_islands(rows: list[dict[int, int]]) -> OpenIslands:
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    pairs = [pair for row in rows for pair in sorted(row.items())]
    islands, levels = (np.array([pair[i] for pair in pairs]) for i in (0, 1))
    return OpenIslands(offsets, islands.astype(np.int32), levels.astype(np.uint8))


rows_of_cells = st.lists(
    st.one_of(
        st.dictionaries(st.integers(0, WHOLE_GENOME - 1), st.integers(1, 5), max_size=40),
        st.dictionaries(st.integers(0, 120), st.integers(1, 5), max_size=100),
    ),
    max_size=12,
)


@given(rows_of_cells, st.integers(0, 5))
def test_any_rows_come_back_and_fit_the_specification(rows: list[dict[int, int]], n_padding: int) -> None:
    n_rows = len(rows) + n_padding
    encoded = encode_block(open_islands(rows), n_rows)
    expected = [sorted(row.items()) for row in rows] + [[]] * n_padding
    assert plain_decode(encoded, n_rows) == expected
    decoded = decode_block(encoded, n_rows, WHOLE_GENOME)
    assert [
        list(zip(decoded[i : i + 1].islands, decoded[i : i + 1].levels, strict=True)) for i in range(n_rows)
    ] == expected


@given(rows_of_cells, st.integers(0, 12), st.integers(0, 12))
def test_a_slice_of_rows_is_decoded_alone(rows: list[dict[int, int]], start: int, stop: int) -> None:
    encoded = encode_block(open_islands(rows), len(rows))
    whole = decode_block(encoded, len(rows), WHOLE_GENOME)[start:stop]
    part = decode_block(encoded, len(rows), WHOLE_GENOME, slice(start, stop))
    np.testing.assert_array_equal(part.offsets, whole.offsets)
    np.testing.assert_array_equal(part.islands, whole.islands)


def test_a_full_row_takes_one_byte_an_island() -> None:
    n = 1000
    full = OpenIslands(np.array([0, n]), np.arange(n, dtype=np.int32), np.full(n, 5, np.uint8))
    assert len(encode_block(full, 1)) == 8 + n


def test_an_island_takes_the_bytes_of_its_number() -> None:
    for number, size in (
        (254, 1),
        (255, 2),
        (255 + 127, 2),
        (255 + 128, 3),
        (255 + 2**14, 4),
        (255 + 2**21, 5),
    ):
        gap, level = divmod(number, 5)
        row = open_islands([{gap: level + 1}])
        assert len(encode_block(row, 1)) - 8 == size


@settings(max_examples=300)
@given(rows_of_cells, st.binary(max_size=6), st.integers(0, 10_000), st.integers(0, 400))
def test_damaged_bytes_give_an_error_or_valid_rows_never_a_crash(
    rows: list[dict[int, int]], junk: bytes, place: int, n_islands: int
) -> None:
    encoded = encode_block(open_islands(rows), len(rows))
    place %= len(encoded) + 1
    damaged = encoded[:place] + junk + encoded[place + len(junk) :]
    try:
        decoded = decode_block(damaged, len(rows), n_islands)
    except StoreError:
        return
    for i in range(len(decoded)):
        row = decoded[i : i + 1]
        assert (np.diff(row.islands) > 0).all()
        assert ((row.levels >= 1) & (row.levels <= 5)).all()
        assert (row.islands < n_islands).all()


@pytest.mark.parametrize(
    ("body", "what"),
    [
        pytest.param(b"\xff", "ends within an island", id="escape alone"),
        pytest.param(b"\xff\x80", "ends within an island", id="number without an end"),
        pytest.param(b"\xff\xb3\x00", "canonical", id="padded LEB128"),
        pytest.param(b"\xff\xff\xff\xff\xff\xff\x01", "canonical", id="six bytes"),
        pytest.param(b"\xff\xff\xff\xff\xff\x7f", "beyond the last", id="the largest number"),
        pytest.param(b"\xff\x89\x25", "beyond the last", id="island 1,000 of 1,000"),
        pytest.param(b"\x00" * 1000 + b"\x00", "beyond the last", id="one island too many"),
    ],
)
def test_what_no_encoder_writes_is_refused(body: bytes, what: str) -> None:
    encoded = (0).to_bytes(4, "little") + len(body).to_bytes(4, "little") + body
    with pytest.raises(StoreError, match=what):
        decode_block(encoded, 1, 1000)


@pytest.mark.parametrize(
    ("islands", "levels"),
    [([3, 3], [1, 1]), ([4, 3], [1, 1]), ([3], [0]), ([3], [6])],
    ids=["repeated island", "falling islands", "level zero", "level six"],
)
def test_rows_that_break_the_invariants_are_not_encoded(islands: list[int], levels: list[int]) -> None:
    rows = OpenIslands(np.array([0, len(islands)]), np.array(islands, np.int32), np.array(levels, np.uint8))
    with pytest.raises(StoreError, match="increase strictly"):
        encode_block(rows, 1)
