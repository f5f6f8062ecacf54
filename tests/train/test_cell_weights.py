import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.train.cell_weights import cell_weights, class_weights
from annatac_scale.train.splits import LabelledCells


def labelled_of(codes, groups, split=None):
    n = len(codes)
    types = tuple("abcd"[: max(codes) + 1])
    split = np.full(n, "train", object) if split is None else np.array(split, object)
    return LabelledCells(np.arange(n), np.array(codes), split, types, 0, groups=np.array(groups, object))


pairs = st.lists(st.tuples(st.integers(0, 2), st.sampled_from("xyz")), min_size=1, max_size=60)


@given(pairs)
def test_groups_of_a_type_weigh_the_same_and_the_type_what_it_weighed(drawn):
    drawn = [*drawn, (0, "x"), (1, "x"), (2, "x")]
    codes, groups = (np.array(column) for column in zip(*drawn, strict=True))
    labelled = labelled_of(codes, groups)
    of_type = class_weights(np.bincount(codes, minlength=3), "balanced")
    plain, balanced = (cell_weights(labelled, of_type, rule) for rule in ("none", "balanced"))
    for code in range(3):
        sums = [balanced[(codes == code) & (groups == name)].sum() for name in set(groups[codes == code])]
        np.testing.assert_allclose(sums, sums[0], rtol=1e-5)
        np.testing.assert_allclose(sum(sums), plain[codes == code].sum(), rtol=1e-5)


def test_with_the_same_types_everywhere_groups_weigh_the_same_in_all():
    codes, groups = [0] * 90 + [1] * 30 + [0] * 6 + [1] * 9, ["big"] * 120 + ["small"] * 15
    weights = cell_weights(labelled_of(codes, groups), np.ones(2), "balanced")
    big = np.array(groups) == "big"
    assert weights[big].sum() == pytest.approx(weights[~big].sum())
    assert weights.mean() == pytest.approx(1)


def test_cells_that_do_not_train_weigh_nothing_and_count_for_nothing():
    codes, groups = [0, 0, 1, 1, 0, 0], ["x", "y", "x", "y", "x", "x"]
    split = ["train", "train", "train", "train", "test", "val"]
    weights = cell_weights(labelled_of(codes, groups, split), np.array([2.0, 3.0]), "balanced")
    assert weights.tolist() == [2, 2, 3, 3, 0, 0]


def test_types_alone_weigh_cells_by_their_type():
    labelled = labelled_of([0, 1, 1], ["x", "x", "y"])
    assert cell_weights(labelled, np.array([4.0, 0.5]), "none").tolist() == [4, 0.5, 0.5]
