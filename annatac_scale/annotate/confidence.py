"""How far each label goes: what the user asked for, against what the model offers, as one rule."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from annatac_scale.errors import ConfigError, ModelError
from annatac_scale.model.conformal import DEFAULT_COVERAGE, fewest_calib, fewest_covering, rank_of
from annatac_scale.model.labels import LOW_DEPTH, NOVEL
from annatac_scale.model.novelty import PAPER_SCORE, SHIFTING, checked_score

if TYPE_CHECKING:
    from annatac_scale.model.folder import Model


DEFAULT_RATE = 0.05
"""Share of known cells called novel, where a score is asked for without a rate and the model has none."""


@dataclass(frozen=True)
class ConfidenceOptions:
    """What ``predict`` is asked for; None is the model's own.

    coverage: share of the cells whose prediction set holds the true type
    coverage_per_class: that share of the cells of each type, whatever the mixture of types; else of all cells together
    novelty: a score (model/novelty.py), without a rate 5% or the model's; novel_rate: share of known cells that the
        score, else the model's, may call novel; without either and without a rate of the model's its threshold decides
    novel_threshold: confidence below which a cell is novel, the paper's rule, in place of both; 0 calls none novel
    novel_adapt: take what the median score of each sample is above that of the calib cells off its scores; assumes that
        few of its cells are novel, and that its types are about as frequent as in the calib cells
    min_open: cells with fewer open islands are Unassigned_low_depth, and never novel; sets and rates go by calib cells
        that have as many
    """

    coverage: float | None = None
    coverage_per_class: bool = True
    novelty: str | None = None
    novel_rate: float | None = None
    novel_threshold: float | None = None
    novel_adapt: bool = False
    min_open: int = 0

    def __post_init__(self) -> None:
        if self.novelty is not None:
            checked_score(self.novelty)
        for share in (self.coverage, self.novel_rate):
            if share is not None:
                rank_of(0, share)
        if self.novel_threshold is not None:
            if not 0 <= self.novel_threshold <= 1:
                raise ConfigError(
                    f"novel threshold: found {self.novel_threshold}; expected a probability from 0 to 1; 0 names no "
                    "cell novel"
                )
            if self.novel_rate is not None or self.novelty not in (None, PAPER_SCORE):
                raise ConfigError(
                    f"--novel-threshold {self.novel_threshold:g} is a confidence, and "
                    f"{'--novel-rate' if self.novel_rate is not None else f'--novelty {self.novelty}'} was given too; "
                    "expected one of them"
                )
        if self.min_open < 0:
            raise ConfigError(f"--min-open: found {self.min_open}, expected at least 0")


@dataclass(frozen=True)
class ConfidenceRule:
    """What is done to every cell; it is kept in the manifest of the labels.

    coverage: None where the model has no calib cells
    novel_threshold: None where ``novel_rate`` decides, and the other way round
    """

    coverage: float | None
    coverage_per_class: bool
    novelty: str
    novel_rate: float | None
    novel_threshold: float | None
    novel_adapt: bool
    min_open: int

    @classmethod
    def of(cls, model: "Model", options: ConfidenceOptions) -> "ConfidenceRule":
        """The model's own rule with what was asked for over it.

        Raises ModelError where the model does not keep what that needs, as where its calib cells are too few for a rate
        or for a coverage that was asked for; ConfigError where options contradict each other.
        """
        info = model.info
        n_calib = 0 if model.known is None else model.known.n_calib
        coverage = options.coverage or (DEFAULT_COVERAGE if n_calib else None)
        if options.coverage:
            _check_coverage(model, options.min_open, options.coverage)
        novelty, rate, threshold = (
            options.novelty or info.novelty,
            options.novel_rate,
            options.novel_threshold,
        )
        if threshold is not None:
            novelty = PAPER_SCORE
        elif rate is None and options.novelty is None and info.novel_rate is None:
            novelty, threshold = PAPER_SCORE, info.novel_threshold
        elif rate is None:
            rate = info.novel_rate or DEFAULT_RATE
        if rate is not None:
            _check_rate(model, options.min_open, rate)
        if options.novel_adapt and (rate is None or novelty not in SHIFTING):
            raise ConfigError(
                f"--novel-adapt: found the novelty score {novelty}{'' if rate else ' and a threshold'}; expected "
                f"--novelty {' or '.join(SHIFTING)}: the other scores say how sure the model is, which does not shift "
                "with a sample alone"
            )
        return cls(
            coverage,
            options.coverage_per_class,
            novelty,
            rate,
            None if threshold is None else float(threshold),  # 0 and 0.0 are the same rule
            options.novel_adapt,
            options.min_open,
        )

    @property
    def novel_means(self) -> str:
        """What makes a cell novel, in words."""
        if self.novel_rate is None:
            return f"below the novel threshold {self.novel_threshold:g}"
        return f"past the {self.novelty} score that {self.novel_rate:.4g} of known cells pass"


def few_for_sets(model: "Model", rule: ConfidenceRule) -> str:
    """A sentence where the rule's calib cells are too few to leave any type out of a set; else empty."""
    if rule.coverage is None:
        return ""
    found = _shortage(model, rule.min_open, fewest_covering(rule.coverage))
    return (
        found
        and f"coverage {rule.coverage:g}: {found} to leave a type out of a set; every set holds all types"
    )


def _check_coverage(model: "Model", min_open: int, coverage: float) -> None:
    if model.known is None or not model.known.n_calib:
        raise ModelError(_no_calib(model, "--coverage"))
    if found := _shortage(model, min_open, fewest_covering(coverage)):
        raise ModelError(
            f"--coverage {coverage:g}: {found} to leave a type out of a set; ask for "
            f"{_lower(min_open)}a lower coverage or label more cells"
        )


def _check_rate(model: "Model", min_open: int, rate: float) -> None:
    if model.known is None or not model.known.n_calib:
        raise ModelError(_no_calib(model, "a novel rate"))
    if found := _shortage(model, min_open, fewest_calib(rate)):
        raise ModelError(
            f"--novel-rate {rate:g}: {found} to tell what is so rare; ask for {_lower(min_open)}a higher rate or label "
            "more cells"
        )


def _shortage(model: "Model", min_open: int, fewest: int) -> str:
    """What is found and expected where fewer calib cells than ``fewest`` are deep enough; else empty."""
    n_calib = 0 if model.known is None else model.known.of_depth(min_open).n_calib
    if n_calib >= fewest:
        return ""
    deep = f" with at least {min_open:,} open islands" if min_open else ""
    keeps = f"{model.path or 'the model'} keeps the scores of {n_calib:,} calib cells{deep}"
    return f"{keeps}, expected at least {fewest:,}"


def _lower(min_open: int) -> str:
    return "a lower --min-open, " if min_open else ""


def _no_calib(model: "Model", what: str) -> str:
    return (
        f"{what}: {model.path or 'the model'} keeps no scores of calib cells, expected some to take limits from; "
        "finetune it again with calibration_share above 0"
    )


def named(best: ArrayLike, novel: ArrayLike, low_depth: ArrayLike) -> NDArray[np.object_]:
    """The label of each cell: LOW_DEPTH, NOVEL or its best type, object [n].

    best: str [n]; novel, low_depth: bool [n], not both
    """
    labels = np.array(best, object)
    labels[np.asarray(novel, bool)] = NOVEL
    labels[np.asarray(low_depth, bool)] = LOW_DEPTH
    return labels
