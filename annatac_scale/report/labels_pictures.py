"""Pictures of a labels data set: what each sample is made of, and how sure the model is of each label.

matplotlib is imported here, so load it late. Equal figures give equal files, as in ``report.pictures``.
"""

import io
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from annatac_scale.annotate.labels_summary import LabelsSummary
from annatac_scale.model.labels import LOW_DEPTH, NOVEL
from annatac_scale.report.pictures import FORMATS

MOST_SAMPLES, MOST_LABELS = 60, 60
"""Rows that a picture has at most: the first samples, the most frequent labels."""

_MOST_COLORS = 18
_OWN_COLORS = {NOVEL: "0.55", LOW_DEPTH: "0.8"}
_REST = "0.92"
_INK, _BAND = "#1f4e79", "#c9d7e6"
_ROW_INCHES = 0.26
_NAME_SHOWN = 40


def draw_pictures(summary: LabelsSummary) -> dict[str, bytes]:
    """PNG files by what they show; none where there is no cell."""
    if not summary.n_cells:
        return {}
    # Names are of files: they are no formulas, whatever signs they have.
    with mpl.style.context("default"), mpl.rc_context({"font.size": 9, "text.parse_math": False}):
        figures = {
            "What each sample is made of": draw_samples(summary),
            "Confidence of the best type, by label": draw_confidence(summary),
        }
        return {what: _png(figure) for what, figure in figures.items()}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata=FORMATS[".png"])
    return buffer.getvalue()


def draw_samples(summary: LabelsSummary) -> Figure:
    """A bar a sample, of the shares of its labels."""
    samples = [sample for sample in summary.samples if sample.n_cells][:MOST_SAMPLES]
    names = [one.name for one in summary.labels]
    types = [name for name in names if name not in _OWN_COLORS][:_MOST_COLORS]
    colors: dict[str, Any] = {name: mpl.colormaps["tab20"](i) for i, name in enumerate(types)}
    colors |= {name: color for name, color in _OWN_COLORS.items() if name in names}
    shares = np.array([[one.labels.get(name, 0) / one.n_cells for name in colors] for one in samples])
    rest = 1 - shares.sum(axis=1)
    figure = Figure(figsize=(9, 1.6 + _ROW_INCHES * max(len(samples), len(colors))), layout="constrained")
    ax = figure.subplots()
    rows, start = np.arange(len(samples)), np.zeros(len(samples))
    for column, (name, color) in enumerate(colors.items()):
        ax.barh(rows, shares[:, column], left=start, height=0.8, color=color, label=_shown(name))
        start += shares[:, column]
    if len(names) > len(colors):
        ax.barh(rows, rest, left=start, height=0.8, color=_REST, label="others")
    ax.set_yticks(rows, [f"{_shown(one.name)} ({one.n_cells:,})" for one in samples])
    ax.set(xlim=(0, 1), ylim=(len(samples) - 0.4, -0.6), xlabel="share of cells")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def draw_confidence(summary: LabelsSummary) -> Figure:
    """For each label the middle 90% of its cells as a line, the middle half as a bar, and the median as a dot."""
    labels = [one for one in summary.labels if one.confidence is not None][:MOST_LABELS]
    values = np.array([list(one.confidence.values()) for one in labels if one.confidence is not None])
    low, lower, median, upper, high = values.T
    rows = np.arange(len(labels))
    figure = Figure(figsize=(7, 1.4 + _ROW_INCHES * len(labels)), layout="constrained")
    ax = figure.subplots()
    ax.hlines(rows, low, high, color=_INK, lw=1)
    ax.barh(rows, upper - lower, left=lower, height=0.6, color=_BAND, edgecolor=_INK, lw=0.8)
    ax.plot(median, rows, "o", ms=4, color=_INK)
    ax.set_yticks(rows, [f"{_shown(one.name)} ({one.n_cells:,})" for one in labels])
    ax.set(xlim=(0, 1.01), ylim=(len(labels) - 0.4, -0.6), xlabel="confidence: 5%, 25%, median, 75%, 95%")
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def _shown(name: str) -> str:
    """A name on one line, not too long; of one that begins with "_" matplotlib's legend would say nothing."""
    text = " ".join(name.split())
    text = text if len(text) <= _NAME_SHOWN else f"{text[: _NAME_SHOWN - 1]}…"
    return f" {text}" if text.startswith("_") else text
