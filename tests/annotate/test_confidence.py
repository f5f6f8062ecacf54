"""What is asked for and what the model offers become one rule, or a refusal that says what to do."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_atlas import NOVEL_THRESHOLD, small_known, small_model

from annatac_scale.annotate.confidence import (
    LOW_DEPTH,
    NOVEL,
    ConfidenceOptions,
    ConfidenceRule,
    few_for_sets,
    named,
)
from annatac_scale.errors import ConfigError, ModelError
from annatac_scale.model.folder import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model that keeps the scores of 60 calib cells."""
    return replace(small_model(tmp_path_factory.mktemp("model") / "model"), known=small_known(60))


def rule_of(model: Model, **options: Any) -> ConfidenceRule:
    return ConfidenceRule.of(model, ConfidenceOptions(**options))


def test_labels_are_best_types_novel_or_of_low_depth() -> None:
    found = named(["B", "T", "T"], [False, True, False], [False, False, True])
    assert found.tolist() == ["B", NOVEL, LOW_DEPTH]
    assert named([], [], []).tolist() == []


def test_by_default_the_threshold_of_the_model_decides(model: Model) -> None:
    rule = rule_of(model)
    assert (rule.novelty, rule.novel_threshold, rule.novel_rate) == ("max_probability", NOVEL_THRESHOLD, None)
    assert (rule.coverage, rule.coverage_per_class, rule.novel_adapt, rule.min_open) == (0.9, True, False, 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"novel_threshold": 0.3}, ("max_probability", 0.3, None)),
        ({"novel_threshold": 0, "novelty": "max_probability"}, ("max_probability", 0.0, None)),
        ({"novel_rate": 0.1}, ("max_probability", None, 0.1)),
        ({"novelty": "knn"}, ("knn", None, 0.05)),
        ({"novelty": "energy", "novel_rate": 0.2}, ("energy", None, 0.2)),
    ],
)
def test_options_go_over_the_models_own_rule(
    model: Model, options: dict[str, Any], expected: tuple[str, float | None, float | None]
) -> None:
    rule = rule_of(model, **options)
    assert (rule.novelty, rule.novel_threshold, rule.novel_rate) == expected


def test_a_models_own_rate_is_taken_unless_another_is_given(model: Model) -> None:
    info = replace(model.info, novelty="mahalanobis", novel_rate=0.1)
    own = replace(model, info=info)
    assert (rule_of(own).novelty, rule_of(own).novel_rate) == ("mahalanobis", 0.1)
    assert (rule_of(own, novel_rate=0.3).novelty, rule_of(own, novel_rate=0.3).novel_rate) == (
        "mahalanobis",
        0.3,
    )
    assert rule_of(own, novelty="knn").novel_rate == 0.1
    threshold = rule_of(own, novel_threshold=0.4)
    assert (threshold.novelty, threshold.novel_threshold, threshold.novel_rate) == (
        "max_probability",
        0.4,
        None,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"novel_threshold": 1.1}, "novel threshold: found"),
        ({"novel_threshold": float("nan")}, "novel threshold: found"),
        ({"novel_threshold": 0.5, "novel_rate": 0.1}, "--novel-threshold 0.5 .*--novel-rate was given too"),
        ({"novel_threshold": 0.5, "novelty": "knn"}, "--novel-threshold 0.5 .*--novelty knn was given too"),
        ({"novelty": "entropy"}, "novelty score: found 'entropy', expected max_probability, energy"),
        ({"coverage": 1.0}, "share of cells: found 1.0"),
        ({"novel_rate": 0.0}, "share of cells: found 0.0"),
        ({"min_open": -1}, "--min-open: found -1"),
        ({"novel_adapt": True}, "--novel-adapt: found the novelty score max_probability and a threshold"),
        (
            {"novel_adapt": True, "novelty": "energy"},
            "--novel-adapt: found the novelty score energy; expected",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule_of(model, **options)


def test_without_calib_cells_there_is_the_threshold_and_nothing_else(model: Model) -> None:
    for known in (None, small_known(0)):
        without = replace(model, known=known)
        assert rule_of(without).coverage is None
        assert rule_of(without, novel_threshold=0.2).novel_threshold == 0.2
        for options in (
            {"coverage": 0.8},
            {"novelty": "knn"},
            {"novel_rate": 0.1},
        ):
            with pytest.raises(
                ModelError, match=r"keeps no scores of calib cells.*calibration_share above 0"
            ):
                rule_of(without, **options)


def test_a_rate_that_is_too_rare_for_the_calib_cells_is_refused(model: Model) -> None:
    assert rule_of(replace(model, known=small_known(19)), novel_rate=0.05).novel_rate == 0.05
    with pytest.raises(ModelError, match="the scores of 18 calib cells, expected at least 19"):
        rule_of(replace(model, known=small_known(18)), novel_rate=0.05)
    assert rule_of(replace(model, known=small_known(3)), novel_rate=0.3).novel_rate == 0.3
    with pytest.raises(
        ModelError, match="the scores of 2 calib cells, expected at least 3"
    ):  # 1 / 0.3 - 1 is 2.3
        rule_of(replace(model, known=small_known(2)), novel_rate=0.3)


def test_a_coverage_that_the_calib_cells_are_too_few_for_is_refused(model: Model) -> None:
    assert rule_of(model, coverage=0.98).coverage == 0.98
    with pytest.raises(
        ModelError,
        match=r"--coverage 0\.99: .* 60 calib cells, expected at least 99 .* ask for a lower coverage",
    ):
        rule_of(model, coverage=0.99)
    assert rule_of(replace(model, known=small_known(9)), coverage=0.9).coverage == 0.9
    with pytest.raises(ModelError, match="the scores of 8 calib cells, expected at least 9"):
        rule_of(replace(model, known=small_known(8)), coverage=0.9)
    known = replace(small_known(60), n_open=np.repeat([4, 5], [52, 8]).astype(np.int32))
    with pytest.raises(
        ModelError, match=r"of 8 calib cells with at least 5 open .* ask for a lower --min-open, a"
    ):
        rule_of(replace(model, known=known), coverage=0.9, min_open=5)


def test_a_default_coverage_that_the_calib_cells_are_too_few_for_is_taken_and_said(model: Model) -> None:
    for n_calib in (0, 9, 60):
        enough = replace(model, known=small_known(n_calib))
        assert few_for_sets(enough, rule_of(enough)) == ""
    few = replace(model, known=small_known(8))
    assert rule_of(few).coverage == 0.9
    assert few_for_sets(few, rule_of(few)).endswith(
        "keeps the scores of 8 calib cells, expected at least 9 to leave a type out of a set; every set holds all types"
    )
    known = replace(small_known(60), n_open=np.full(60, 3, np.int32))
    shallow = replace(model, known=known)
    assert "0 calib cells with at least 4 open islands" in few_for_sets(shallow, rule_of(shallow, min_open=4))


def test_calib_cells_of_low_depth_do_not_count_for_a_rate(model: Model) -> None:
    known = replace(small_known(60), n_open=np.repeat([4, 5], [41, 19]).astype(np.int32))
    assert rule_of(replace(model, known=known), novel_rate=0.05, min_open=5).novel_rate == 0.05
    with pytest.raises(
        ModelError,
        match=r"of 19 calib cells with at least 5 open islands, expected at least 99.* ask for a lower --min-open",
    ):
        rule_of(replace(model, known=known), novel_rate=0.01, min_open=5)


@pytest.mark.parametrize("novelty", ["mahalanobis", "knn", "profile", "joint"])
def test_scores_that_shift_with_a_sample_can_be_adapted_to_it(model: Model, novelty: str) -> None:
    rule = rule_of(model, novel_adapt=True, novelty=novelty)
    assert (rule.novel_adapt, rule.novelty, rule.novel_rate) == (True, novelty, 0.05)


def test_the_rule_says_in_words_what_makes_a_cell_novel(model: Model) -> None:
    assert rule_of(model, novel_threshold=0.25).novel_means == "below the novel threshold 0.25"
    assert rule_of(model, novelty="knn").novel_means == "past the knn score that 0.05 of known cells pass"
