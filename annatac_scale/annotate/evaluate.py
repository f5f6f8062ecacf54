"""How good a labels data set is: joined to the true types in a store, on the cells that fine-tuning held out."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.annotate.confidence import LOW_DEPTH, NOVEL, ConfidenceRule
from annatac_scale.annotate.hierarchy_metrics import LineageFigures, lineage_figures
from annatac_scale.annotate.labels import LabelsFolder
from annatac_scale.annotate.metrics import Evaluation, evaluate_labels
from annatac_scale.errors import InputError
from annatac_scale.model.calibration import expected_calibration_error
from annatac_scale.model.labels import label_texts
from annatac_scale.store.place import Location, on_disk
from annatac_scale.store.store import IslandStore
from annatac_scale.train.label_map import LabelMap
from annatac_scale.train.splits import SPLITS

CELLS = ("test", "all")
NO_SPLIT = "none"
"""Stands for the split of a cell that was not in the fine-tuning."""
MUCH_NOVEL = 0.5
"""Above this share of Novel_cell_type the figures of ``label`` say little of the model: a note says so."""

Floats = NDArray[np.float32]
Texts = NDArray[np.object_]

_READ = ("sample", "barcode", "label", "best", "split", "probabilities")


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """Figures of a labels data set, and of which cells they are.

    evaluation: the figures of ``label``, where Novel_cell_type is an error, against ``truth``, an obs column
    best: the same of ``best``, the likeliest type however sure the model is
    cells: "test" or "all"; rule: what made a cell Novel_cell_type
    n_by_split: all cells of the data set by split, "none" for those that were not in the fine-tuning
    calibration_error: expected calibration error of the cells whose type the model knows, NaN without any
    n_novel, n_low_depth: evaluated cells that are named Novel_cell_type, Unassigned_low_depth
    unknown_types: true types that the model does not know, with their cells
    """

    labels: Path
    model: str
    truth: str
    cells: str
    rule: ConfidenceRule
    evaluation: Evaluation
    best: Evaluation
    n_by_split: dict[str, int]
    calibration_error: float
    n_novel: int
    n_low_depth: int
    unknown_types: dict[str, int]
    lineage: LineageFigures | None = None
    """Where the model has a hierarchy."""
    label_map: LabelMap | None = None
    """What the truth went through, and as ``not_in_truth`` those of its labels that no evaluated cell has."""
    not_in_truth: tuple[str, ...] = ()

    @property
    def share_novel(self) -> float:
        """Share of the evaluated cells that are named Novel_cell_type."""
        return self.n_novel / self.evaluation.n_cells

    @property
    def n_trained_on(self) -> int:
        """Evaluated cells that the fine-tuning used."""
        return 0 if self.cells == "test" else sum(self.n_by_split.get(s, 0) for s in SPLITS[:-1])

    @property
    def notes(self) -> list[str]:
        """Sentences that a reader of the figures must know."""
        total = sum(self.n_by_split.values())
        n_test = self.n_by_split.get("test", 0)
        which = (
            f"held-out test cells: {n_test:,} of {total:,}"
            if self.cells == "test"
            else f"all {total:,} cells"
        )
        notes = [which]
        if self.n_trained_on:
            notes.append(
                f"{self.n_trained_on:,} of them were used in fine-tuning: the figures are better than on new cells"
            )
        if self.share_novel > MUCH_NOVEL:
            notes.append(
                f"{self.n_novel:,} of {self.evaluation.n_cells:,} cells are {self.rule.novel_means}; see best, "
                "or predict with --novel-threshold 0"
            )
        if self.n_low_depth:
            notes.append(
                f"{self.n_low_depth:,} of {self.evaluation.n_cells:,} cells have fewer than {self.rule.min_open:,} "
                f"open islands and are named {LOW_DEPTH}, which counts as an error"
            )
        if self.evaluation.n_without_truth:
            notes.append(f"{self.evaluation.n_without_truth:,} cells without a {self.truth} are left out")
        if self.not_in_truth:
            notes.append(
                f"labels of the label map that none of these cells has: {', '.join(self.not_in_truth)}"
            )
        if self.unknown_types:
            types = ", ".join(f"{name} ({n:,} cells)" for name, n in self.unknown_types.items())
            notes.append(f"types that the model does not know, so that no best type can be right: {types}")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """All of it in the types of JSON; what is undefined is None."""
        return {
            "labels": str(self.labels),
            "model": self.model,
            "truth": self.truth,
            "cells": self.cells,
            "n_by_split": self.n_by_split,
            "n_trained_on": self.n_trained_on,
            "calibration_error": None if math.isnan(self.calibration_error) else self.calibration_error,
            "options": asdict(self.rule),
            "share_novel": self.share_novel,
            "n_low_depth": self.n_low_depth,
            "best_accuracy": self.best.accuracy,
            "best_macro_f1": self.best.macro_f1,
            "unknown_types": self.unknown_types,
            "lineage": None if self.lineage is None else self.lineage.to_dict(),
            "label_map": None if self.label_map is None else self.label_map.facts,
            "notes": self.notes,
            **self.evaluation.to_dict(),
        }

    def text(self) -> list[str]:
        """Lines to print: notes, figures, a table of the types and one of confusions."""
        figures = {
            "cells": f"{self.evaluation.n_cells:,}",
            "accuracy": f"{self.evaluation.accuracy:.4f}",
            "macro F1": f"{self.evaluation.macro_f1:.4f}",
            "accuracy of best": f"{self.best.accuracy:.4f}",
            "macro F1 of best": f"{self.best.macro_f1:.4f}",
            "Cohen's kappa": f"{self.evaluation.kappa:.4f}",
            "Jaccard, micro": f"{self.evaluation.jaccard_micro:.4f}",
            "Jaccard, weighted": f"{self.evaluation.jaccard_weighted:.4f}",
            "calibration error": f"{self.calibration_error:.4f}",
            f"named {NOVEL}": f"{self.share_novel:.1%}",
        }
        width = max(map(len, figures))
        per_type = self.evaluation.per_type.rename(columns={"cell_type": "type", "n": "cells"})
        confusion = self.evaluation.confusion.rename_axis(index=None, columns=None)
        return [
            *self.notes,
            "",
            *(f"{name:<{width}}  {value:>8}" for name, value in figures.items()),
            *([] if self.lineage is None else ["", *self.lineage.text()]),
            "",
            *per_type.to_string(index=False, float_format="{:.4f}".format).splitlines(),
            "",
            f"rows: {self.truth}, columns: label",
            *confusion.to_string().splitlines(),
        ]


def evaluate(
    labels: Location,
    store: IslandStore | Location,
    truth: str,
    *,
    cells: str = "test",
    label_map: Location | None = None,
) -> EvaluationReport:
    """Compare a labels data set with the true types of its cells.

    labels: folder on a disk that ``predict`` wrote, complete; store: may lie in object storage
    truth: obs column of the store; cells: "test", those that fine-tuning held out, or "all"
    label_map: a table on a disk that the truth goes through first, as in fine-tuning; labels that it names and no
        evaluated cell has are told, and refused where it names no label of these cells

    Raises InputError where the labels are a URL, parts or cells are missing, no cell was held out, or no cell has a
    truth.
    """
    if cells not in CELLS:
        raise InputError(f"--cells: found {cells!r}, expected {' or '.join(CELLS)}")
    folder = LabelsFolder.open_complete(on_disk(labels, "labels"))
    store = store if isinstance(store, IslandStore) else IslandStore.open(store)
    rows, chances, n_by_split = _rows(folder, cells)
    true_types = given = _true_types(folder, store, truth, rows)
    mapping = None if label_map is None else LabelMap.read(label_map)
    if mapping is not None:
        if not set(mapping.to).intersection(given):
            mapping.check(truth, given)
        true_types = mapping.applied(given)
    evaluation = evaluate_labels(true_types, rows["label"])
    classes = folder.manifest.classes
    n_true = evaluation.per_type.set_index("cell_type")["n"]
    return EvaluationReport(
        labels=folder.path,
        model=folder.manifest.model,
        truth=truth,
        cells=cells,
        rule=folder.manifest.rule,
        evaluation=evaluation,
        best=evaluate_labels(true_types, rows["best"]),
        n_by_split=n_by_split,
        calibration_error=_calibration_error(chances, true_types, classes),
        n_novel=int((rows["label"][true_types != ""] == NOVEL).sum()),
        n_low_depth=int((rows["label"][true_types != ""] == LOW_DEPTH).sum()),
        unknown_types={str(name): int(n) for name, n in n_true.items() if name not in classes},
        lineage=_lineage(folder, true_types, rows),
        label_map=mapping,
        not_in_truth=() if mapping is None else tuple(mapping.unknown(given)),
    )


def _rows(folder: LabelsFolder, cells: str) -> tuple[pd.DataFrame, Floats, dict[str, int]]:
    """The rows to evaluate, their probabilities [n, C], and the cells of the whole data set by split."""
    n_by_split: Counter[str] = Counter()
    rows, chances = [], []
    for part in folder.manifest.parts:
        table = folder.read(part, [*_READ, *(["lineage"] if folder.manifest.parents is not None else [])])
        split = table["split"].to_pandas().fillna(NO_SPLIT)
        n_by_split.update(split)
        kept = np.full(len(split), True) if cells == "all" else (split == "test").to_numpy()
        flat = table["probabilities"].combine_chunks().flatten().to_numpy()
        chances.append(flat.reshape(len(split), len(folder.manifest.classes))[kept])
        rows.append(table.drop_columns("probabilities").to_pandas()[kept])
    if cells == "test" and not n_by_split["test"]:
        raise InputError(
            f"{folder.path}: found no held-out cell among {sum(n_by_split.values()):,}, expected some with split test; "
            "use --cells all, or predict the store that the model was fine-tuned on"
        )
    order = [name for name in (*SPLITS, NO_SPLIT) if n_by_split[name]]
    return (
        pd.concat(rows, ignore_index=True),
        np.concatenate(chances),
        {name: n_by_split[name] for name in order},
    )


def _true_types(folder: LabelsFolder, store: IslandStore, truth: str, rows: pd.DataFrame) -> Texts:
    """The true type of each row as text, "" where there is none, object [n]."""
    obs = store.obs([truth]).set_index(["sample", "barcode"])[truth]
    place = obs.index.get_indexer(pd.MultiIndex.from_frame(rows[["sample", "barcode"]]))
    absent = rows[place < 0]
    if len(absent):
        raise InputError(
            f"{folder.path}: found {len(absent):,} of {len(rows):,} cells that {store.path} does not have, the first "
            f"{absent['barcode'].iloc[0]!r} of sample {absent['sample'].iloc[0]!r}; give the store that was predicted"
        )
    return label_texts(obs.iloc[place])


def _lineage(folder: LabelsFolder, true_types: Texts, rows: pd.DataFrame) -> LineageFigures | None:
    hierarchy = folder.manifest.hierarchy
    if hierarchy is None:
        return None
    return lineage_figures(hierarchy, true_types, rows["best"], rows["lineage"])


def _calibration_error(chances: Floats, true_types: Texts, classes: tuple[str, ...]) -> float:
    codes = pd.Index(classes).get_indexer(pd.Index(true_types, dtype=object))
    known = codes >= 0
    return expected_calibration_error(chances[known], codes[known]) if known.any() else math.nan
