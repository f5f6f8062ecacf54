"""Networks without an encoder: scikit-learn's MLP (the paper's feed-forward network) and the CNN head (its CNN)."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from baselines import ROWS, Predicted, inner_folds
from numpy.typing import NDArray
from protocol import Problem, Texts
from scipy import sparse
from sets import Ints
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import f1_score
from sklearn.neural_network import MLPClassifier
from torch import nn
from torch.nn import functional

from annatac_scale.baseline import Tuned
from annatac_scale.model.heads import CnnHead
from annatac_scale.store.schema import N_LEVELS

HIDDEN = 128
EPOCHS, FEWEST_STEPS, BATCH_CELLS, RATE = 12, 300, 64, 1e-3
LEVEL_CHANNELS = 8

Chances = NDArray[np.float64]
Candidate = Callable[[Ints, Ints], tuple[Chances, tuple[str, ...]]]
"""Fits on the first cells, gives chances [n, classes] of the second, and the classes."""


def chosen(
    candidates: Mapping[str, Candidate], types: Texts, train: Ints, test: Ints, n_folds: int = 1
) -> Predicted:
    """The candidate with the best macro F1 over some inner folds of the training cells, fitted on all of these."""
    names = list(candidates)
    best = names[0]
    if len(names) > 1:
        folds = inner_folds(types[train])[:n_folds]
        best = max(names, key=lambda name: _score(candidates[name], types, train, folds))
    chances, classes = candidates[best](train, test)
    told = np.array(classes)[chances.argmax(axis=1)]
    return Predicted(told, Tuned(best, 0.0, None), chances, classes)


def _score(candidate: Candidate, types: Texts, train: Ints, folds: list[tuple[Ints, Ints]]) -> float:
    truth, told = [], []
    for inner, outer in folds:
        chances, classes = candidate(train[inner], train[outer])
        truth.append(types[train[outer]])
        told.append(np.array(classes)[chances.argmax(axis=1)])
    return float(f1_score(np.concatenate(truth), np.concatenate(told), average="macro"))


def mlp(problem: Problem, quick: bool = False) -> Predicted:
    """scikit-learn's MLP: values and penalty chosen on one inner fold; a tenth of its cells stops its training."""

    def fitted(cells: Ints, asked: Ints, values: str, alpha: float) -> tuple[Chances, tuple[str, ...]]:
        rows = ROWS[values](problem.levels, cells)
        # Of a tenth that is to hold each type; without it a type of few cells stops the fit with an error.
        stops = np.unique(problem.types[cells], return_counts=True)[1].min() >= 10
        model = MLPClassifier(
            (HIDDEN,),
            alpha=alpha,
            batch_size=min(BATCH_CELLS, len(cells)),
            early_stopping=bool(stops),
            n_iter_no_change=5,
            max_iter=5 if quick else 40,
            random_state=problem.seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(rows[cells], problem.types[cells])
        return model.predict_proba(rows[asked]), tuple(model.classes_)

    grid = [("idf", 1e-2)] if quick else [(v, a) for v in ("log", "idf") for a in (1e-4, 1e-2)]
    candidates = {f"{v}, alpha {a:g}": partial(fitted, values=v, alpha=a) for v, a in grid}
    return chosen(candidates, problem.types, problem.train, problem.test)


def cnn(problem: Problem, quick: bool = False) -> Predicted:
    """The CNN head on the levels alone: a learned vector of each level in the place of the encoder's state."""

    def fitted(cells: Ints, asked: Ints, dropout: float) -> tuple[Chances, tuple[str, ...]]:
        return _fit_cnn(problem, cells, asked, dropout, quick)

    candidates = {
        f"island dropout {d:g}": partial(fitted, dropout=d) for d in ((0.5,) if quick else (0.0, 0.5))
    }
    return chosen(candidates, problem.types, problem.train, problem.test)


def _fit_cnn(
    problem: Problem, cells: Ints, asked: Ints, dropout: float, quick: bool
) -> tuple[Chances, tuple[str, ...]]:
    classes, codes = np.unique(problem.types[cells], return_inverse=True)
    torch.manual_seed(problem.seed)
    rng = np.random.default_rng(problem.seed)
    levels = sparse.csr_matrix(problem.levels)
    open_per_cell = float(np.diff(levels.indptr)[cells].mean())
    vectors = nn.Embedding(N_LEVELS + 1, LEVEL_CHANNELS)
    head = CnnHead(levels.shape[1], LEVEL_CHANNELS, len(classes), tokens_per_cell=open_per_cell)
    weights = torch.from_numpy(len(codes) / (len(classes) * np.bincount(codes))).float()
    steps_an_epoch = -(-len(cells) // BATCH_CELLS)
    epochs = 2 if quick else max(EPOCHS, -(-FEWEST_STEPS // steps_an_epoch))
    parameters = [*vectors.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_an_epoch)
    for _ in range(epochs):
        order = rng.permutation(len(cells))
        for at in np.array_split(order, steps_an_epoch):
            logits = _logits(vectors, head, levels[cells[at]], rng if dropout else None, dropout)
            loss = functional.cross_entropy(logits, torch.from_numpy(codes[at]), weights)
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        parts = [
            _logits(vectors, head, levels[part]) for part in np.array_split(asked, -(-len(asked) // 512))
        ]
    return torch.cat(parts).softmax(1).double().numpy(), tuple(classes)


def _logits(
    vectors: nn.Embedding,
    head: CnnHead,
    rows: sparse.csr_matrix,
    rng: np.random.Generator | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Logits of the cells of some rows; with ``rng``, a share ``dropout`` of their open islands left out."""
    if rng is not None:
        rows = sparse.csr_matrix(rows, copy=True)
        rows.data[rng.random(rows.nnz) < dropout] = 0
        rows.eliminate_zeros()
    scalars = head.filter(vectors(torch.from_numpy(rows.data.astype(np.int64)))).squeeze(-1).relu()
    # The head's own sum over open islands as a product: some thousands of a cell's tens of thousands of islands are
    # open, so that it takes a fifth of the time.
    cells = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    at = torch.from_numpy(cells), torch.from_numpy(rows.indices.astype(np.int64))
    x = torch.zeros(rows.shape).index_put(at, scalars) @ head.table
    x = (head.expand(x) + head.bias).relu()
    for layer in head.layers:
        x = layer(x).relu()
    logits: torch.Tensor = head.classifier(x)
    return logits
