"""Pictures of a fine-tuning: accuracy by type, reliability, confusion. matplotlib is imported here, so load it late.

Equal figures give equal files, as in ``report.pictures``.
"""

import io
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from annatac_scale.annotate.reliability import Calibration
from annatac_scale.report.pictures import FORMATS

if TYPE_CHECKING:
    from annatac_scale.report.finetuning import FinetuningReport

_MOST_NUMBERED = 20
"""Types up to which the picture of confusion has a number in each field."""
_ROW_INCHES = 0.28
_INK, _BAND, _WRONG = "#1f4e79", "#c9d7e6", "#c0504d"


def draw_pictures(report: "FinetuningReport") -> dict[str, bytes]:
    """PNG files by name."""
    pictures = {}
    with mpl.style.context("default"), mpl.rc_context({"font.size": 9}):
        figures = {
            "accuracy": draw_accuracy(report),
            "confusion": draw_confusion(report.evaluation.confusion),
        }
        if report.calibration is not None:
            figures["reliability"] = draw_reliability(report.calibration)
        for name, figure in figures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=150, metadata=FORMATS[".png"])
            pictures[f"report-{name}.png"] = buffer.getvalue()
    return pictures


def draw_accuracy(report: "FinetuningReport") -> Figure:
    """The share right of each type as a bar with its interval, and its precision as a dot."""
    table = report.evaluation.per_type
    rows = np.arange(len(table))
    recall = table["recall"].to_numpy()
    ends = np.array([report.recall[name] for name in table["cell_type"]])
    figure = Figure(figsize=(6.5, 1.5 + _ROW_INCHES * len(table)), layout="constrained")
    ax = figure.subplots()
    below = np.clip(np.abs([recall - ends[:, 0], ends[:, 1] - recall]), 0, 1)
    ax.barh(
        rows, recall, color=_BAND, xerr=below, ecolor=_INK, capsize=2, label="right (recall), 95% interval"
    )
    ax.plot(table["precision"], rows, "o", ms=4, color=_WRONG, ls="", label="precision")
    ax.set_yticks(rows, [f"{row.cell_type} ({row.n:,})" for row in table.itertuples()])
    ax.set(xlim=(0, 1.02), ylim=(len(table) - 0.4, -0.6), xlabel="share of cells")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_reliability(found: Calibration) -> Figure:
    """Mean confidence and share right of each bin, over the band of perfect calibration; below, the cells of each."""
    bins = found.bins
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    top.plot([0, 1], [0, 1], color="0.7", lw=0.8, zorder=1)
    top.bar(
        (bins["low"] + bins["high"]) / 2,
        bins["band_high"] - bins["band_low"],
        bins["high"] - bins["low"],
        bottom=bins["band_low"],
        color=_BAND,
        zorder=0,
        label="95% of perfectly calibrated models",
    )
    top.plot(bins["confidence"], bins["right"], "o-", color=_INK, ms=4, lw=1, label="this model")
    band = f"{found.band.low:.3f} to {found.band.high:.3f}"
    top.set(
        ylabel="share right",
        ylim=(-0.02, 1.02),
        xlim=(0, 1),
        title=f"Calibration error {found.error:.3f} (perfect: {band}), {found.n_cells:,} cells",
    )
    top.legend(loc="lower right", frameon=False)
    bottom.bar((bins["low"] + bins["high"]) / 2, bins["n"], bins["high"] - bins["low"], color=_INK)
    bottom.set(xlabel="confidence", ylabel="cells")
    for ax in (top, bottom):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def draw_confusion(confusion: pd.DataFrame) -> Figure:
    """Of the cells of each type (rows) the share that is given each label (columns)."""
    shares = confusion.to_numpy() / confusion.to_numpy().sum(axis=1, keepdims=True)
    n_rows, n_columns = shares.shape
    size = _ROW_INCHES * 1.4
    figure = Figure(figsize=(3 + size * n_columns, 2 + size * n_rows), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    sums = confusion.sum(axis=1)
    ax.set_yticks(range(n_rows), [f"{name} ({n:,})" for name, n in sums.items()])
    ax.set_xticks(range(n_columns), list(confusion.columns), rotation=90)
    ax.set(xlabel="called", ylabel="type (cells)")
    if max(n_rows, n_columns) <= _MOST_NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                color = "white" if share > 0.5 else "black"
                ax.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, ax=ax, label="share of the type's cells", shrink=0.6)
    return figure
