"""Spills written and read again, and those that are not whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annatac_scale.errors import StoreError
from annatac_scale.ingest.spill import Spill, decode_counts, encode_counts, packed
from annatac_scale.store.place import Folder

COUNTS = st.dictionaries(
    st.integers(0, 699_999) | st.integers(0, 5), st.integers(1, 2**40) | st.integers(1, 3), max_size=40
)


@given(
    rows=st.lists(COUNTS, min_size=1, max_size=12),
    n_islands=st.sampled_from([700_000, 2_000_000]),
    order=st.randoms(use_true_random=False),
)
def test_counts_in_any_order_of_barcodes_are_read_again(
    rows: list[dict[int, int]], n_islands: int, order: Any
) -> None:
    """Every second barcode is left out, as one that is no cell; each row comes from two spills."""
    keys = np.array([b * n_islands + i for b, row in enumerate(rows) for i in sorted(row)], np.int64)
    counts = np.array([row[i] for row in rows for i in sorted(row)], np.int64)
    chosen = list(range(len(rows)))
    order.shuffle(chosen)
    encoded, ends, count_ends = encode_counts(keys, counts, n_islands, np.array(chosen, np.int64))
    assert np.diff(count_ends).tolist() == [len(rows[b]) for b in chosen]
    assert ends[-1] == len(encoded)

    kept = chosen[::2]
    sizes = [2 * len(rows[b]) for b in kept]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    to = np.full(len(chosen), -1, np.int64)
    to[::2] = np.arange(len(kept))
    islands, found = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.int64)
    cursor = offsets[:-1].copy()
    for _ in range(2):
        decode_counts(encoded, ends, to, cursor, islands, found)
    assert cursor.tolist() == offsets[1:].tolist()
    for i, b in enumerate(kept):
        part = slice(offsets[i], offsets[i + 1])
        expected = sorted(rows[b].items())
        assert list(zip(islands[part].tolist(), found[part].tolist(), strict=True)) == expected + expected


@given(row=COUNTS)
def test_an_island_takes_a_few_bytes(row: dict[int, int]) -> None:
    keys, counts = np.array(sorted(row), np.int64), np.array([row[i] for i in sorted(row)], np.int64)
    encoded, _, _ = encode_counts(keys, counts, 700_000, np.array([0]))
    assert len(encoded) <= sum(3 + (0 if n < 2 else 1 if n < 130 else 6) for n in row.values())


def test_no_barcode_and_a_barcode_without_counts_are_fine() -> None:
    none = np.empty(0, np.int64)
    encoded, ends, count_ends = encode_counts(none, none, 5, none)
    assert (len(encoded), ends.tolist(), count_ends.tolist()) == (0, [0], [0])
    encoded, ends, count_ends = encode_counts(none, none, 5, np.array([3, 1]))
    assert (len(encoded), ends.tolist(), count_ends.tolist()) == (0, [0, 0, 0], [0, 0, 0])


ARRAYS = {
    "names": np.frombuffer("AB-1é".encode(), np.uint8),
    "ends": np.array([0, 2, 6], np.int64),
    "none": np.empty(0, np.int32),
}


def spilled(tmp_path: Path, data: bytes) -> Spill:
    place = Folder(str(tmp_path))
    place.write("ranges/7", data)
    return Spill(place, "ranges/7")


@given(start=st.integers(0, 9), stop=st.none() | st.integers(0, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_are_read_by_slices(tmp_path: Path, start: int, stop: int | None) -> None:
    summary = {"lines": {"lines": 3}, "contigs": {"é\udcff": [0, 3]}, "long": "x" * 100_000}
    spill = spilled(tmp_path, packed(summary, ARRAYS))
    assert spill.is_whole()
    assert spill.summary == summary
    for name, array in ARRAYS.items():
        assert spill.array(name).tolist() == array.tolist()
        end = len(array) if stop is None else min(stop, len(array))
        assert spill.array(name, start, end).tolist() == array[start:end].tolist()
        assert spill.array(name, start, end).dtype == array.dtype


def test_a_spill_that_is_cut_off_longer_or_altered_is_not_taken_for_whole(tmp_path: Path) -> None:
    data = packed({"lines": {"lines": 123}, "digest": "ab"}, ARRAYS)
    assert spilled(tmp_path, data).is_whole()
    for size in range(len(data)):
        assert not spilled(tmp_path, data[:size]).is_whole()
    assert not spilled(tmp_path, data + b"\0").is_whole()
    assert not spilled(tmp_path, bytes(len(data))).is_whole()
    for place in range(len(data)):
        for bit in (1, 16, 128):
            altered = bytearray(data)
            altered[place] ^= bit
            assert not spilled(tmp_path, bytes(altered)).is_whole()


def test_a_spill_that_is_not_there_is_not_whole(tmp_path: Path) -> None:
    assert not Spill(Folder(str(tmp_path)), "ranges/0").is_whole()
    (tmp_path / "ranges").mkdir()
    assert not Spill(Folder(str(tmp_path)), "ranges").is_whole()


def test_another_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="ranges/7: no spill"):
        _ = spilled(tmp_path, b"something else " * 9).summary
