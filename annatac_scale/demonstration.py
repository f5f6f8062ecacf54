"""The whole road on the real data that the package ships, each step with the command that does it oneself."""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

from annatac_scale import api
from annatac_scale.annotate.labels import LabelsFolder
from annatac_scale.annotate.metrics import Evaluation, evaluate_labels
from annatac_scale.baseline import tuned_logistic_regression
from annatac_scale.progress import Progress
from annatac_scale.store.store import IslandStore

FOLDS = 5
SEED = 0


@dataclass(frozen=True)
class DataSet:
    """One of the shipped data sets, and how the demo treats it."""

    name: str
    what: str
    file: str
    assembly: str
    convert: dict[str, Any]
    typed: bool
    """Whether the file carries the cell types itself, as ``cell_type``."""


DATA_SETS = (
    DataSet(
        "cerebellum",
        "801 real cells of mouse cerebellum, 4 types, a peak matrix (Cusanovich et al. 2018)",
        "cerebellum.h5ad",
        "mm9",
        {},
        typed=True,
    ),
    DataSet(
        "PBSmall",
        "150 real cells of human blood, 3 types, fragments of chr5 and chr11 (ArchR's test data)",
        "archr_PBSmall.tsv.gz",
        "hg19",
        {"min_fragments": 0},
        typed=False,
    ),
)


def run_demo(out: Path, full: bool, progress: Progress) -> list[dict[str, Any]]:
    """Convert, pretrain, fine-tune, predict and evaluate each shipped data set; figures beside logistic regression.

    out: folder to work in; run again, what is there is not done again
    full: all five folds, their held-out cells pooled; else the first fold
    """
    figures = []
    for data_set in DATA_SETS:
        progress.say(f"\n== {data_set.name}: {data_set.what}")
        figures.append(_Road(data_set, out / data_set.name, progress).run(range(FOLDS if full else 1)))
    progress.say(f"\n{_table(figures)}")
    return figures


class _Road:
    """The steps for one data set."""

    def __init__(self, data_set: DataSet, folder: Path, progress: Progress) -> None:
        self.data_set = data_set
        self.folder = folder
        self.progress = progress
        folder.mkdir(parents=True, exist_ok=True)
        self.input = folder / data_set.file
        with as_file(files("annatac_scale") / "data" / data_set.file) as shipped:
            shutil.copyfile(shipped, self.input)
        self.cells = folder / "cells.tsv"
        self.store = folder / "atlas.zarr"

    def run(self, folds: Sequence[int]) -> dict[str, Any]:
        """All steps; returns the figures."""
        options = {
            "assembly": self.data_set.assembly,
            "select": "all",
            **self.data_set.convert,
            "out": self.store,
        }
        self._do("convert", self.input, **options)
        self._write_cells()
        self.progress.say(
            f"\n{self.cells}: cell type and fold of each barcode; joined to the store, X untouched:"
        )
        self._do("convert", self.input, **options, obs=self.cells)
        self.progress.say(self._do("info", self.store).text())
        self._do("pretrain", self.store, out=self.folder / "pretrained", preset="tiny")
        evaluations = [self._fold(fold) for fold in folds]
        truth, label, bar = (np.concatenate(parts) for parts in zip(*evaluations, strict=True))
        ours, theirs = evaluate_labels(truth, label), evaluate_labels(truth, bar)
        return {
            "data_set": self.data_set.name,
            "folds": len(folds),
            "held_out_cells": len(truth),
            "annatac_scale": _figures(ours),
            "logistic_regression": _figures(theirs),
        }

    def _fold(self, fold: int) -> tuple[Any, Any, Any]:
        """True, predicted and logistic regression's types of the cells of one fold."""
        run, labels = self.folder / f"finetuned_{fold}", self.folder / f"labels_{fold}"
        model = self.folder / "pretrained" / "model"
        self._do("finetune", self.store, model=model, labels="cell_type", holdout=f"fold={fold}", out=run)
        self._do("predict", self.store, model=run / "model", out=labels)
        report = self._do("evaluate", labels, store=self.store, truth="cell_type")
        self.progress.say("\n".join(report.text()))
        store = IslandStore.open(self.store)
        obs = store.obs(["cell_type", "fold"])
        held_out = obs["fold"].map(int).to_numpy() == fold
        test, train = np.flatnonzero(held_out), np.flatnonzero(~held_out)
        types = obs["cell_type"].to_numpy(str)
        levels = store.read(np.arange(store.n_cells)).to_csr(store.n_islands)
        bar, tuned = tuned_logistic_regression(levels, types, train, test, SEED)
        self.progress.say(
            f"logistic regression on the same islands, tuned on the same training cells: {tuned}"
        )
        folder = LabelsFolder.open(labels)
        parts = [
            folder.read(part, ["sample", "barcode", "label"]).to_pandas() for part in folder.manifest.parts
        ]
        table = pd.concat(parts)
        predicted = obs.iloc[test].merge(table, on=["sample", "barcode"], how="left", validate="one_to_one")
        return types[test], predicted["label"].to_numpy(str), bar

    def _write_cells(self) -> None:
        """The table of labels. The cells of PBSmall carry their type as the first letter of the barcode."""
        obs = IslandStore.open(self.store).obs()
        types = obs["cell_type"] if self.data_set.typed else obs["barcode"].str[0]
        fold = np.empty(len(obs), np.int64)
        splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
        for number, (_, test) in enumerate(splitter.split(types, types)):
            fold[test] = number
        table = pd.DataFrame({"barcode": obs["barcode"], "cell_type": types, "fold": fold})
        table.to_csv(self.cells, sep="\t", index=False)

    def _do(self, command: str, argument: Path, **options: Any) -> Any:
        """Show the command, and run the function that it calls."""
        words = ["annatac", command, str(argument)]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        self.progress.say(f"\n$ {shlex.join(words)}")
        quiet = {"info": {}, "evaluate": {}}.get(command, {"progress": self.progress})
        return getattr(api, command)(argument, **options, **quiet)


def _figures(evaluation: Evaluation) -> dict[str, float]:
    return {"accuracy": round(evaluation.accuracy, 4), "macro_f1": round(evaluation.macro_f1, 4)}


def _table(figures: list[dict[str, Any]]) -> str:
    lines = [
        "data set     folds  held-out cells   annatac_scale: accuracy  macro F1   tuned logistic regression: same"
    ]
    for row in figures:
        ours, bar = row["annatac_scale"], row["logistic_regression"]
        lines.append(
            f"{row['data_set']:12} {row['folds']:5d}  {row['held_out_cells']:14,d}   {ours['accuracy']:23.3f}  "
            f"{ours['macro_f1']:8.3f}   {bar['accuracy']:21.3f}  {bar['macro_f1']:7.3f}"
        )
    return "\n".join(lines)
