"""What a fine-tuning came to: report.json, report.md and pictures in the folder of its run, from its held-out cells."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from annatac_scale.annotate.bootstrap import DRAWS, Interval, bootstrap_intervals, share_interval
from annatac_scale.annotate.metrics import HEADLINES, Evaluation, evaluate_labels
from annatac_scale.annotate.reliability import Calibration, calibration
from annatac_scale.errors import InputError
from annatac_scale.model.labels import in_table
from annatac_scale.store.files import write_whole
from annatac_scale.train.confusions import Confusions, confusions_of
from annatac_scale.train.heldout import CLASSES, HELDOUT_FILE

REPORT_JSON, REPORT_MD = "report.json", "report.md"
PICTURES = {
    "report-accuracy.png": "Share right of each type, with 95% intervals (exact), and precision",
    "report-reliability.png": "Confidence against share right, with the 95% band of a perfectly calibrated model",
    "report-confusion.png": "What the cells of each type are called",
}

_WHICH = {
    "test": "test cells, which fine-tuning never saw",
    "calib": "calib cells, which did not train (there are no test cells)",
    "val": "val cells, which decided when to stop and set the confidence, so that the figures are better than on new "
    "cells (there are neither test nor calib cells)",
    "train": "training cells, each as judged by a fit that left it out (there are no other cells)",
}
"""Splits to report, the best one first."""

_ON_INTERVALS = (
    f"Intervals are percentiles of {DRAWS:,} bootstrap samples of these cells: they speak of other cells of the same "
    "donors, not of other donors."
)
_NAMES = ("accuracy", "macro F1", "Cohen's kappa", "Jaccard, micro", "Jaccard, weighted")


@dataclass(frozen=True, eq=False)
class FinetuningReport:
    """What the held-out cells of a fine-tuning tell.

    split: of the cells, the first of test, calib, val and out-of-fold train that has any
    labels, holdout, group: as the run was asked; group "" for none
    evaluation, intervals: of the likeliest types, whatever the confidence, with 95% bootstrap intervals
    recall: of each type of the truth, the exact 95% interval of the share right
    calibration: of the cells whose type the model knows; None without any
    unknown_types: true types that the model does not know, with their cells
    """

    split: str
    labels: str
    holdout: str
    group: str
    evaluation: Evaluation
    intervals: dict[str, Interval]
    recall: dict[str, Interval]
    calibration: Calibration | None
    confusions: Confusions
    unknown_types: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """All of it in the types of JSON."""
        return {
            "split": self.split,
            "labels": self.labels,
            "holdout": self.holdout,
            "group": self.group,
            "n_draws": DRAWS,
            "intervals": {name: interval.to_json() for name, interval in self.intervals.items()},
            "recall_intervals": {name: list(interval) for name, interval in self.recall.items()},
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "confusions": self.confusions.to_dict(),
            "unknown_types": self.unknown_types,
            **self.evaluation.to_dict(),
        }

    def markdown(self) -> str:
        """The text of report.md."""
        asked = f"--holdout {self.holdout}" + (f" --group {self.group}" if self.group else "")
        lines = [
            f"# Fine-tuning on `{self.labels}`",
            "",
            f"Of {self.evaluation.n_cells:,} {_WHICH[self.split]}. Held out: `{asked}`.",
            "",
            *(f"{note}\n" for note in self.notes),
            "## What it can't tell apart",
            "",
            *(f"- {sentence}" for sentence in self.confusions.sentences),
            "",
            "## Figures",
            "",
            "| figure | value | 95% interval |",
            "|---|---|---|",
            *(
                f"| {shown} | {getattr(self.evaluation, name):.4f} | {_range(self.intervals[name])} |"
                for name, shown in zip(HEADLINES, _NAMES, strict=True)
            ),
            "",
            _ON_INTERVALS,
            "",
            "| cell type | cells | right | 95% interval | precision | F1 |",
            "|---|---|---|---|---|---|",
            *(
                f"| {in_table(row.cell_type)} | {row.n:,} | {row.recall:.3f} | {_range(self.recall[row.cell_type])} | "
                f"{row.precision:.3f} | {row.f1:.3f} |"
                for row in self.evaluation.per_type.itertuples()
            ),
            "",
            *(f"![{what}]({name})\n" for name, what in PICTURES.items() if name in self.pictures),
        ]
        return "\n".join(lines)

    @property
    def notes(self) -> list[str]:
        """Sentences that a reader of the figures must know."""
        notes = []
        if self.group and self.split == "test":
            notes.append(f"No cell of their groups (`{self.group}`) trained.")
        elif "=" not in self.holdout or self.split != "test":
            notes.append(
                "Where these cells are of the same donors as those that trained, expect less on a new donor; "
                "`--group donor` or `--holdout donor=NAME` measures it."
            )
        if self.unknown_types:
            types = ", ".join(f"{name} ({n:,} cells)" for name, n in self.unknown_types.items())
            notes.append(f"No cell of these types trained, so that all of theirs are errors: {types}.")
        if self.calibration is not None:
            found = self.calibration
            verdict = "within" if found.within_band else "above"
            notes.append(
                f"The confidence is off by {found.error:.3f} on average (expected calibration error), {verdict} the "
                f"{_range(found.band)} that a perfectly calibrated model shows on {found.n_cells:,} such cells."
            )
        return notes

    @property
    def pictures(self) -> list[str]:
        """Names of the pictures that there are data for."""
        return [name for name in PICTURES if "reliability" not in name or self.calibration is not None]


def _range(interval: Interval) -> str:
    return "-" if np.isnan(interval.low) else f"{interval.low:.3f} to {interval.high:.3f}"


def read_finetuning(run: Path) -> FinetuningReport:
    """What the held-out cells of a complete fine-tuning run tell.

    Raises InputError where ``run`` has no whole heldout.parquet, as one that an older version made.
    """
    file = run / HELDOUT_FILE
    try:
        table = pq.read_table(file, columns=["split", "truth", "best", "confidence"])
        classes = json.loads(table.schema.metadata[CLASSES])
        asked = json.loads((run / "run.json").read_text())
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{file}: cannot be read ({error}); expected the held-out cells of a complete fine-tuning; run `annatac "
            "finetune` again, into another folder if this one is complete"
        ) from error
    cells = table.to_pandas()
    split = next((name for name in _WHICH if (cells["split"] == name).any()), "")
    if not split:
        raise InputError(f"{file}: found no held-out cell; expected some; hold out cells with --holdout")
    return _report(cells[cells["split"] == split], split, classes, asked)


def _report(cells: pd.DataFrame, split: str, classes: list[str], asked: dict[str, Any]) -> FinetuningReport:
    evaluation = evaluate_labels(cells["truth"], cells["best"])
    right = (cells["truth"] == cells["best"]).to_numpy()
    known = cells["truth"].isin(classes).to_numpy()
    sure = cells["confidence"].to_numpy()
    n_of = evaluation.per_type.set_index("cell_type")["n"]
    return FinetuningReport(
        split=split,
        labels=str(asked.get("labels", "")),
        holdout=str(asked.get("holdout", "")),
        group=str(asked.get("group", "")),
        evaluation=evaluation,
        intervals=bootstrap_intervals(evaluation),
        recall={
            name: share_interval(int(evaluation.confusion.loc[name, name]), int(n))
            for name, n in n_of.items()
        },
        calibration=calibration(sure[known], right[known]) if known.any() else None,
        confusions=confusions_of(evaluation.confusion),
        unknown_types={str(name): int(n) for name, n in n_of.items() if name not in classes},
    )


def write_finetuning_report(run: Path) -> FinetuningReport:
    """Write report.json, report.md and pictures into the folder of a complete fine-tuning run; equal runs, equal files.

    Raises InputError as ``read_finetuning``, StoreError where the folder cannot be written to.
    """
    from annatac_scale.report.finetuning_pictures import draw_pictures

    report = read_finetuning(run)
    for name, data in draw_pictures(report).items():
        write_whole(run / name, data)
    write_whole(run / REPORT_JSON, (json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n").encode())
    write_whole(run / REPORT_MD, report.markdown().encode())
    return report
