"""Splits that keep groups (donors, batches) whole."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_splits import FakeStore, obs_of

from annatac_scale.errors import InputError
from annatac_scale.train.splits import SPLITS, SplitRule, split_cells


def split(obs, holdout=0.2, validation=0.1, calibration=0.1, seed=0, group="donor"):
    return split_cells(FakeStore(obs), "label", SplitRule(holdout, validation, calibration, seed, group))


def donors_of(obs, labelled, name):
    return set(obs["donor"].to_numpy(object)[labelled.of(name)])


TYPES = ("T", "B", "NK")
cells = st.lists(
    st.tuples(st.sampled_from(TYPES), st.sampled_from([f"D{i}" for i in range(9)])), min_size=1, max_size=80
)
extra = [("T", "D0"), ("B", "D0"), ("T", "D1"), ("B", "D1")]
"""Two donors with two types each, so that something is left to train on."""


@given(cells, st.floats(0.01, 0.9), st.floats(0.01, 0.4), st.floats(0, 0.4), st.integers(0, 3))
def test_no_group_is_on_two_sides_and_each_labelled_cell_is_in_one_split(
    drawn, holdout, validation, calibration, seed
):
    labels, donors = zip(*drawn, *extra, strict=True)
    obs = obs_of(list(labels), list(donors))
    labelled = split(obs, holdout, validation, calibration, seed)
    assert labelled.cells.tolist() == list(range(len(obs)))
    assert sum(labelled.sizes.values()) == len(obs)
    assert set(labelled.split) <= set(SPLITS)
    test, training = donors_of(obs, labelled, "test"), donors_of(obs, labelled, "train")
    assert min(len(test), len(training)) >= 1
    assert not test & set.union(training, *(donors_of(obs, labelled, name) for name in ("val", "calib")))
    whole = [donors_of(obs, labelled, name) for name in labelled.whole]
    assert sum(map(len, whole)) == len(set().union(*whole))
    assert not training & set().union(*whole)
    assert "val" not in labelled.whole or len(training) >= 2


@given(cells, st.integers(0, 3))
def test_of_the_cells_in_no_split_those_of_groups_that_train_may_be_looked_at(drawn, seed):
    labels, donors = zip(*drawn, *extra, strict=True)
    without = [("", donor) for donor in (*donors, "D10", None)] + [("T", None), ("B", "")]
    obs = obs_of([*labels, *(label for label, _ in without)], [*donors, *(donor for _, donor in without)])
    labelled = split(obs, seed=seed)
    training = donors_of(obs, labelled, "train")
    expected = [len(donors) + i for i, (_, donor) in enumerate(without) if donor in training]
    assert labelled.beside.tolist() == expected


@given(st.permutations(range(90)), st.integers(0, 2))
def test_the_split_of_a_group_does_not_depend_on_the_order_of_samples_and_cells(order, seed):
    donors = [f"D{number % 6}" for number in range(90)]
    obs = obs_of(["T", "B", "NK", "T", "T", "B", "B", "NK", "NK"] * 10, donors, ["s0"] * 30 + ["s1"] * 60)
    first, second = split(obs, seed=seed), split(obs.iloc[list(order)], seed=seed)
    assert first.split[order].tolist() == second.split.tolist()
    assert first.whole == second.whole == ("val", "calib", "test")


def test_another_seed_holds_out_other_groups():
    obs = obs_of(["T", "B"] * 100, [f"D{number // 10}" for number in range(200)])
    assert len({tuple(split(obs, seed=seed).groups_of("test")) for seed in range(8)}) > 2


def test_groups_are_dealt_by_about_their_shares_of_the_cells():
    obs = obs_of(["T", "B"] * 500, [f"D{number // 10:03d}" for number in range(1000)])
    labelled = split(obs, 0.3, 0.2, 0.1)
    assert labelled.sizes == {"train": 490, "val": 140, "calib": 70, "test": 300}
    assert [len(labelled.groups_of(name)) for name in SPLITS] == [49, 14, 7, 30]


@pytest.mark.parametrize(
    ("n_groups", "calibration", "whole"),
    [
        (2, 0.1, ("test",)),
        (4, 0.1, ("test",)),
        (5, 0.1, ("val", "calib", "test")),
        (3, 0.0, ("test",)),
        (4, 0.0, ("val", "test")),
    ],
)
def test_val_and_calib_are_whole_groups_where_two_are_left_to_train_on(n_groups, calibration, whole):
    donors = [f"D{number % n_groups}" for number in range(60 * n_groups)]
    labels = (["T"] * n_groups + ["B"] * n_groups) * 30
    labelled = split(obs_of(labels, donors), calibration=calibration)
    assert labelled.whole == whole
    assert labelled.sizes["val"] > 0
    assert (labelled.sizes["calib"] > 0) == (calibration > 0)
    assert len(labelled.groups_of("test")) == 1


def test_the_last_group_with_a_type_trains():
    """Of six donors one alone has NK cells: whatever the seed, they train."""
    donors = [f"D{number % 6}" for number in range(120)]
    labels = ["NK" if donor == "D3" else ("T", "B")[number % 4 // 2] for number, donor in enumerate(donors)]
    for seed in range(20):
        labelled = split(obs_of(labels, donors), seed=seed)
        assert "D3" in labelled.groups_of("train")
        assert labelled.types == ("B", "NK", "T")


def test_where_every_group_has_a_type_of_its_own_the_cheapest_one_tests():
    labels = ["T", "B", "own0"] * 10 + ["T", "B", "own1"] * 10 + ["T", "B", "own2", "own3"] * 10
    donors = ["D0"] * 30 + ["D1"] * 30 + ["D2"] * 40
    for seed in range(5):
        labelled = split(obs_of(labels, donors), seed=seed)
        assert labelled.groups_of("test") in (["D0"], ["D1"])
        assert (labelled.codes_of(labelled.of("test")) < 0).sum() == 10


def test_of_two_groups_the_one_nearer_to_the_share_tests():
    obs = obs_of(["T", "B"] * 100, ["D0"] * 150 + ["D1"] * 50)
    assert {tuple(split(obs, seed=seed).groups_of("test")) for seed in range(6)} == {("D1",)}


def test_a_group_that_is_named_tests_and_the_others_are_dealt():
    donors = [f"D{number % 6}" for number in range(120)]
    obs = obs_of(["T"] * 60 + ["B"] * 60, donors)
    for seed in range(5):
        labelled = split(obs, "donor=D4", seed=seed)
        assert labelled.groups_of("test") == ["D4"]
        assert labelled.whole == ("val", "calib", "test")
        assert Counter(labelled.sizes) == {"train": 60, "val": 20, "calib": 20, "test": 20}


def test_a_value_that_tears_groups_is_refused():
    obs = obs_of(["T", "B"] * 20, ["D1", "D2"] * 20).assign(fold=[0, 1, 2, 3] * 10)
    with pytest.raises(
        InputError, match=r"--holdout fold=1 --group donor: D2 have cells that test and cells"
    ):
        split(obs, "fold=1")


def test_without_test_cells_groups_may_still_validate():
    obs = obs_of(["T"] * 60 + ["B"] * 60, [f"D{number % 4}" for number in range(120)])
    labelled = split(obs, 0)
    assert labelled.whole == ("val", "calib")
    assert labelled.sizes == {"train": 60, "val": 30, "calib": 30, "test": 0}


def test_cells_without_a_group_are_in_no_split_and_counted():
    donors = pd.Series([1, 2, None, 3, 4] * 40)
    labels = ["T", "B"] * 95 + [None] * 10
    labelled = split(obs_of(labels, donors))
    assert labelled.n_without_label == 10
    assert labelled.n_without_group == 38
    assert len(labelled.cells) == 152
    assert set(labelled.groups) == {"1", "2", "3", "4"}


def test_a_cell_without_a_group_and_without_the_held_out_value_is_counted_once():
    obs = obs_of((["T"] * 4 + ["B"] * 4) * 15, ["D1", "D2", None, "D3"] * 30).assign(
        lab=["x", "y", None, None] * 30
    )
    labelled = split(obs, "lab=y")
    assert (labelled.n_without_group, labelled.n_without_value) == (30, 30)
    assert labelled.groups_of("test") == ["D2"]
    assert labelled.groups_of("train") == ["D1"]


def test_samples_are_groups():
    obs = obs_of(["T", "B"] * 60, samples=np.repeat([f"s{i}" for i in range(6)], 20))
    labelled = split(obs, group="sample")
    assert labelled.whole == ("val", "calib", "test")
    assert all(len(labelled.groups_of(name)) == 1 for name in ("val", "calib", "test"))
    assert split(obs, "sample=s2", group="sample").groups_of("test") == ["s2"]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            "label",
            "--group label: found the column of the labels, expected a column with two donors or batches",
        ),
        ("donor", "--group donor: found 1 groups among the labelled cells of toy.zarr"),
        ("plate", "no obs column"),
        ("", "no obs column"),
    ],
)
def test_a_column_without_groups_is_refused(group, message):
    donors = ["D1"] * 40 + ["D2"] * 5
    with pytest.raises(InputError, match=message):
        split(obs_of(["T", "B"] * 20 + [None] * 5, donors), group=group)


def test_all_groups_held_out_leave_nothing_to_train_on():
    obs = obs_of(["T", "B"] * 20, ["D1", "D2"] * 20).assign(tissue="lung")
    with pytest.raises(InputError, match="0 cell types have training cells"):
        split(obs, "tissue=lung")
