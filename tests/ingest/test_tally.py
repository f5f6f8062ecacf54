"""The hash table of byte strings and the compact tally, against dict and Counter."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.ingest.key_table import ABSENT, NO_ROOM, empty_table, grown, look_up
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
