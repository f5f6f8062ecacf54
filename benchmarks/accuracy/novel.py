"""Novelty: how far a cell is from the types that a model knows, and how well that tells types that were left out.

Every score is larger for a cell that is less like the known ones. ``SCORES`` is all that the experiments call.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

NEIGHBOURS = 10
FALSE_RATE = 0.05
"""Share of known cells that is to be called novel."""

Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class States:
    """What a model says of some cells: logits [n, types], embeddings [n, channels]; of training cells, types [n]."""

    logits: Floats
    embeddings: Floats
    types: NDArray[np.str_] | None = None


def max_probability(known: States, asked: States) -> Floats:
    """The paper's rule: one less the largest probability."""
    return 1 - softmax(asked.logits.astype(np.float64), axis=1).max(axis=1)


def energy(known: States, asked: States) -> Floats:
    """Free energy, less the log of the sum of the exponentials of the logits (Liu et al., NeurIPS 2020)."""
    found: Floats = -logsumexp(asked.logits.astype(np.float64), axis=1)
    return found


def mahalanobis(known: States, asked: States) -> Floats:
    """Squared distance to the nearest mean of a type, one covariance for all, shrunk (Lee et al., NeurIPS 2018)."""
    assert known.types is not None
    types = np.unique(known.types)
    means = np.stack([known.embeddings[known.types == name].mean(axis=0) for name in types])
    centred = known.embeddings - means[np.searchsorted(types, known.types)]
    inverse = LedoitWolf(assume_centered=True).fit(centred).precision_
    away = asked.embeddings[:, None, :] - means[None]
    found: Floats = np.einsum("nkc,cd,nkd->nk", away, inverse, away).min(axis=1)
    return found


def neighbours(known: States, asked: States) -> Floats:
    """Mean distance to the nearest training cells, embeddings scaled to length 1 (Sun et al., ICML 2022)."""
    unit = [_unit(states.embeddings) for states in (known, asked)]
    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(unit[0]))).fit(unit[0])
    found: Floats = search.kneighbors(unit[1])[0].mean(axis=1)
    return found


SCORES: Mapping[str, Callable[[States, States], Floats]] = {
    "max probability": max_probability,
    "energy": energy,
    "Mahalanobis": mahalanobis,
    "kNN": neighbours,
}


def told_apart(known: Floats, novel: Floats) -> dict[str, float]:
    """AUROC of novel against known cells, and the share of the known that is called novel where 95% of the novel are.

    known, novel: scores [n]
    """
    is_novel = np.repeat([0, 1], [len(known), len(novel)])
    threshold = np.quantile(novel, 0.05, method="lower")
    return {
        "auroc": float(roc_auc_score(is_novel, np.concatenate([known, novel]))),
        "fpr95": float(np.mean(known >= threshold)),
    }


def false_share(held_out: Floats, known: Floats) -> float:
    """Share of known cells above the threshold that a share FALSE_RATE of held-out cells of known types is above."""
    return float(np.mean(known > np.quantile(held_out, 1 - FALSE_RATE, method="higher")))


def _unit(z: Floats) -> Floats:
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
