"""What the rows of the protocol run: a configuration in, its figures out; predictions are kept beside the rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from baselines import Predicted, constant, svd, tuned_on, unit_rows
from calibrated import judged
from methods import FEW_STRENGTHS, tell, tuned_model
from models import Models
from novel import known_of, scores, told_apart
from numpy.typing import NDArray
from outside import tell_outside
from paired import Told
from protocol import DIGESTS, Problem, Split, digest_of, folds, splits
from rows import digest
from scipy import sparse
from sets import SETS, Ints

from annatac_scale.annotate.metrics import evaluate_labels
from annatac_scale.errors import InputError
from annatac_scale.model.novelty import SCORES, KnownCells, Outputs
from annatac_scale.model.profiles import Profiles
from annatac_scale.store.open_islands import OpenIslands

Config = Mapping[str, Any]
Figures = dict[str, Any]
SMALLEST = 1e-9
"""Chances below it count as it, where their logarithm is wanted."""
ASIDE = 10
"""One training cell of a type in so many sets the threshold of novelty, and another one judges it; neither trains."""


@dataclass(frozen=True)
class Lab:
    """Where rows are run: the models of the work folder, and the environments of the peers."""

    models: Models
    peers: Path

    def predictions(self, config: Config) -> Path:
        """The file that a row's predictions are kept in."""
        return self.models.stores.work / "predictions" / f"{digest(config)}.npz"


def run(config: Config, lab: Lab) -> Figures:
    """The figures of a row."""
    return KINDS[config["kind"]](config, lab)


def _told(problem: Problem, config: Config, lab: Lab) -> Predicted:
    params = config["params"]
    if params["how"] == "peer":
        return tell_outside(problem, config, lab.models.stores, lab.peers)
    return tell(problem, params, lab.models)


def _checked(split: Split, config: Config) -> str:
    """The split's digest. Raises InputError where the protocol fixed another one."""
    found = digest_of(split)
    key = f"{config['set']}/{config['labels']}/{split.value}"
    if not config.get("change") and found != DIGESTS.get(key, found):
        raise InputError(
            f"{key}: the split has digest {found}, the protocol {DIGESTS[key]}; "
            "expected the file that benchmarks/README.md names, unchanged"
        )
    return found


def _method(config: Config, lab: Lab) -> Figures:
    """A method on every split of a task, or on every draw of few labels."""
    figures: Figures = {"splits": {}, "chosen": {}, "digests": {}}
    parts: list[tuple[str, Split, Predicted]] = []
    for one in _draws(config):
        for split in splits(one, lab.models.stores):
            done = _told(split.problem, config, lab)
            name = str(one["change"]["draw"]) if "draws" in config.get("change", {}) else split.value
            figures["splits"][name] = evaluated(split.truth, done.types)
            figures["chosen"][name] = _shown(done)
            figures["digests"][name] = _checked(split, config)
            parts.append((name, split, done))
    told = _joined(parts)
    told.write(lab.predictions(config))
    if "draws" not in config.get("change", {}):
        figures["pooled"] = evaluated(told.truth, told.types)
        figures["groups"] = _by_group(parts)
    return figures


def _draws(config: Config) -> Iterator[Config]:
    """The row itself, or each of its draws, of which the one of a number holds out the fold of that number."""
    change = config.get("change", {})
    if "draws" not in change:
        yield config
        return
    values = config.get("held") or SETS[config["set"]].holdout[1]
    for draw in range(change["draws"]):
        one = {key: value for key, value in change.items() if key != "draws"}
        yield {**config, "held": [values[draw % len(values)]], "change": {**one, "draw": draw}}


def _joined(parts: list[tuple[str, Split, Predicted]]) -> Told:
    """The predictions of all splits; chances over the classes of all of them."""
    cells = [
        [f"{name}/{cell}" for cell in split.problem.barcodes[split.problem.test]] for name, split, _ in parts
    ]
    truth = np.concatenate([split.truth for _, split, _ in parts])
    types = np.concatenate([np.asarray(done.types, str) for _, _, done in parts])
    classes = np.array(sorted({name for _, _, done in parts for name in done.classes}), str)
    chances = np.empty((0, len(classes)))
    if all(done.chances is not None for _, _, done in parts):
        chances = np.zeros((len(truth), len(classes)))
        at = 0
        for _, _, done in parts:
            assert done.chances is not None
            chances[at : at + len(done.types), np.searchsorted(classes, done.classes)] = done.chances
            at += len(done.types)
    return Told(np.concatenate(cells), truth, types, chances, classes)


def _by_group(parts: list[tuple[str, Split, Predicted]]) -> Figures:
    """Figures of the test cells of each group (donor, batch), where a split tests several."""
    found: Figures = {}
    for _, split, done in parts:
        names = np.unique(split.groups)
        if len(names) > 1:
            for name in names:
                of_group = split.groups == name
                found[str(name)] = evaluated(split.truth[of_group], np.asarray(done.types)[of_group])
    return found


def evaluated(truth: NDArray[np.str_], types: NDArray[np.str_]) -> Figures:
    """Figures of labels against the truth."""
    found = evaluate_labels(truth, types)
    return {
        "n_cells": found.n_cells,
        "accuracy": round(found.accuracy, 5),
        "macro_f1": round(found.macro_f1, 5),
        "kappa": round(found.kappa, 5),
    }


def _shown(done: Predicted) -> str:
    tuned = done.tuned
    strength = f", C {tuned.strength:g}, weights {tuned.class_weight or 'none'}" if tuned.strength else ""
    return f"{tuned.values}{strength}"


def _epochs(config: Config, lab: Lab) -> Figures:
    """Accuracy on the cells that choose the epoch, after each of them."""
    curves: Figures = {}
    for split in splits(config, lab.models.stores):
        log: list[dict[str, Any]] = []
        tuned_model(split.problem, split.problem.train, config["params"], lab.models, log)
        validated = [line for line in log if "validation_accuracy" in line]
        curves[split.value] = {
            what: [round(line[f"validation_{what}"], 5) for line in validated]
            for what in ("accuracy", "macro_f1")
        }
        if config.get("first"):
            break
    return {"curves": curves}


def _novelty(config: Config, lab: Lab) -> Figures:
    """A type left out of training: its test cells against those of the types that are known, by every score."""
    left = config["change"]["leave"]
    found: dict[str, dict[str, list[float]]] = {}
    n_novel = n_known = 0
    parts = list(splits(config, lab.models.stores))
    for split in parts:
        problem = split.problem
        is_novel = split.truth == left
        novel = problem.test[is_novel]
        if len(parts) > 1:  # of folds, and not of donors: no fold trains on any cell of the type
            novel = np.union1d(novel, np.setdiff1d(problem.seen, problem.train))
        if not len(novel):
            continue
        # Kept out of training, of the same donors: cells that set the threshold, and cells that it is judged by.
        aside = folds(problem.types[problem.train], problem.barcodes[problem.train], ASIDE)
        calib, within, fit = (problem.train[chosen] for chosen in (aside == 0, aside == 1, aside > 1))
        cells = calib, within, problem.test[~is_novel], novel
        n_novel, n_known = max(n_novel, len(novel)), n_known + int((~is_novel).sum())
        told = _scores(replace(problem, train=fit, seen=fit), cells, config, lab)
        for name in told[0]:
            for what, value in told_apart(*(one[name] for one in told)).items():
                found.setdefault(name, {}).setdefault(what, []).append(value)
        if config.get("first"):
            break
    means = {
        name: {what: round(float(np.mean(values)), 5) for what, values in figures.items()}
        for name, figures in found.items()
    }
    return {"left": left, "n_novel": n_novel, "n_known": n_known, "scores": means}


def _calibration(config: Config, lab: Lab) -> Figures:
    """Out-of-fold logits of the training part, pooled; half of the cells calibrate, half test; then the test cells."""
    figures: Figures = {}
    parts = list(splits(config, lab.models.stores))
    whole = parts[0].problem
    if len(parts) == 1:
        fold = folds(whole.types[whole.train], whole.barcodes[whole.train])
        inner = [(whole.train[fold != k], whole.train[fold == k]) for k in np.unique(fold)]
        truth = whole.types
    else:
        inner = [(part.problem.train, part.problem.test) for part in parts]
        truth = whole.types.copy()
        for part in parts:
            truth[part.problem.test] = part.truth
    classes = np.unique(truth[np.concatenate([asked for _, asked in inner])])
    logits, codes, cells = [], [], []
    for fit, asked in inner:
        known = np.where(np.isin(np.arange(len(truth)), fit), truth, "")
        told = _logits(replace(whole, types=known, train=fit, seen=fit, test=asked), config, lab, classes)
        logits.append(told)
        codes.append(np.searchsorted(classes, truth[asked]))
        cells.append(asked)
    pooled, code = np.concatenate(logits), np.concatenate(codes)
    asked = np.concatenate(cells)
    half = folds(truth[asked], whole.barcodes[asked], 2) == 0
    figures["out of fold"] = judged((pooled[half], code[half]), (pooled[~half], code[~half]))
    if len(parts) == 1:
        told = _logits(whole, config, lab, classes)
        known = np.isin(parts[0].truth, classes)
        test = told[known], np.searchsorted(classes, parts[0].truth[known])
        figures["unseen group"] = judged((pooled, code), test)
    return figures


def _scores(
    problem: Problem, asked: Sequence[Ints], config: Config, lab: Lab
) -> list[Mapping[str, NDArray[np.floating]]]:
    """The novelty scores of several lots of cells, the first one kept out of training, by a fit on the training cells.

    Of a fine-tuned model they are the package's, as it gives them.
    """
    params = config["params"]
    if params["how"] == "finetuned":
        settings = {**params, **next(iter(params["settings"].values()))}
        model = tuned_model(problem, problem.train, settings, lab.models)
        assert model.known is not None
        lots = [lab.models.states(model, problem.store, cells, fits=True) for cells in asked]
        return [scores(model.known, one, temperature=model.info.temperature) for one in lots]
    # The linear control: components of the training cells, and regression on them.
    vectors = unit_rows(svd(problem.levels, problem.train, 0, params["values"][0]), problem.train)
    everything = np.concatenate(asked)
    rows = {"vectors": constant(vectors)}
    done = tuned_on(rows, problem.types, problem.train, everything, FEW_STRENGTHS)
    assert done.chances is not None
    logits = np.log(np.maximum(done.chances, SMALLEST)).astype(np.float32)
    fit, codes = problem.train, np.unique(problem.types[problem.train], return_inverse=True)[1]
    opened = OpenIslands.from_csr(problem.levels)
    profiles = Profiles.of(_counts(problem.levels[fit], codes))
    of_lots = np.split(logits, np.cumsum([len(cells) for cells in asked])[:-1])
    lots = [
        Outputs(
            one, vectors[cells].astype(np.float32), opened.n_open[cells], profiles.fit(opened.take(cells))
        )
        for one, cells in zip(of_lots, asked, strict=True)
    ]
    trained = Outputs(logits[:0], vectors[fit].astype(np.float32), opened.n_open[fit])
    known: KnownCells = known_of(trained, codes, profiles, lots[0])
    # Its logits are the logarithms of chances, whose energy is 0.
    names = [name for name in SCORES if name not in ("energy", "joint")]
    return [scores(known, one, names) for one in lots]


def _counts(levels: sparse.csr_matrix, codes: Ints) -> Ints:
    """Cells of each type in which each island is open, int64 [N, C]."""
    of_type = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))
    return (of_type @ (levels > 0)).toarray().T.astype(np.int64)


def _logits(problem: Problem, config: Config, lab: Lab, classes: NDArray[np.str_]) -> NDArray[np.floating]:
    """Logits of the test cells, over all the classes."""
    done = _told(problem, config, lab)
    assert done.chances is not None
    logits = np.full((len(problem.test), len(classes)), np.log(SMALLEST))
    logits[:, np.searchsorted(classes, done.classes)] = np.log(np.maximum(done.chances, SMALLEST))
    return logits


KINDS: Mapping[str, Callable[[Config, Lab], Figures]] = {
    "method": _method,
    "epochs": _epochs,
    "novelty": _novelty,
    "calibration": _calibration,
}
