"""Conditions on obs: the cells that pandas, and a plain loop of three values, choose; expressions of pyarrow."""

import operator
from dataclasses import dataclass

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from holed_stores import chosen, frame, holed_store
from hypothesis import given
from hypothesis import strategies as st
from index_only import store_of
from obs_stores import obs_store

from annatac_scale.errors import InputError
from annatac_scale.stream import where as where_module
from annatac_scale.stream.where import cells_where

NAN = float("nan")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return holed_store(tmp_path_factory.mktemp("where") / "atlas.zarr")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two samples without anything missing."""
    return obs_store(tmp_path_factory.mktemp("whole") / "atlas.zarr", a=frame(40, 1), b=frame(25, 2))


# The same as pandas


PANDAS = [
    "tissue == 'lung'",
    'tissue != "it\'s"',
    "'lung' == tissue",
    "tissue > 'gut'",
    "tissue in ['lung', '']",
    "tissue not in ['lung', '']",
    "n_open >= 2",
    "2 <= n_open",
    "n_open > 1.5",
    "n_open in [1, 3]",
    "small < 300",
    "small > -1",
    "score == -0.5",
    "1 < n_open <= 3",
    "doublet",
    "not doublet",
    "doublet == False and score > 0",
    "n_open == small",
    "n_open < score",
    "small >= score or tissue == 'gut'",
    "not (tissue == 'lung' or n_open > 2) and doublet",
    "sample == 'b' and n_open == 0",
    "barcode in ['a3', 'b7', 'z']",
    "tissue == 'lung' and n_open > 0 or tissue == 'gut' and not doublet",
]


@pytest.mark.parametrize("where", PANDAS)
def test_a_condition_chooses_what_a_query_of_pandas_does(whole, where):
    expected = whole.obs().query(where, engine="python").index.tolist()
    assert 0 < len(expected) < whole.n_cells or "small" in where
    assert chosen(whole, where) == expected


# The same as a plain loop


COLUMNS = ("tissue", "n_open", "small", "score", "doublet", "sample")
COMPARE = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
TEXTS = st.sampled_from(["lung", "gut", "é 1", "", "it's", "a", "b", "zz"])
NUMBERS = st.sampled_from([0, 1, 2, 3, 300, -1, 0.5, -1.5, 2.0, 1e300, -1e300, float("inf")])


def spelled(value):
    """A value as it is written in a condition."""
    return "1e999" if value == float("inf") else repr(value)


@dataclass
class Condition:
    """A condition as text, and what it says of a row: True, False, or None where that is not known."""

    text: str
    of: object


def known(function, *values):
    return None if any(value is None for value in values) else function(*values)


@st.composite
def comparisons(draw):
    column = draw(st.sampled_from(COLUMNS))
    values = NUMBERS if column in ("n_open", "small", "score") else TEXTS
    kind = draw(st.sampled_from(["compare", "mirrored", "in", "not in", "is None", "is not None", "columns"]))
    if kind == "is None":
        return Condition(f"{column} is None", lambda row: row[column] is None)
    if kind == "is not None":
        return Condition(f"{column} is not None", lambda row: row[column] is not None)
    if column == "doublet":
        value, sign = draw(st.booleans()), draw(st.sampled_from(["==", "!="]))
        return Condition(
            f"doublet {sign} {value}", lambda row: known(lambda x: COMPARE[sign](x, value), row["doublet"])
        )
    if kind in ("in", "not in"):
        some = draw(st.lists(values, max_size=3))
        listed = "[" + ", ".join(map(spelled, some)) + "]"
        return Condition(
            f"{column} {kind} {listed}",
            lambda row: known(lambda x: (x in some) == (kind == "in"), row[column]),
        )
    sign = draw(st.sampled_from(list(COMPARE)))
    if kind == "columns":
        other = draw(
            st.sampled_from(("tissue", "sample") if values is TEXTS else ("n_open", "small", "score"))
        )
        return Condition(
            f"{column} {sign} {other}", lambda row: known(COMPARE[sign], row[column], row[other])
        )
    value = draw(values)
    if kind == "mirrored":
        return Condition(
            f"{spelled(value)} {sign} {column}",
            lambda row: known(lambda x: COMPARE[sign](value, x), row[column]),
        )
    return Condition(
        f"{column} {sign} {spelled(value)}", lambda row: known(lambda x: COMPARE[sign](x, value), row[column])
    )


def negated(part):
    return Condition(f"not ({part.text})", lambda row: known(lambda x: not x, part.of(row)))


def joined(parts, word):
    decides = word == "or"

    def of(row):
        found = [part.of(row) for part in parts]
        if decides in found:
            return decides
        return None if None in found else not decides

    return Condition(f" {word} ".join(f"({part.text})" for part in parts), of)


CONDITIONS = st.recursive(
    comparisons(),
    lambda parts: (
        parts.map(negated)
        | st.builds(joined, st.lists(parts, min_size=2, max_size=3), st.sampled_from(["and", "or"]))
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("piece", [2**20, 7])
def test_a_condition_chooses_what_a_plain_loop_of_three_values_does(store, monkeypatch, piece):
    monkeypatch.setattr(where_module, "_PIECE", piece)
    columns = store.obs([*COLUMNS[:-1]]).astype(object)
    rows = [
        {name: None if pd.isna(value) else value for name, value in row.items()}
        for row in columns.to_dict("records")
    ]

    @given(condition=CONDITIONS)
    def check(condition):
        expected = [cell for cell, row in enumerate(rows) if condition.of(row) is True]
        assert chosen(store, condition.text) == expected

    check()


def test_missing_values_are_chosen_by_is_none_alone(tmp_path):
    store = obs_store(tmp_path / "a.zarr", a=pd.DataFrame({"t": ["x", None], "n": [1.0, NAN]}), b=frame(1, 1))
    for where in ("t == 'x'", "not t != 'x'", "n == 1", "n < 2", "not n > 2", "n not in [3]", "n != 3"):
        assert chosen(store, where) == [0]
    for where in ("t != 'x'", "not t == 'x'", "t not in ['x']", "n > 1", "not (n < 2 or t == 'y')"):
        assert chosen(store, where) == []
    assert chosen(store, "t is None") == chosen(store, "n is None") == [1, 2]
    assert chosen(store, "not t is not None and n_open is None") == [1]


# Expressions of pyarrow


@pytest.mark.parametrize(
    ("expression", "where"),
    [
        (pc.field("tissue") == "lung", "tissue == 'lung'"),
        (
            ~pc.field("tissue").isin(["lung", "gut"]) & pc.field("tissue").is_valid(),
            "tissue not in ['lung', 'gut']",
        ),
        ((pc.field("n_open") > 2) | pc.field("doublet"), "n_open > 2 or doublet"),
        (pc.utf8_upper(pc.field("tissue")) == "GUT", "tissue == 'gut'"),
        (pc.field("score").is_null(), "score is None"),
        (pc.field("sample") == "b", "sample == 'b'"),
        (pc.scalar(True), "n_open >= 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("piece", [2**20, 7])
def test_an_expression_may_be_given(store, monkeypatch, expression, where, piece):
    monkeypatch.setattr(where_module, "_PIECE", piece)
    assert chosen(store, expression) == chosen(store, where)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (
            pc.field("tisue") == "lung",
            r"No match for FieldRef.*; there are the columns barcode, doublet, n_open, samp",
        ),
        (pc.field("n_open") == "lung", "pyarrow cannot compute it .*no kernel.*; change the expression"),
        (pc.field("n_open") + 1, "pyarrow cannot compute it .*must evaluate to bool"),
        (pc.field(0) == 1, r"found a column by its number; .* use pyarrow.compute.field\('name'\)"),
        (pc.field("tissue", "n_open") == 1, "pyarrow cannot compute it"),
        (pc.field("n_open") > 99, r"holds for none of 110 cells; 'n_open' is 0 to 4; ask for what is there"),
        (pc.scalar(False), "holds for none of 110 cells; ask for what is there"),
    ],
    ids=str,
)
def test_an_expression_that_does_not_fit_is_an_input_error(store, expression, message):
    with pytest.raises(InputError, match=f"^where .*{message}") as raised:
        cells_where(store, expression)
    assert "\n" not in str(raised.value)


# What is neither, and stores of nothing


@pytest.mark.parametrize("where", [None, 5, b"tissue == 'lung'", ["tissue"], pa.scalar(True)])
def test_what_is_neither_text_nor_expression_is_refused(store, where):
    with pytest.raises(InputError, match="expected text or a pyarrow expression; expected comparisons"):
        cells_where(store, where)


def test_a_store_without_samples_holds_nothing(tmp_path):
    with pytest.raises(InputError, match="holds no sample, so no obs column 'tissue'"):
        cells_where(obs_store(tmp_path / "a.zarr"), "tissue == 'lung'")


def test_samples_are_chosen_without_reading_anything():
    store = store_of({"a": 3, "b": 2, "c": 4})
    assert chosen(store, "sample in ['b', 'c']") == list(range(3, 9))
    assert chosen(store, "sample != 'b'") == [0, 1, 2, 5, 6, 7, 8]
