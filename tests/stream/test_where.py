"""Conditions on obs: the cells that pandas, and a plain loop of three values, choose; and what is refused."""

import operator
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from index_only import store_of
from obs_stores import obs_store

from annatac_scale.errors import InputError
from annatac_scale.stream import where as where_module
from annatac_scale.stream.where import cells_where

NAN = float("nan")


def frame(n, seed):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "tissue": rng.choice(["lung", "gut", "é 1", "", "it's"], n),
            "n_open": rng.integers(0, 5, n),
            "small": rng.integers(0, 4, n).astype(np.uint8),
            "score": rng.integers(-3, 4, n) / 2,
            "doublet": rng.random(n) < 0.5,
        }
    )


def with_holes(obs, seed):
    """The same with text and floats that are missing here and there."""
    holes = np.random.default_rng(seed).random((2, len(obs))) < 0.3
    return obs.assign(
        tissue=obs["tissue"].where(~holes[0], None), score=obs["score"].where(~holes[1]).astype("f4")
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two samples without anything missing, then one with holes, and one that lacks columns."""
    folder = tmp_path_factory.mktemp("where") / "atlas.zarr"
    return obs_store(
        folder,
        a=frame(40, 1),
        b=frame(25, 2),
        c=with_holes(frame(40, 3), 4),
        d=frame(5, 5)[["n_open"]],
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two samples without anything missing."""
    return obs_store(tmp_path_factory.mktemp("whole") / "atlas.zarr", a=frame(40, 1), b=frame(25, 2))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Columns whose names are no words, and extreme numbers."""
    obs = pd.DataFrame(
        {
            "cell type": ["B", "T", "B"],
            "class": ["x", "y", None],
            "a.b": [1, 2, 3],
            "field": [1, 0, 1],
            "large": np.array([2**64 - 1, 2**63, 7], "u8"),
            "low": np.array([-(2**63), 2**63 - 1, 2**53 + 1]),
            "exact": np.array([2**53, 2**53 + 1, 0]),
            "half": np.array([0.5, NAN, 1], "f2"),
            "single": np.array([0.1, NAN, np.inf], "f4"),
        }
    )
    return obs_store(tmp_path_factory.mktemp("odd") / "atlas.zarr", s=obs)


def chosen(store, where):
    """Ids, none where there are none."""
    try:
        cells = cells_where(store, where)
    except InputError as error:
        if "holds for none of" not in str(error):
            raise
        return []
    assert cells.dtype == np.int64
    return cells.tolist()


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


# Names and numbers


def test_names_that_are_no_words_are_given_by_field(odd):
    assert chosen(odd, "field('cell type') == 'B'") == [0, 2]
    assert chosen(odd, "field('class') is not None and field(\"a.b\") > 1") == [1]
    assert chosen(odd, "field == 1") == [0, 2]
    assert chosen(odd, "field('sample') == 's'") == [0, 1, 2]


def test_numbers_at_the_edges_of_their_types_are_compared_exactly(odd):
    assert chosen(odd, "large == 18446744073709551615") == [0]
    assert chosen(odd, "large > 9223372036854775807") == [0, 1]
    assert chosen(odd, "large > -1") == [0, 1, 2]
    assert chosen(odd, "low == -9223372036854775808") == [0]
    assert chosen(odd, "low >= 9007199254740993") == [1, 2]
    assert chosen(odd, "exact == 9007199254740993") == [1]
    assert chosen(odd, "exact > 0.5") == [0, 1]
    assert chosen(odd, "low > large") == [2]
    assert chosen(odd, "half >= 0.5") == [0, 2]


def test_a_number_means_the_nearest_one_of_a_single_precision_column(odd):
    assert chosen(odd, "single == 0.1") == [0]
    assert chosen(odd, "single <= 0.1") == [0]
    assert chosen(odd, "single > 1e300") == []
    assert chosen(odd, "single == 1e999") == [2]


def test_a_condition_may_run_over_lines(store):
    one = chosen(store, "tissue == 'lung' and n_open > 1")
    assert chosen(store, "\n  tissue == 'lung'  # a comment\n  and n_open > 1\n") == one


def test_long_conditions_are_computed(store):
    listed = ", ".join(repr(f"a{i}") for i in range(20_000))
    assert chosen(store, f"barcode in [{listed}]") == list(range(40))
    assert chosen(store, " or ".join(["n_open == 1"] * 20_000)) == chosen(store, "n_open == 1")
    assert chosen(store, " and ".join(["n_open == 1"] * 2000)) == chosen(store, "n_open == 1")
    assert chosen(store, "(" * 60 + "n_open == 1" + ")" * 60) == chosen(store, "n_open == 1")


def test_odd_escapes_do_not_warn(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(store, r"tissue == '\d'") == []


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


# What is refused


NOT_FOREIGN = (
    r'expected comparisons of obs columns, as tissue == .*; a column whose name is no word is field\("its'
)
REFUSED = {
    # What could run, or reach, something
    "__import__('os').system('touch x')": r"character 1: found __import__.*" + NOT_FOREIGN,
    "().__class__.__base__.__subclasses__()": NOT_FOREIGN,
    "tissue.str.len() > 3": r"character 1: found tissue.str.len\(\);",
    "tissue.value == 'lung'": r"character 1: found tissue.value;",
    "n_open > (lambda: 1)()": r"character 11: found lambda: 1|character 10: found",
    "lambda: 1": "found lambda: 1",
    "[x for x in n_open] == 1": r"found \[x for x in n_open\]",
    "{n_open: 1} == 1": "found {n_open: 1}",
    "f'{n_open}' == '1'": "character 1: found f'{n_open}'",
    "obs['n_open'] > 1": r"character 1: found obs\['n_open'\]",
    "(n_open := 1) == 1": "found n_open := 1",
    "await n_open": "found await n_open",
    "n_open > 1 if doublet else doublet": "found n_open > 1 if doublet else doublet",
    "n_open in [*barcode]": r"character 12: found \*barcode",
    "field(tissue) == 'a'": r"found field\(tissue\)",
    "field('tissue', 'n_open') == 'a'": r"found field\('tissue', 'n_open'\)",
    "field(name='tissue') == 'a'": r"found field\(name='tissue'\)",
    "open('/etc/passwd') == 'a'": "found open",
    # Arithmetic
    "n_open + 1 > 2": r"character 1: found n_open \+ 1",
    "n_open > 10**9": r"character 10: found 10\*\*9",
    "'a' * 10**9 == tissue": "character 1: found",
    "-n_open < 0": "found -n_open",
    # Operators of others
    "tissue == 'lung' & doublet": "character 11: found 'lung' & doublet; expected the word and; write and between",
    "doublet | doublet": "expected the word or; write or between comparisons",
    "~doublet": "found ~doublet; expected the word not; write not",
    "tissue = 'lung'": "character 8: found =; expected ==; write ==",
    "tissue === 'lung'": "character 10: found =; expected ==; write ==",
    "tissue == 'lung' AND n_open": "character 18: not understood",
    "tissue like 'lung'": "not understood",
    "import os": "not understood",
    "n_open > 1; n_open": "not understood",
    "(tissue == 'lung'": "was never closed",
    "tissue == 'lung": "character 11: not understood .unterminated string",
    "tissue ==": "not understood",
    "tissue == 'lung'\x00": "null bytes",
    "tissue == '\ud800'": r"surrogates",
    r"tissue == '\ud800'": "expected text of Unicode; write it without surrogates",
    # Types
    "tissue == 5": "character 11: found 5; column 'tissue' holds text; expected text; write it in quotes, as '5'",
    "tissue == -5": "found -5; column 'tissue' holds text; expected text; write it in quotes, as '5'",
    "tissue in ['lung', 5]": "character 20: found 5; column 'tissue' holds text",
    "tissue == True": "found True; column 'tissue' holds text",
    "n_open == '5'": "character 11: found '5'; column 'n_open' holds numbers; expected a number; leave out the quotes",
    "'5' == n_open": "character 1: found '5'; column 'n_open' holds numbers",
    "n_open in ['1']": "character 12: found '1'; column 'n_open' holds numbers",
    "n_open == True": "found True; column 'n_open' holds numbers; expected a number; write one",
    "n_open == -True": "found -True",
    "doublet == 1": "found 1; column 'doublet' holds truth values; expected True or False; write one of these",
    "doublet == 'True'": "column 'doublet' holds truth values; expected True or False",
    "doublet > False": "expected == or !=",
    "doublet > doublet": "expected == or !=",
    "tissue == n_open": "character 11: found n_open; it holds numbers and 'tissue' text; expected columns of one kind",
    "n_open == 1j": "found 1j",
    "tissue == b'lung'": "found b'lung'",
    "n_open == ...": r"found \.\.\.",
    f"n_open == {10**30}": "expected a number of at most 64 bits; write it as 1e30",
    "n_open == " + "9" * 5000: "not understood .Exceeds the limit",
    # None, lists, and what stands alone
    "tissue == None": "character 11: found None; expected a text, a number, True or False; write `is None`",
    "tissue in ['a', None]": "character 17: found None; .* write `is None`",
    "tissue is 'lung'": "expected `column is None` or `column is not None`; else use ==",
    "None is None": "expected `column is None`",
    "tissue in 'lung'": r"expected a list after `in`; write \['a', 'b'\]",
    "tissue in sample": "expected a list after `in`",
    "'lu' in tissue": r"character 1: found 'lu'; expected a column before `in`",
    "n_open == [1, 2]": "expected a text, a number, True or False; write one",
    "n_open": "found n_open; it holds numbers; expected a comparison; compare it",
    "tissue and doublet": "character 1: found tissue; it holds text; expected a comparison",
    "not n_open": "character 5: found n_open; it holds numbers",
    "True": "found True; .*; compare it with a column",
    "'lung'": "found 'lung'; .*; compare it with a column",
    "1 == 1": "found 1; .*; compare it with a column",
    "n_open == 1 and 'x'": "character 17: found 'x'",
    # Unknown columns
    "tisue == 'lung'": "character 1: found tisue; .*no obs column 'tisue'; there are barcode, doublet, n_open, samp",
    "tissue == lung": "character 11: found lung; .*no obs column 'lung'; .*; text is written in quotes",
    "n_open > 1 and field('cell type') == 'B'": r"character 16: found field\('cell type'\); .*no obs column 'cell t",
    "field('../X') == 1": "no obs column '../X'",
    "é == 1": "character 1: found é",
    "tissue == 'é' and tisue == 'é'": "character 19: found tisue",
    "tissue == 'lung'\n and tisue == 'x'": "line 2, character 6: found tisue",
    "(tissue == 'lung'\n and tisue == 'x')": "line 2, character 6: found tisue",
    "tisue == 'lung'\n and doublet": "line 1, character 1: found tisue",
    # Size
    "": "found no text; expected comparisons",
    " \n ": "found no text",
    "not " * 150 + "doublet": "nested more than 100 deep",
    "not " * 10_000 + "doublet": "cannot be read|nested more than 100 deep",
    "(" * 1000 + "doublet" + ")" * 1000: "not understood .too many nested parentheses",
    "-" * 200_000 + "1 == n_open": "cannot be read|nested more",
    "n_open" + ".a" * 200_000: "cannot be read|nested more|found n_open",
    "n_open == 1 " + " " * 10**6 + "or doublet": "found 1,000,022 characters, expected at most 1,000,000",
    # No cells
    "tissue == 'Lung'": "holds for none of 110 cells; 'tissue' holds '', 'gut', .*; ask for what is there",
    "n_open > 4 and score > 99": "none of 110 cells; 'n_open' is 0 to 4; 'score' is -1.5 to 1.5; ask for",
    "barcode == 'z'": "'barcode' holds 'a0', 'a1', 'a2', 'a3', 'a4' and more; ask",
    "n_open in []": "holds for none",
}


@pytest.mark.parametrize(("where", "message"), REFUSED.items(), ids=[ascii(where[:30]) for where in REFUSED])
def test_what_is_no_condition_is_an_input_error_that_says_what_to_do(store, where, message):
    with pytest.raises(InputError, match=f"^where.*({message})") as raised:
        cells_where(store, where)
    said = str(raised.value)
    assert "\n" not in said
    assert len(said) < 900
    said.encode()
    assert isinstance(raised.value.__cause__, InputError | None)


@given(text=st.text(max_size=30) | st.text("tisue=<>!'\"()[],0159.- andornotiN_\n#\\{}fb:*", max_size=40))
def test_no_text_gives_anything_but_cells_or_an_input_error(store, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen_or_refused(store, text)


def chosen_or_refused(store, text):
    try:
        assert len(cells_where(store, text))
    except InputError as refused:
        error = refused
    else:
        return
    assert str(error).startswith("where")
    assert "\n" not in str(error)


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
