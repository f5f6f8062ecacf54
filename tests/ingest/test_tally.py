"""The hash table of byte strings and the compact tally, against dict and Counter."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.ingest.key_table import (
    ABSENT,
    NO_ROOM,
    copied,
    empty_table,
    grown,
    hash_bytes,
    look_up,
    look_up_all,
    same_bytes,
    table_of,
)
from annatac_scale.ingest.tally import Tally


@given(st.lists(st.binary(max_size=40), max_size=80))
def test_keys_are_numbered_in_order_of_arrival(keys: list[bytes]) -> None:
    table = empty_table(2, 4)
    number_of: dict[bytes, int] = {}
    for key in keys:
        text = np.frombuffer(b"<" + key + b">", np.uint8)
        assert look_up(table, text, 1, 1 + len(key), False) == number_of.get(key, ABSENT)
        while (number := look_up(table, text, 1, 1 + len(key), True)) == NO_ROOM:
            table = grown(table, len(key))
        assert number == number_of.setdefault(key, len(number_of))
    assert table.all_keys() == list(number_of)
    assert [table.key(i) for i in range(len(number_of))] == list(number_of)


@given(st.lists(st.lists(st.integers(0, 2**40) | st.integers(0, 5), max_size=30), max_size=12))
def test_a_tally_counts_like_a_counter(runs: list[list[int]]) -> None:
    tally = Tally()
    for run in runs:
        tally.add(np.array(run, np.int64))
    keys, counts = tally.result()
    expected = Counter(key for run in runs for key in run)
    assert list(zip(keys.tolist(), counts.tolist(), strict=True)) == sorted(expected.items())


@given(
    st.lists(st.binary(max_size=30) | st.binary(min_size=7, max_size=9), unique=True, max_size=40),
    st.lists(st.binary(max_size=30), max_size=40),
)
def test_a_table_of_keys_numbers_them_in_their_order_and_takes_more(
    keys: list[bytes], more: list[bytes]
) -> None:
    table = table_of(keys)
    assert table.all_keys() == keys
    assert len(table.arena) == sum(map(len, keys))  # one long key does not make all of them wide
    other = copied(table)
    text, ends = np.frombuffer(b"".join(more), np.uint8), np.cumsum([0, *map(len, more)])
    numbers, done = np.empty(len(more), np.int64), 0
    while (done := look_up_all(other, text, ends, numbers, done)) < len(more):
        other = grown(other, int(ends[done + 1] - ends[done]))
    everything = list(dict.fromkeys(keys + more))
    assert other.all_keys() == everything
    assert numbers.tolist() == [everything.index(key) for key in more]
    assert table.all_keys() == keys


@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 9), st.integers(0, 9))
def test_bytes_are_compared_and_hashed_as_python_compares_them(x: bytes, y: bytes, a: int, b: int) -> None:
    left, right = np.frombuffer(b"." * a + x, np.uint8), np.frombuffer(b"," * b + y, np.uint8)
    n = min(len(x), len(y))
    assert same_bytes(left, a, right, b, n) == (x[:n] == y[:n])
    assert hash_bytes(left, a, a + len(x)) == hash_bytes(np.frombuffer(b"-" + x, np.uint8), 1, 1 + len(x))
