import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import Cells, draw_cells, write_store

from annatac_scale.errors import InputError
from annatac_scale.train.splits import SPLITS, SplitRule, split_cells, write_split


class FakeStore:
    """What splitting reads of a store: the obs of its samples."""

    path = "toy.zarr"

    def __init__(self, obs):
        self._obs = obs.reset_index(drop=True)
        self.n_cells = len(obs)

    def obs(self, columns):
        missing = set(columns) - set(self._obs)
        if missing:
            raise InputError(f"no obs column {missing}")
        return self._obs[["sample", "barcode", *columns]]


def obs_of(labels, donors=None, samples=None):
    n = len(labels)
    return pd.DataFrame(
        {
            "sample": samples if samples is not None else "s0",
            "barcode": [f"c{i}" for i in range(n)],
            "label": pd.Series(labels, dtype=object),
            "donor": donors if donors is not None else "D1",
        }
    )


def split(obs, holdout=0.2, validation=0.1, calibration=0.1, seed=0, labels="label"):
    return split_cells(FakeStore(obs), labels, SplitRule(holdout, validation, calibration, seed))


def counts_by_type(labelled, name):
    return np.bincount(labelled.codes[labelled.split == name], minlength=len(labelled.types)).tolist()


def test_each_type_gives_its_share_to_each_split():
    labelled = split(obs_of(["T"] * 100 + ["B"] * 50), holdout=0.2, validation=0.1, calibration=0.25)
    assert labelled.types == ("B", "T")
    assert counts_by_type(labelled, "test") == [10, 20]
    assert counts_by_type(labelled, "val") == [4, 8]
    assert counts_by_type(labelled, "calib") == [10, 20]
    assert counts_by_type(labelled, "train") == [26, 52]
    assert labelled.sizes == {"train": 78, "val": 12, "calib": 30, "test": 30}


shares = st.floats(0.01, 0.45)


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=5), st.floats(0, 0.9), shares, shares, st.integers(0, 3)
)
def test_splits_are_disjoint_and_complete_and_every_type_trains(
    sizes, holdout, validation, calibration, seed
):
    labels = [f"type{number}" for number, n in enumerate(sizes) for _ in range(n)]
    labelled = split(obs_of(labels), holdout, validation, calibration, seed)
    assert sorted(np.concatenate([labelled.of(name) for name in SPLITS]).tolist()) == list(range(len(labels)))
    assert min(counts_by_type(labelled, "train")) >= 1
    for number, n in enumerate(sizes):
        for name, share in (
            ("test", holdout), ("val", validation * (1 - holdout)), ("calib", calibration * (1 - holdout)),
        ):  # fmt: skip
            assert counts_by_type(labelled, name)[number] <= share * n + 0.5 + 1e-9


@given(st.permutations(range(60)), st.integers(0, 2))
def test_the_split_of_a_cell_does_not_depend_on_the_order_of_samples_and_cells(order, seed):
    obs = obs_of(["T", "B", "NK"] * 20, samples=["s0"] * 25 + ["s1"] * 35)
    shuffled = obs.iloc[list(order)]
    first, second = split(obs, seed=seed), split(shuffled, seed=seed)
    assert first.split[order].tolist() == second.split.tolist()
    assert first.codes[order].tolist() == second.codes.tolist()


def test_another_seed_splits_otherwise():
    obs = obs_of(["T", "B"] * 50)
    assert split(obs, seed=0).split.tolist() != split(obs, seed=1).split.tolist()
    assert split(obs, seed=0).split.tolist() == split(obs, seed=0).split.tolist()


@pytest.mark.parametrize(
    ("n", "train", "test"), [(1, 1, 0), (2, 2, 0), (3, 2, 1), (4, 3, 1)], ids="{}_cells".format
)
def test_a_type_with_few_cells_trains_first(n, train, test):
    labelled = split(obs_of(["T"] * 100 + ["rare"] * n))
    assert labelled.types == ("T", "rare")
    assert counts_by_type(labelled, "train")[1] == train
    assert counts_by_type(labelled, "test")[1] == test


def test_cells_without_a_label_are_left_out_and_counted():
    labels = ["T", None, "B", float("nan"), "", "  ", "T ", "B"]
    labelled = split(obs_of(labels))
    assert labelled.types == ("B", "T")
    assert labelled.cells.tolist() == [0, 2, 6, 7]
    assert labelled.codes.tolist() == [1, 0, 1, 0]
    assert labelled.n_without_label == 4


def test_cells_in_no_split_may_be_looked_at_unless_they_have_or_may_have_the_value_that_is_held_out():
    labels = ["T", "B", None, "T", "B", "", "T", "B", None]
    donors = ["D1", "D1", "D1", "D2", "D2", "D2", "D1", "D1", None]
    assert split(obs_of(labels, donors)).beside.tolist() == [2, 5, 8]
    assert split(obs_of(labels, donors), holdout="donor=D2").beside.tolist() == [2]


@pytest.mark.parametrize("dtype", [object, float, "Int64", "category"], ids=str)
def test_whole_numbers_are_labels_even_from_a_column_with_gaps(dtype):
    obs = obs_of([3, 10, None, 3, 10, 3])
    obs["label"] = pd.Series([3, 10, None, 3, 10, 3], dtype=None if dtype == "category" else dtype)
    obs["label"] = obs["label"].astype("category") if dtype == "category" else obs["label"]
    labelled = split(obs)
    assert labelled.types == ("10", "3")
    assert labelled.codes.tolist() == [1, 0, 1, 0, 1]


def test_a_whole_donor_tests_and_the_others_are_split_by_type():
    donors = ["D1", "D2"] * 100
    labelled = split(obs_of(["T"] * 120 + ["B"] * 80, donors), "donor=D2", 0.1, 0.2)
    assert labelled.of("test").tolist() == list(range(1, 200, 2))
    assert counts_by_type(labelled, "test") == [40, 60]
    assert counts_by_type(labelled, "val") == [4, 6]
    assert counts_by_type(labelled, "calib") == [8, 12]


def test_a_held_out_value_may_be_a_whole_number_from_a_column_with_gaps():
    folds = pd.Series([0, 1, 2, None] * 10)
    labelled = split(obs_of(["T", "B", "B", "T"] * 10, folds), "donor=1")
    assert labelled.of("test").tolist() == list(range(1, 40, 4))


@pytest.mark.parametrize("missing", [None, "", " NA "])
def test_cells_without_the_value_that_is_held_out_are_in_no_split_and_counted(missing):
    donors = ["D1", "D2", missing, "D3"] * 20
    labelled = split(obs_of(["T", "B", None, "B", "B", "T", "T", "T"] * 10, donors), "donor=D2")
    assert labelled.of("test").tolist() == list(range(1, 80, 4))
    assert labelled.cells.tolist() == [cell for cell in range(80) if cell % 4 != 2]
    assert (labelled.n_without_label, labelled.n_without_value, labelled.n_without_group) == (10, 10, 0)


def test_a_column_that_marks_the_held_out_cells_alone_leaves_none_to_train_on_and_says_why():
    marked = ["yes", None, None, None] * 10
    with pytest.raises(
        InputError, match=r"--holdout donor=yes: 0 .*where 30 cells without a value are left out"
    ):
        split(obs_of(["T", "B"] * 20, marked), "donor=yes")


def test_types_that_are_held_out_whole_have_codes_below_zero_each_its_own():
    labels = ["T", "B"] * 20 + ["NK"] * 3 + ["Mono"] * 2
    donors = ["D1"] * 40 + ["D2"] * 5
    labelled = split(obs_of(labels, donors), "donor=D2")
    assert labelled.types == ("B", "T")
    assert labelled.codes_of(labelled.of("test")).tolist() == [-2, -2, -2, -1, -1]


def test_a_type_may_be_held_out_by_its_own_label():
    labelled = split(obs_of(["T", "B", "NK"] * 20), "label=NK")
    assert labelled.types == ("B", "T")
    assert labelled.of("test").tolist() == list(range(2, 60, 3))


def test_codes_are_looked_up_by_cell_in_any_order():
    labelled = split(obs_of(["T", None, "B", "NK"] * 5))
    cells = np.array([19, 0, 2, 3, 18])
    assert [labelled.types[code] for code in labelled.codes_of(cells)] == ["NK", "T", "B", "NK", "B"]


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        ("donor=D9", "--holdout donor=D9: no labelled cell of toy.zarr has donor 'D9'; there are D1, D2"),
        ("donor=", "--holdout donor=: found no value; expected column=value, as donor=D5, or a share"),
        ("donor= NA", "found no value"),
        ("=D2", "--holdout =D2: found no column; expected column=value"),
        ("lab=x", "no obs column"),
        (1.0, "expected a share from 0 up to 1, or column=value"),
        (-0.1, "expected a share"),
        ("half", "--holdout half: expected a share"),
        (float("nan"), "expected a share"),
    ],
)
def test_a_holdout_that_is_none_is_refused(holdout, message):
    with pytest.raises(InputError, match=message):
        split(obs_of(["T", "B"] * 20, ["D1", "D2"] * 20), holdout)


def test_a_column_without_a_name_is_refused():
    with pytest.raises(InputError, match="no obs column"):
        split(obs_of(["T", "B"] * 20), labels="")


def test_a_value_is_held_out_however_its_letters_are_composed():
    composed, apart = "Zo\u00eb", "Zoe\u0308"
    obs = obs_of(["T", "T", "B", "B"] * 10, [composed, "D2"] * 20)
    for spelling in (composed, apart):
        assert split(obs, f"donor={spelling}").of("test").tolist() == list(range(0, 40, 2))


def test_a_holdout_has_one_spelling():
    spellings = [SplitRule(holdout, 0.1, 0.1, 0).described for holdout in (0.2, "0.2", "0.20", "donor = D5")]
    assert spellings == ["0.2", "0.2", "0.2", "donor=D5"]


def test_a_share_may_come_as_text_as_from_the_command_line():
    obs = obs_of(["T", "B"] * 50)
    assert split(obs, "0.3").split.tolist() == split(obs, 0.3).split.tolist()
    assert not len(split(obs, "0").of("test"))


@pytest.mark.parametrize(
    ("labels", "holdout", "message"),
    [
        ([None] * 5, 0.2, r"0 cell types have training cells \(\), expected at least 2"),
        (["T"] * 50, 0.2, r"1 cell types have training cells \(T\)"),
        (["T", "B"] * 20, "label=B", r"1 cell types have training cells \(T\)"),
    ],
)
def test_fewer_than_two_types_to_train_on_are_refused(labels, holdout, message):
    with pytest.raises(InputError, match=message):
        split(obs_of(labels), holdout)


def test_split_parquet_lists_every_labelled_cell_with_the_digests_of_its_samples(tmp_path):
    cells = {"s0": draw_cells(60), "s1": draw_cells(40, 1)}
    cells["s1"] = Cells(
        cells["s1"].levels,
        cells["s1"].obs.assign(cell_type=lambda obs: obs["cell_type"].where(obs.index != "cell1-3")),
    )
    store = write_store(tmp_path / "a.zarr", cells)
    labelled = split_cells(store, "cell_type", SplitRule(0.2, 0.1, 0.1, 0))
    write_split(tmp_path / "split.parquet", store, labelled)
    table = pq.read_table(tmp_path / "split.parquet")
    digests = json.loads(table.schema.metadata[b"store_digests"])
    assert digests == {name: sample.x_sha256 for name, sample in store.samples.items()}
    expected = [
        (name, barcode) for name in cells for barcode in cells[name].obs.index if barcode != "cell1-3"
    ]
    rows = table.to_pandas()
    assert list(zip(rows["sample"], rows["barcode"], strict=True)) == expected
    assert rows["split"].tolist() == labelled.split.tolist()
    assert labelled.n_without_label == 1
