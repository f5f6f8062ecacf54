"""What each kind of row runs: its configuration in, its figures out. A row is a process of its own."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import baselines
import numpy as np
from baselines import Predicted
from models import Clock, Models
from numpy.typing import NDArray
from sets import DRAWS, PRETRAINING, SETS, TEST_DONOR, TRAIN_DONOR, Ints, Labelled, Stores, few_labels

from annatac_scale.annotate.metrics import evaluate_labels
from annatac_scale.store.store import IslandStore

Config = Mapping[str, Any]
Figures = dict[str, Any]
FEW_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""C for a few labelled cells in rows of length 1."""


def run(config: Config, stores: Stores, clock: Clock) -> Figures:
    """The figures of a row."""
    kinds: dict[str, Callable[[Config, Models], Figures]] = {
        "regression": _linear,
        "svd": _linear,
        "model": _model,
        "few": _few,
        "few_svd": _few_svd,
    }
    return kinds[config["kind"]](config, Models(stores, clock))


def _linear(config: Config, models: Models) -> Figures:
    """A linear bar, tuned on the training cells of each split."""
    data_set = SETS[config["set"]]
    labelled = Labelled.of(models.stores.open(config["set"], config["select"]), data_set, config["labels"])
    fit = {"svd": baselines.svd_regression, "regression": baselines.regression}[config["kind"]]
    figures: Figures = {"splits": {}, "chosen": {}}
    for value, train, test in labelled.splits(data_set):
        with models.clock.on("tune and fit"):
            done = fit(labelled.levels, labelled.types, train, test)
        figures["splits"][value] = _figures(labelled.types[test], done.types)
        figures["chosen"][value] = _shown(done)
    return figures


def _shown(done: Predicted) -> str:
    return f"{done.tuned.values}, C {done.tuned.strength:g}, weights {done.tuned.class_weight or 'none'}"


def _model(config: Config, models: Models) -> Figures:
    """Pretrained or not, fine-tuned on the training cells of one split."""
    start = models.pretrained(
        PRETRAINING[config["set"]], config["select"], config["pretrain"], config["trained"]
    )
    store = models.stores.open(config["set"], config["select"])
    column, value = SETS[config["set"]].holdout[0], config["holdout"]
    made = models.finetuned(store, start, config["labels"], f"{column}={value}", config["finetune"])
    obs = store.obs([config["labels"], column])
    test = np.flatnonzero(obs[column].to_numpy(str) == value)
    truth = obs[config["labels"]].to_numpy(str)[test]
    return {"splits": {value: _figures(truth, models.types(made, store, test))}}


def _figures(truth: NDArray[np.str_], predicted: NDArray[np.str_]) -> Figures:
    found = evaluate_labels(truth, predicted)
    return {
        "n_cells": found.n_cells,
        "accuracy": round(found.accuracy, 5),
        "macro_f1": round(found.macro_f1, 5),
    }


def _few(config: Config, models: Models) -> Figures:
    """Pretrained on unlabelled cells; ten labels a type: regression on frozen vectors, and fine-tuning."""
    model = models.pretrained(config["store"], "all", config["pretrain"], config["trained"])
    store = models.stores.open("granja", "all")
    figures: Figures = {}
    vectors = models.embedding(model, store, np.arange(store.n_cells))
    unlabelled = np.flatnonzero(store.obs(["donor"])["donor"].to_numpy(str) == TRAIN_DONOR)
    with models.clock.on("regression"):
        figures["frozen"] = _on_frozen(store, vectors, unlabelled)
    if config["finetune"]:
        pooled = models.with_pool(model, config["store"], "all", config["start"])
        figures["finetuned"] = _on_finetuned(config, models, store, pooled)
    return figures


def _few_svd(config: Config, models: Models) -> Figures:
    """The control: an SVD of the same unlabelled cells."""
    store = models.stores.open("granja", "all")
    data_set = SETS["granja"]
    labelled = Labelled.of(store, data_set, data_set.labels[0])
    unlabelled = np.flatnonzero(labelled.groups == TRAIN_DONOR)
    with models.clock.on("svd"):
        vectors = baselines.svd(labelled.levels, unlabelled, config["seed"], config["values"])
    with models.clock.on("regression"):
        return {"frozen": _on_frozen(store, vectors, unlabelled)}


def _on_frozen(store: IslandStore, vectors: NDArray[np.floating], unlabelled: Ints) -> Figures:
    """Accuracy and macro F1 of each draw of labels, by column of types: regression on rows of length 1."""
    rows = baselines.constant(baselines.unit_rows(vectors, unlabelled))
    found: Figures = {}
    for column in SETS["granja"].labels:
        evaluations = []
        for train, test, types in _draws(store, column):
            done = baselines.tuned_on({"vectors": rows}, types, train, test, FEW_STRENGTHS)
            evaluations.append(_figures(types[test], done.types))
        found[column] = _listed(evaluations)
    return found


def _draws(store: IslandStore, column: str) -> Iterator[tuple[Ints, Ints, NDArray[np.str_]]]:
    """Training cells, test cells and types of each draw."""
    tests = store.obs(["donor"])["donor"].to_numpy(str) == TEST_DONOR
    for draw in range(DRAWS):
        name = few_labels(column, draw)
        types = store.obs([name])[name].astype(object).fillna("").to_numpy(str)
        yield np.flatnonzero((types != "") & ~tests), np.flatnonzero(tests), types


def _on_finetuned(config: Config, models: Models, store: IslandStore, model: Path) -> Figures:
    """The same of the fine-tuned model."""
    test = np.flatnonzero(store.obs(["donor"])["donor"].to_numpy(str) == TEST_DONOR)
    found: Figures = {}
    for column in SETS["granja"].labels:
        truth = store.obs([column])[column].to_numpy(str)[test]
        evaluations = []
        for draw in range(DRAWS):
            made = models.finetuned(
                store, model, few_labels(column, draw), f"donor={TEST_DONOR}", config["finetune"]
            )
            evaluations.append(_figures(truth, models.types(made, store, test)))
        found[column] = _listed(evaluations)
    return found


def _listed(evaluations: list[Figures]) -> dict[str, list[float]]:
    return {name: [one[name] for one in evaluations] for name in ("accuracy", "macro_f1")}
