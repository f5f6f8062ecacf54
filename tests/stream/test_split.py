"""Splits by hash, against plain loops; their share; and that nothing but the seed moves a cell."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from index_only import rows_of, store_of
from obs_stores import obs_store

from annatac_scale.errors import ConfigError, InputError
from annatac_scale.stream.hashes import numbers_of, text_hashes
from annatac_scale.stream.split import Split, split_cells

GOLDEN = 0x9E3779B97F4A7C15
ALL = 2**64


def plain_mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % ALL
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % ALL
    return z ^ (z >> 31)


def plain_text_hash(text, seed):
    letters = text.encode()
    value = plain_mix(plain_mix((seed + GOLDEN) % ALL) ^ len(letters))
    for letter in letters:
        value = plain_mix(((value ^ letter) + GOLDEN) % ALL)
    return value


def plain_split(store, share, seed):
    """Cell ids that validate, one by one."""
    return [
        cell
        for cell, (name, row) in enumerate(rows_of(store))
        if plain_mix((plain_text_hash(name, seed) + (row + 1) * GOLDEN) % ALL) < share * ALL
    ]


# The hash


def test_the_numbers_of_a_key_are_those_of_splitmix64():
    assert numbers_of(np.uint64(1234567), np.arange(5)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(texts=st.lists(st.text(max_size=12)), seed=st.integers(0, 2**64), skip=st.integers(0, 3))
def test_texts_are_hashed_as_one_by_one(texts, seed, skip):
    found = text_hashes(pa.array(texts, pa.string())[skip:], seed)
    assert found.tolist() == [plain_text_hash(text, seed % ALL) for text in texts[skip:]]


# Cell by cell


@given(
    sizes=st.dictionaries(st.sampled_from(["a", "b", "lung_2", "é"]), st.integers(0, 40), min_size=1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_a_split_is_that_of_a_plain_loop(sizes, share, seed):
    store = store_of(sizes)
    expected = plain_split(store, share, seed)
    if len(expected) in (0, store.n_cells):
        with pytest.raises(
            InputError, match=r"no cells to split|choose a (larger|smaller) share, another seed"
        ):
            split_cells(store, Split("train", share, seed=seed))
        return
    assert split_cells(store, Split("validation", share, seed=seed)).tolist() == expected
    train = split_cells(store, Split("train", share, seed=seed))
    assert train.dtype == np.int64
    assert train.tolist() == [cell for cell in range(store.n_cells) if cell not in expected]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_share_is_what_coin_tosses_give_in_every_sample(share, seed):
    store = store_of({f"s{i}": 20_000 for i in range(20)})
    rows = split_cells(store, Split("validation", share, seed=seed))
    found = np.bincount(rows // 20_000, minlength=20)
    sigma = np.sqrt(20_000 * share * (1 - share))
    deviations = (found - 20_000 * share) / sigma
    assert np.abs(deviations).max() < 4.5
    assert abs(deviations.sum()) / np.sqrt(20) < 4
    assert 0.4 < np.std(deviations) < 1.7


def test_neighbours_and_samples_and_seeds_have_nothing_to_do_with_each_other():
    store = store_of({"a": 200_000, "b": 200_000})
    validates = [np.zeros(400_000, bool) for _ in range(2)]
    for seed, mask in enumerate(validates):
        mask[split_cells(store, Split("validation", 0.5, seed=seed))] = True
    first = validates[0]
    pairs = [(first[:-1], first[1:]), (first[:200_000], first[200_000:]), tuple(validates)]
    pairs += [(first[:-lag], first[lag:]) for lag in (2, 4, 250, 256, 4000, 4096)]
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(len(one))


def test_the_order_of_commits_and_samples_added_later_move_no_cell():
    sizes = {"a": 300, "b": 2, "c": 511}

    def validating(order):
        store = store_of({name: sizes[name] for name in order})
        rows = rows_of(store)
        return {rows[cell] for cell in split_cells(store, Split("validation", 0.3)).tolist()}

    full = validating("abc")
    assert validating("cab") == full
    assert validating("ac") == {(name, row) for name, row in full if name != "b"}


def test_given_cells_are_split_as_among_all():
    store = store_of({"a": 300, "none": 0, "b": 2, "c": 511})
    cells = np.random.default_rng(0).permutation(store.n_cells)[:400]
    everywhere = set(split_cells(store, Split("validation", 0.3)).tolist())
    assert split_cells(store, Split("validation", 0.3), cells).tolist() == sorted(
        everywhere & set(cells.tolist())
    )
    assert split_cells(store, Split("train", 0.3), cells).tolist() == sorted(set(cells.tolist()) - everywhere)


def test_a_seed_gives_another_split():
    store = store_of({"a": 1000})
    assert len({tuple(split_cells(store, Split("validation", seed=seed))) for seed in range(5)}) == 5


# By group


def donors(n, seed, values):
    return pd.DataFrame({"donor": np.random.default_rng(seed).choice(values, n)})


NAMES = [f"D{i}" for i in range(12)]


def test_cells_of_a_value_keep_together_and_those_without_one_train(tmp_path):
    names = np.array([*NAMES, None], object)
    store = obs_store(
        tmp_path / "a.zarr", a=donors(90, 1, names), b=pd.DataFrame({"x": [1, 2]}), c=donors(60, 2, names)
    )
    obs = store.obs(["donor"])["donor"]
    split = Split("validation", 0.4, by="donor", seed=3)
    expected = [
        cell
        for cell, donor in enumerate(obs)
        if isinstance(donor, str) and plain_text_hash(donor, 3) < 0.4 * ALL
    ]
    assert 0 < len(expected) < 150
    assert split_cells(store, split).tolist() == expected
    train = split_cells(store, Split("train", 0.4, by="donor", seed=3)).tolist()
    assert sorted([*train, *expected]) == list(range(store.n_cells))
    some = np.arange(0, 152, 3)
    assert split_cells(store, split, some).tolist() == [cell for cell in expected if cell % 3 == 0]


def test_a_value_stays_where_it_is_whatever_type_other_samples_give_it(tmp_path):
    numbers = np.arange(60)
    split = Split("validation", 0.4, by="donor")
    alone = obs_store(tmp_path / "a.zarr", a=pd.DataFrame({"donor": numbers}))
    expected = split_cells(alone, split).tolist()
    assert expected == [n for n in range(60) if plain_text_hash(str(n), 0) < 0.4 * ALL]
    for kind in ("float32", "float64", "uint8", str):
        other = pd.DataFrame({"donor": numbers.astype(kind)})
        store = obs_store(tmp_path / f"{kind}.zarr", a=pd.DataFrame({"donor": numbers}), b=other)
        assert split_cells(store, split).tolist() == [*expected, *(60 + n for n in expected)]


def test_numbers_truth_values_and_samples_are_groups_too(tmp_path):
    obs = pd.DataFrame({"age": [1.5, np.nan, 2.0, 1.5], "flag": [True, False, True, False]})
    store = obs_store(tmp_path / "a.zarr", a=obs, b=obs)
    for by, texts in [
        ("age", ["1.5", None, "2", "1.5"] * 2),
        ("flag", ["True", "False"] * 4),
        ("sample", ["a"] * 4 + ["b"] * 4),
        ("barcode", [f"{name}{row}" for name in "ab" for row in range(4)]),
    ]:
        seeds = [s for s in range(99) if sides(texts, s) == {True, False}]
        found = split_cells(store, Split("validation", 0.5, by=by, seed=seeds[0])).tolist()
        assert found == [c for c, text in enumerate(texts) if text and validating(text, seeds[0])]


def validating(text, seed):
    return plain_text_hash(text, seed) < 0.5 * ALL


def sides(texts, seed):
    return {validating(text, seed) for text in texts if text}


def test_about_the_share_of_many_values_validates(tmp_path):
    store = obs_store(tmp_path / "a.zarr", a=pd.DataFrame({"clone": [f"clone {i}" for i in range(4000)]}))
    found = len(split_cells(store, Split("validation", 0.2, by="clone")))
    assert abs(found - 800) < 4 * np.sqrt(4000 * 0.2 * 0.8)


# What cannot be split


def test_a_split_with_one_side_is_refused_and_says_what_to_do(tmp_path):
    store = obs_store(tmp_path / "a.zarr", a=pd.DataFrame({"donor": ["D1", "D1", None]}))
    for part in ("train", "validation"):
        with pytest.raises(
            InputError,
            match=r"a.zarr: split: of the 1 values of 'donor' that the 3 cells have none validates with validation = "
            r"1e-06 and seed = 0; choose a larger share, another seed, or a column with more values",
        ):
            split_cells(store, Split(part, 1e-6, by="donor"))
    with pytest.raises(InputError, match=r"split: of the 3 cells none validates .* choose a larger share"):
        split_cells(store, Split("train", 1e-6))
    with pytest.raises(
        InputError, match=r"none trains with validation = 0.999999 .*; choose a smaller share"
    ):
        split_cells(store, Split("train", 1 - 1e-6))
    with pytest.raises(InputError, match="no cells to split; choose some"):
        split_cells(store, Split("train"), np.empty(0, np.int64))
    with pytest.raises(InputError, match="no obs column 'age'; there are barcode, donor, sample"):
        split_cells(store, Split("train", by="age"))
    with pytest.raises(InputError, match="no cell 3; ids run from 0 to 2"):
        split_cells(store, Split("train"), np.array([3]))


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="expected a share above 0 and below 1"):
        Split("train", share)


def test_an_unknown_part_is_refused():
    with pytest.raises(ConfigError, match="split part = 'test': expected train or validation"):
        Split("test")
