"""Profiles: shares of islands among the open ones of a type, and the fit of a cell to the nearest of them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.naive_bayes import MultinomialNB

from annatac_scale.model.profiles import LENT, UNSEEN, Profiles
from annatac_scale.store.open_islands import OpenIslands

COUNTS = arrays(np.int32, st.tuples(st.integers(1, 8), st.integers(1, 4)), elements=st.integers(0, 1000))


def rows_of(cells: list[list[int]]) -> OpenIslands:
    offsets = np.cumsum([0, *map(len, cells)])
    islands = np.array([island for cell in cells for island in cell], np.int32)
    return OpenIslands(offsets, islands, np.ones(len(islands), np.uint8))


@given(COUNTS)
def test_a_profile_is_a_types_counts_and_what_all_types_lend_it(counts: np.ndarray) -> None:
    found = Profiles.of(counts).log_shares
    assert found.dtype == np.float32
    table = counts.tolist()
    everywhere = [sum(row) + UNSEEN for row in table]
    for code in range(counts.shape[1]):
        own = [row[code] + LENT * n / sum(everywhere) for row, n in zip(table, everywhere, strict=True)]
        expected = [math.log(share / sum(own)) for share in own]
        assert found[:, code].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert np.exp(found.astype(float)).sum(axis=0) == pytest.approx(1, rel=1e-5)


def test_the_fit_is_the_log_likelihood_of_naive_bayes_for_each_open_island() -> None:
    rng = np.random.default_rng(0)
    opened = rng.random((60, 40)) < 0.3
    codes = np.arange(60) % 3
    bayes = MultinomialNB().fit(opened, codes)
    profiles = Profiles(bayes.feature_log_prob_.T.astype(np.float32))
    cells = [np.flatnonzero(row).tolist() for row in opened]
    likelihood = opened @ bayes.feature_log_prob_.T  # of the whole cell, by type
    expected = likelihood.max(axis=1) / opened.sum(axis=1)
    found = profiles.fit(rows_of(cells))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_cell_like_a_type_fits_better_than_one_with_islands_that_no_type_has() -> None:
    profiles = Profiles.of(np.array([[90, 1], [80, 2], [1, 90], [2, 80], [0, 0]]))
    like, mixed, strange = profiles.fit(rows_of([[0, 1], [0, 2], [3, 4]]))
    assert like > mixed > strange


def test_cells_without_open_islands_have_no_fit_and_no_cells_none() -> None:
    profiles = Profiles.of(np.ones((3, 2), np.int32))
    found = profiles.fit(rows_of([[], [1], []]))
    assert np.isnan(found).tolist() == [True, False, True]
    assert profiles.fit(OpenIslands.empty()).shape == (0,)
