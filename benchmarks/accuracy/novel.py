"""Novelty: how well the package's scores (model/novelty.py) tell the cells of a type that was left out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from annatac_scale.annotate.reliability import novelty_figures
from annatac_scale.model.calibration import probabilities
from annatac_scale.model.conformal import exceeds
from annatac_scale.model.novelty import SCORES, SPREADING, TRENDED, DepthTrend, KnownCells, Outputs
from annatac_scale.model.profiles import Profiles
from annatac_scale.train.confidence_fit import REFERENCES, means_and_whitening

FALSE_RATE = 0.05
"""Share of known cells that is to be called novel."""

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


def known_of(fit: Outputs, codes: Ints, profiles: Profiles, aside: Outputs) -> KnownCells:
    """What a fine-tuned model keeps, for a method that only gives logits and embeddings.

    fit, codes: the training cells and their types, 0 to C - 1, in the order in which they are to be stored
    profiles: of the training cells
    aside: cells that did not train, whose scores tell the depth trends
    """
    means, whitening = means_and_whitening(fit.embedding, codes, int(codes.max()) + 1)
    stored = np.concatenate([np.flatnonzero(codes == code)[:REFERENCES] for code in np.unique(codes)])
    none, no_codes = np.empty(0, np.float32), np.empty(0, np.int32)
    references = fit.embedding[stored], codes[stored].astype(np.int32)
    known = KnownCells(means, whitening, *references, profiles, {}, none, no_codes, {}, no_codes)
    trends = {
        name: DepthTrend.fit(known.raw(name, aside, 1.0), aside.n_open, name in SPREADING) for name in TRENDED
    }
    return replace(known, trends=trends)


def scores(
    known: KnownCells, asked: Outputs, names: Sequence[str] = SCORES, temperature: float = 1.0
) -> Mapping[str, Floats]:
    """Scores of some cells. temperature: that the logits are divided by"""
    chances = probabilities(asked.logits, temperature).astype(np.float32)
    return {name: known.score(name, asked, chances, temperature) for name in names}


def told_apart(held_out: Floats, like: Floats, known: Floats, novel: Floats) -> dict[str, float]:
    """Figures of one score of four lots of cells, the first three of known types.

    held_out: sets the threshold that a share FALSE_RATE of them is above; like: others of the same donors
    auroc, fpr95: of novel against known; false_within, false_share: like and known cells above the threshold;
    false_adapted: known cells above it where the asked cells' median is taken for usual, as ``--novel-adapt`` does
    """
    limits, asked = np.sort(held_out), np.concatenate([known, novel])
    shift = np.median(asked) - np.median(held_out)
    found = novelty_figures(asked, np.repeat([False, True], [len(known), len(novel)]))
    return {
        "auroc": found.auroc,
        "fpr95": found.fpr_at_95_tpr,
        "false_within": float(exceeds(like, limits, FALSE_RATE).mean()),
        "false_share": float(exceeds(known, limits, FALSE_RATE).mean()),
        "false_adapted": float(exceeds(known - shift, limits, FALSE_RATE).mean()),
    }
