"""Sentences on confusions: told where the numbers bear them, silent where they are noise."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from annatac_scale.train.confusions import FEWEST_CELLS, confusions_of


def table(counts: list[list[int]], types: str, labels: str) -> pd.DataFrame:
    return pd.DataFrame(counts, index=list(types), columns=list(labels))


def test_a_pair_that_is_mixed_both_ways_is_one_sentence_with_its_numbers() -> None:
    found = confusions_of(table([[83, 37, 0], [25, 65, 0], [1, 0, 99]], "ABC", "ABC"))
    assert found.sentences == [
        "Of 120 A cells 31% are called B, and of 90 B cells 28% are called A: the two are not told apart reliably."
    ]


def test_a_type_that_is_called_another_one_way_is_told_with_the_way_back() -> None:
    found = confusions_of(table([[60, 60], [2, 998]], "AB", "AB"))
    assert found.sentences == ["Of 120 A cells 50% are called B; of 1,000 B cells less than 1% are called A."]


def test_a_label_that_no_cell_has_can_be_what_a_type_is_called() -> None:
    found = confusions_of(table([[60, 0, 60], [0, 100, 0]], "AB", "ABN"))
    assert found.sentences == ["Of 120 A cells 50% are called N."]


def test_errors_within_the_noise_and_small_shares_make_no_sentence() -> None:
    noise = confusions_of(table([[17, 3, 0], [2, 28, 0], [0, 0, 40]], "ABC", "ABC"))
    small = confusions_of(table([[9700, 300], [100, 9900]], "AB", "AB"))
    for found in (noise, small):
        assert found.pairs == ()
        assert (
            found.sentences[0]
            == "No type is called another for more than 5% of its cells beyond chance noise."
        )


def test_types_with_too_few_cells_are_named() -> None:
    found = confusions_of(table([[16, 0, 0], [0, 17, 0], [2, 0, 1]], "ABC", "ABC"))
    assert found.too_few == {"A": 16, "C": 3}
    assert "A (16), C (3): with fewer than 17 cells" in found.sentences[-1]
    assert binomtest(FEWEST_CELLS, FEWEST_CELLS).proportion_ci().low > 0.8
    assert binomtest(FEWEST_CELLS - 1, FEWEST_CELLS - 1).proportion_ci().low < 0.8


def test_most_cells_come_first() -> None:
    counts = np.diag([500, 500, 500, 500])
    counts[0, 1], counts[2, 3], counts[3, 2] = 100, 80, 90
    found = confusions_of(table(counts.tolist(), "ABCD", "ABCD"))
    assert [(p.first, p.second, p.is_mutual) for p in found.pairs] == [("D", "C", True), ("A", "B", False)]
    assert json.loads(json.dumps(found.to_dict()))["sentences"] == found.sentences


@given(st.lists(st.lists(st.integers(0, 60), min_size=3, max_size=3), min_size=3, max_size=3))
def test_a_pair_is_told_exactly_where_the_test_refuses_chance(counts: list[list[int]]) -> None:
    counts = [[n + (i == j) for j, n in enumerate(row)] for i, row in enumerate(counts)]
    told = {}
    for pair in confusions_of(table(counts, "ABC", "ABC")).pairs:
        told[pair.first, pair.second] = pair.n_first_as_second
        if pair.is_mutual:
            assert (pair.second, pair.first) not in told
            told[pair.second, pair.first] = pair.n_second_as_first
    expected = {
        ("ABC"[i], "ABC"[j]): counts[i][j]
        for i in range(3)
        for j in range(3)
        if i != j and binomtest(counts[i][j], sum(counts[i]), 0.05, "greater").pvalue <= 0.05 / 6 * (1 + 1e-9)
    }
    assert told == expected


def test_pure_noise_makes_a_sentence_in_few_tables() -> None:
    # 8 types, of which each is called any other with a chance of 5%, the most that is not to be told.
    rng = np.random.default_rng(0)
    chances = np.full((8, 8), 0.05) + np.diag(np.full(8, 0.6))
    n_told = 0
    for _ in range(300):
        counts = np.array([rng.multinomial(150, row) for row in chances])
        n_told += bool(confusions_of(table(counts.tolist(), "ABCDEFGH", "ABCDEFGH")).pairs)
    assert n_told / 300 == pytest.approx(0.04, abs=0.04)


def test_sentences_stay_on_a_line_whatever_the_types_are_called() -> None:
    names = ["a\n| b", "c\u2028d"]
    found = confusions_of(pd.DataFrame([[2, 18], [0, 5]], index=names, columns=names))
    assert found.sentences[0] == "Of 20 a | b cells 90% are called c d; of 5 c d cells none are called a | b."
    assert found.sentences[1].startswith("Too few cells for a figure of c d (5): ")
