"""Labels as text equal a plain reading, value by value."""

import io
import math
import re
import unicodedata
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.ingest.tables import typed
from annatac_scale.model.labels import NOVEL, OWN_LABELS, label_texts

VALUES = st.one_of(
    st.none(),
    st.just(math.nan),
    st.just(pd.NA),
    st.text(max_size=6),
    st.text(st.sampled_from("a \t\n\u00a0\u0301é"), max_size=4),
    st.sampled_from(
        [
            "NA",
            " nan ",
            "NaN",
            "<NA>",
            "None",
            "none",
            "Na",
            "x" * 5000,
            "細胞",
            "T\tcell",
            "a|b",
            "3.0",
            "-0.0",
        ]
    ),
    st.integers(-(10**6), 10**6),
    st.floats(-(10**6), 10**6).map(lambda x: round(x, 2)),
    st.booleans(),
)


def text_of(value: Any) -> str:
    """The rule, in words of its own."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value == int(value):
        return str(int(value))
    text = unicodedata.normalize("NFC", str(value)).strip()
    if re.fullmatch(r"-?(0|[1-9][0-9]*)\.0", text):
        return str(int(text[:-2]))
    return "" if text in {"NA", "NaN", "nan", "<NA>", "None"} else text


@given(st.lists(VALUES, max_size=20))
def test_each_label_is_read_by_itself_whatever_stands_beside_it(values: list[Any]) -> None:
    # 1, 1.0 and True are equal in Python, and True has a text of its own all the same.
    assert label_texts(pd.Series(values, dtype=object)).tolist() == [text_of(value) for value in values]


@given(st.lists(VALUES, max_size=20))
def test_reading_twice_is_reading_once(values: list[Any]) -> None:
    once = label_texts(pd.Series(values, dtype=object))
    assert label_texts(once).tolist() == once.tolist()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pd.Categorical(["b", None, " a"], ["unused", " a", "a", "b"]), ["b", "", "a"]),
        (pd.Categorical([2.0, np.nan], [1.0, 2.0]), ["2", ""]),
        (pd.array([True, None, False], "boolean"), ["True", "", "False"]),
        (pd.array([3, None], "Int64"), ["3", ""]),
        (pd.array([3.5, None, 4.0], "Float64"), ["3.5", "", "4"]),
        (pd.array(["x", None], "string"), ["x", ""]),
        (np.array([b"astro", b"caf\xc3\xa9"]), ["astro", "café"]),
        (np.array([1.0, np.nan, -0.0, 2.5]), ["1", "", "0", "2.5"]),
        (np.array([True, False]), ["True", "False"]),
        (np.array([3, 4], np.int8), ["3", "4"]),
        (pd.Series([True, 1, 1.0, 0, False], dtype=object), ["True", "1", "1", "0", "False"]),
        ([pd.NaT, None, np.nan], ["", "", ""]),
        ([], []),
    ],
    ids=str,
)
def test_labels_of_every_kind_of_column_are_texts(labels: Any, expected: list[str]) -> None:
    found = label_texts(labels)
    assert (found.dtype, found.tolist()) == (object, expected)


def test_labels_that_look_alike_are_one() -> None:
    assert set(label_texts(["caf\u00e9", "cafe\u0301", " café\u00a0"])) == {"café"}


@pytest.mark.parametrize("missing", ["", " ", "NA", "NaN", "nan"])
def test_what_a_table_holds_for_a_missing_value_is_missing_in_an_array_too(missing: str) -> None:
    assert typed(pd.Series([missing.strip(), "x"], dtype=object)).isna().tolist() == [True, False]
    assert label_texts([missing, "x"]).tolist() == ["", "x"]


@pytest.mark.parametrize(
    "values", [[3.0, -1.0, 0.0, 10.0], [0.5, 1.0, 1e-05, 2.25], [1e15, 1e16, 1e22, -1e17]]
)
def test_the_texts_of_a_column_of_floats_are_read_as_the_floats_are(values: list[float]) -> None:
    column = pd.Series(values)
    written = pd.read_csv(io.StringIO(column.to_csv(index=False)), dtype=str).iloc[:, 0]
    for texts in (written, column.astype(str)):
        assert label_texts(texts).tolist() == label_texts(column).tolist()


@pytest.mark.parametrize(
    "text", ["1e1", "03.0", "3.00", "+3.0", "3.", ".0", "1_0.0", "inf", "\u0663.0", "v3.0"]
)
def test_texts_that_write_a_number_in_another_way_stay_what_they_are(text: str) -> None:
    assert label_texts([text, "10"]).tolist() == [text, "10"]


def test_the_labels_of_prediction_are_known() -> None:
    assert NOVEL in OWN_LABELS
