"""Conditions as text: names, numbers and lengths of any kind are understood, and what is refused runs nothing."""

import warnings

import numpy as np
import pandas as pd
import pytest
from holed_stores import chosen, holed_store
from hypothesis import given
from hypothesis import strategies as st
from obs_stores import obs_store

from annatac_scale.errors import InputError
from annatac_scale.stream.where import cells_where

NAN = float("nan")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return holed_store(tmp_path_factory.mktemp("conditions") / "atlas.zarr")


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
