"""The methods of the protocol that run in this environment: a problem and its parameters in, predicted types out."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from baselines import (
    Predicted,
    constant,
    neighbours,
    regression,
    svd_rows,
    tuned_on,
    unit_rows,
)
from models import Models
from networks import Candidate, chosen, cnn, mlp
from protocol import Problem, Relabelled
from sets import Ints

from annatac_scale.model.calibration import probabilities
from annatac_scale.model.folder import Model

LABELS = "protocol_label"
"""Column of the labels that a problem gives, in a store that fine-tuning reads."""
FEW_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""C for rows of length 1."""

Params = Mapping[str, Any]


def tell(problem: Problem, params: Params, models: Models) -> Predicted:
    """The types of the test cells by the method that ``params["how"]`` names."""
    ways: dict[str, Callable[[], Predicted]] = {
        "regression": lambda: regression(
            problem.levels, problem.types, problem.train, problem.test, params["values"]
        ),
        "svd": lambda: _on_components(problem, params),
        "mlp": lambda: mlp(problem, params.get("quick", False)),
        "cnn": lambda: cnn(problem, params.get("quick", False)),
        "frozen": lambda: _on_frozen(problem, params, models),
        "finetuned": lambda: _finetuned(problem, params, models),
    }
    if params["how"] in ("frozen", "finetuned"):  # which take their own time
        return ways[params["how"]]()
    with models.clock.on("fit and tell"):
        return ways[params["how"]]()


def _on_components(problem: Problem, params: Params) -> Predicted:
    """An SVD of the cells that may be seen; inner folds choose what stands on it."""
    rows = svd_rows(problem.levels, params["values"], np.setdiff1d(problem.seen, problem.train))
    if params["then"] == "neighbours":
        return neighbours(rows, problem.types, problem.train, problem.test)
    return tuned_on(rows, problem.types, problem.train, problem.test)


def _on_frozen(problem: Problem, params: Params, models: Models) -> Predicted:
    """Logistic regression on the vectors of a pretrained model that stays as it is."""
    model = models.pretrained(params["store"], params["select"], params["pretrain"], params["trained"])
    vectors = models.embedding(model, problem.store, np.arange(problem.store.n_cells))
    rows = {"vectors": constant(unit_rows(vectors, problem.seen))}
    with models.clock.on("fit and tell"):
        return tuned_on(rows, problem.types, problem.train, problem.test, FEW_STRENGTHS)


def _finetuned(problem: Problem, params: Params, models: Models) -> Predicted:
    """A model fine-tuned by the package; where several are given, three inner folds choose the settings."""

    def fitted(cells: Ints, asked: Ints, settings: Params) -> Any:
        model = tuned_model(problem, cells, settings, models)
        logits = models.states(model, problem.store, asked).logits
        return probabilities(logits, model.info.temperature), tuple(model.info.labels)

    candidates: dict[str, Candidate] = {
        name: partial(fitted, settings={**params, **settings})
        for name, settings in params["settings"].items()
    }
    return chosen(candidates, problem.types, problem.train, problem.test, n_folds=3)


def tuned_model(
    problem: Problem, cells: Ints, settings: Params, models: Models, log: list[dict[str, Any]] | None = None
) -> Model:
    """A model fine-tuned on the labels of some cells, all other labels out of its sight; log: gets its metrics."""
    start = models.pretrained(
        settings["store"], settings["select"], settings["pretrain"], settings["trained"]
    )
    own = np.where(np.isin(np.arange(len(problem.types)), cells), problem.types, "")
    store = Relabelled(problem.store, LABELS, own)
    return models.finetuned(store, start, LABELS, 0.0, settings["finetune"], log)
