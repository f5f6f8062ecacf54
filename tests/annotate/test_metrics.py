import json
import math
import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from annatac_scale.annotate.metrics import evaluate_labels
from annatac_scale.errors import InputError
from annatac_scale.model.labels import NOVEL

LABELS = ["A", "B", "C", "d e", NOVEL]
PAIRS = st.lists(st.tuples(st.sampled_from(LABELS[:4]), st.sampled_from(LABELS)), min_size=1, max_size=40)


def split(pairs: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [truth for truth, _ in pairs], [label for _, label in pairs]


@given(PAIRS)
def test_the_figures_equal_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    truth, label = split(pairs)
    found = evaluate_labels(truth, label)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kappa = sk.cohen_kappa_score(truth, label)
    types = sorted(set(truth))
    assert found.n_cells == len(pairs)
    assert found.accuracy == pytest.approx(sk.accuracy_score(truth, label))
    assert found.kappa == pytest.approx(kappa, nan_ok=True)
    assert found.macro_f1 == pytest.approx(
        sk.f1_score(truth, label, labels=types, average="macro", zero_division=0)
    )
    assert found.jaccard_micro == pytest.approx(sk.jaccard_score(truth, label, average="micro"))
    assert found.jaccard_weighted == pytest.approx(
        sk.jaccard_score(truth, label, average="weighted", zero_division=0)
    )
    precision, recall, f1, n = sk.precision_recall_fscore_support(truth, label, labels=types, zero_division=0)
    assert found.per_type["cell_type"].tolist() == types
    assert found.per_type["n"].tolist() == n.tolist()
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert found.per_type[name].to_numpy() == pytest.approx(expected)


@given(PAIRS)
def test_macro_f1_runs_over_the_types_of_the_truth_alone(pairs: list[tuple[str, str]]) -> None:
    scores = []
    for cell_type in {truth for truth, _ in pairs}:
        hits = sum(truth == label == cell_type for truth, label in pairs)
        missed = sum(truth == cell_type != label for truth, label in pairs)
        wrongly = sum(label == cell_type != truth for truth, label in pairs)
        scores.append(2 * hits / (2 * hits + missed + wrongly))
    assert evaluate_labels(*split(pairs)).macro_f1 == pytest.approx(sum(scores) / len(scores))


def test_a_novel_label_is_an_error_of_the_cells_own_type_and_no_class() -> None:
    found = evaluate_labels(["A", "A", "B", "B"], ["A", NOVEL, "B", "B"])
    # A: recall 1/2, precision 1, F1 2/3; B: 1. A third class would give 5/9.
    assert found.macro_f1 == pytest.approx((2 / 3 + 1) / 2)
    assert found.accuracy == 0.75
    assert found.per_type["cell_type"].tolist() == ["A", "B"]
    assert found.confusion.columns.tolist() == ["A", "B", NOVEL]


@given(PAIRS)
def test_the_confusion_table_counts_every_pair(pairs: list[tuple[str, str]]) -> None:
    confusion = evaluate_labels(*split(pairs)).confusion
    counted = {(t, p): int(confusion.loc[t, p]) for t in confusion.index for p in confusion.columns}
    assert {pair: n for pair, n in counted.items() if n} == Counter(pairs)
    assert (confusion.index.name, confusion.columns.name) == ("truth", "predicted")
    assert confusion.columns.tolist()[: len(confusion)] == confusion.index.tolist()


@pytest.mark.parametrize("missing", [None, np.nan, float("nan"), pd.NA, "", "  "])
def test_cells_without_a_truth_are_left_out_and_counted(missing: object) -> None:
    truth = pd.Series(["A", missing, "B", missing], dtype=object)
    found = evaluate_labels(truth, ["A", "B", "A", None])
    assert (found.n_cells, found.n_without_truth, found.accuracy) == (2, 2, 0.5)


def test_categories_arrays_and_text_columns_are_all_the_same() -> None:
    truth, label = ["A", "B", "A", None], ["A", "A", "A", "B"]
    expected = evaluate_labels(truth, label).to_dict()
    for kind in ("category", "string", object):
        columns = [pd.Series(values, dtype=kind, index=list("wxyz")) for values in (truth, label)]
        assert evaluate_labels(*columns).to_dict() == expected
    assert evaluate_labels(np.array(truth, object), np.array(label)).to_dict() == expected
    # A category that no cell has is no type.
    unused = pd.Series(pd.Categorical(truth, categories=["A", "B", "unused"]))
    assert evaluate_labels(unused, label).to_dict() == expected


def test_whole_numbers_are_labels_and_gaps_do_not_change_them() -> None:
    found = evaluate_labels(pd.Series([3, 10, None, 3]), ["3", "3", "3", "3"])
    assert found.per_type["cell_type"].tolist() == ["10", "3"]
    assert (found.accuracy, found.n_without_truth) == (pytest.approx(2 / 3), 1)
    assert evaluate_labels([3, 10], [3, 10]).accuracy == 1.0


def test_the_dictionary_survives_json_and_says_none_where_kappa_is_undefined() -> None:
    found = evaluate_labels(["A", "A"], ["A", "A"])
    assert math.isnan(found.kappa)
    figures = found.to_dict()
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["kappa"] is None
    figures = evaluate_labels(["A", "B", "B"], ["A", "A", NOVEL]).to_dict()
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["confusion"] == {
        "truth": ["A", "B"],
        "predicted": ["A", "B", NOVEL],
        "counts": [[1, 0, 0], [1, 0, 1]],
    }
    assert figures["per_type"][0] == {"cell_type": "A", "n": 1, "precision": 0.5, "recall": 1.0, "f1": 2 / 3}


def test_labels_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(InputError, match="2 true and 1 predicted labels"):
        evaluate_labels(["A", "B"], ["A"])
    with pytest.raises(InputError, match="no label in any of 2 cells"):
        evaluate_labels([None, ""], ["A", "A"])
    with pytest.raises(InputError, match="no label in any of 0 cells"):
        evaluate_labels([], [])
    with pytest.raises(InputError, match="found none for 1 cells"):
        evaluate_labels(["A", "B"], ["A", None])
