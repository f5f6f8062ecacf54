"""Figures by group are those of each group alone, and their intervals those of plain draws of whole groups."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score

import annatac_scale as ats
from annatac_scale.annotate.by_group import FEWEST_GROUPS, ByGroup
from annatac_scale.errors import InputError

TYPES = np.array(["B", "T", "NK", "Mono"], object)


def drawn(n_groups: int, seed: int = 0, size: int = 60) -> tuple[np.ndarray, ...]:
    """Groups, truth and two sets of labels, of which the first is right more often in some groups than in others."""
    rng = np.random.default_rng(seed)
    groups = np.repeat([f"d{i}" for i in range(n_groups)], size + 10 * np.arange(n_groups)).astype(object)
    truth = TYPES[rng.integers(0, 3, len(groups))]
    right = rng.random(len(groups)) < np.repeat(
        rng.uniform(0.4, 1, n_groups), size + 10 * np.arange(n_groups)
    )
    first = np.where(right, truth, TYPES[rng.integers(0, 4, len(groups))])
    second = np.where(rng.random(len(groups)) < 0.6, truth, "Novel_cell_type").astype(object)
    return groups, truth, first, second


def macro_f1(truth: np.ndarray, label: np.ndarray) -> float:
    return f1_score(truth, label, labels=sorted(set(truth)), average="macro", zero_division=0)


def test_each_row_holds_the_figures_of_a_group_alone() -> None:
    groups, truth, first, second = drawn(3)
    found = ByGroup.of("donor", groups, truth, first, second).table
    assert found["group"].tolist() == ["d0", "d1", "d2"]
    assert found["n_cells"].tolist() == [60, 70, 80]
    for row in found.itertuples():
        own = groups == row.group
        assert row.accuracy == pytest.approx(accuracy_score(truth[own], first[own]))
        assert row.macro_f1 == pytest.approx(macro_f1(truth[own], first[own]))
        assert row.other_accuracy == pytest.approx(accuracy_score(truth[own], second[own]))
        assert row.other_macro_f1 == pytest.approx(macro_f1(truth[own], second[own]))
    assert list(ByGroup.of("donor", groups, truth, first).table) == [
        "group",
        "n_cells",
        "accuracy",
        "macro_f1",
    ]


def test_intervals_are_those_of_drawing_whole_groups_and_differences_pair_them() -> None:
    groups, truth, first, second = drawn(8)
    found = ByGroup.of("donor", groups, truth, first, second)
    rng = np.random.default_rng(1)
    cells = [np.flatnonzero(groups == name) for name in sorted(set(groups))]
    loops: dict[str, list[float]] = {"accuracy": [], "macro_f1": [], "less": [], "less_f1": []}
    for _ in range(300):
        own = np.concatenate([cells[i] for i in rng.integers(0, len(cells), len(cells))])
        loops["accuracy"].append((first[own] == truth[own]).mean())
        loops["less"].append(loops["accuracy"][-1] - (second[own] == truth[own]).mean())
        loops["macro_f1"].append(macro_f1(truth[own], first[own]))
        loops["less_f1"].append(loops["macro_f1"][-1] - macro_f1(truth[own], second[own]))
    told = {
        **found.intervals,
        "less": found.differences["accuracy"],
        "less_f1": found.differences["macro_f1"],
    }
    for name, draws in loops.items():
        expected = np.quantile(draws, [0.025, 0.975])
        assert tuple(told[name]) == pytest.approx(expected, abs=0.25 * np.ptp(expected) / 2), name
    again = ByGroup.of("donor", groups, truth, first, second)
    assert again.to_dict() == found.to_dict()


def test_of_alike_groups_intervals_are_as_narrow_as_over_cells_and_of_unlike_ones_wider() -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat([f"d{i}" for i in range(10)], 200).astype(object)
    truth = TYPES[rng.integers(0, 3, 2000)]
    alike = np.where(rng.random(2000) < 0.8, truth, "x").astype(object)
    unlike = np.where(rng.random(2000) < np.repeat(np.linspace(0.6, 1, 10), 200), truth, "x").astype(object)
    widths = [
        np.ptp(ByGroup.of("d", groups, truth, label).intervals["accuracy"]) for label in (alike, unlike)
    ]
    assert widths[0] < 0.06 < 0.12 < widths[1]


def test_few_groups_have_figures_and_no_interval_and_say_so() -> None:
    groups, truth, first, _ = drawn(FEWEST_GROUPS - 1)
    found = ByGroup.of("donor", groups, truth, first)
    assert found.intervals == found.differences == {}
    assert f"{FEWEST_GROUPS - 1} groups: an interval over groups takes {FEWEST_GROUPS}" in found.text()[-1]
    assert ByGroup.of("donor", *drawn(FEWEST_GROUPS)[:3]).intervals.keys() == {"accuracy", "macro_f1"}


def test_cells_without_a_group_are_counted_and_in_no_row() -> None:
    groups, truth, first, _ = drawn(3)
    groups[:25] = ""
    found = ByGroup.of("donor", groups, truth, first)
    assert (found.n_without, found.table["n_cells"].tolist()) == (25, [35, 70, 80])
    assert "25 cells without a donor are in no row" in found.text()
    with pytest.raises(InputError, match="--group donor: found no value of it in any of 210 evaluated cells"):
        ByGroup.of("donor", np.full(210, "", object), truth, first)


def test_a_column_that_tells_every_cell_apart_is_no_column_of_groups() -> None:
    _, truth, first, _ = drawn(3)
    barcodes = np.array([f"c{i}" for i in range(len(truth))], object)
    with pytest.raises(
        InputError, match="--group barcode: found 210 values among 210 evaluated cells, expected"
    ):
        ByGroup.of("barcode", barcodes, truth, first)


def test_evaluate_takes_groups_from_beside_the_truth_for_the_cells_that_are_compared(tmp_path: Path) -> None:
    groups, truth, first, second = drawn(6)
    barcodes = [f"c{i}" for i in range(len(truth))]
    given = pd.DataFrame({"barcode": barcodes, "kind": truth, "donor": groups})
    given.loc[3, "kind"] = None
    given.sample(frac=1, random_state=0).to_csv(tmp_path / "truth.csv", index=False)
    labels = pd.DataFrame({"barcode": barcodes, "first": first, "second": second}).iloc[7:]
    labels.to_csv(tmp_path / "labels.tsv", sep="\t", index=False)
    report = ats.evaluate(
        tmp_path / "labels.tsv",
        truth="kind",
        truth_file=tmp_path / "truth.csv",
        labels_column="first",
        against=tmp_path / "labels.tsv",
        against_column="second",
        group="donor",
    )
    expected = ByGroup.of("donor", groups[7:], truth[7:], first[7:], second[7:])
    assert report.by_group is not None
    assert report.by_group.to_dict() == expected.to_dict()
    assert report.to_dict()["by_group"] == expected.to_dict()
    assert "\n".join(expected.text()) in "\n".join(report.text())
    without = ats.evaluate(
        tmp_path / "labels.tsv", truth="kind", truth_file=tmp_path / "truth.csv", labels_column="first"
    )
    assert without.by_group is None
    assert without.to_dict()["by_group"] is None
    with pytest.raises(InputError, match="dono"):
        ats.evaluate(
            tmp_path / "labels.tsv",
            truth="kind",
            truth_file=tmp_path / "truth.csv",
            labels_column="first",
            group="dono",
        )
