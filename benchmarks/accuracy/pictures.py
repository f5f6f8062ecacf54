"""The page's pictures, drawn from the saved rows: wrong labels, fewer labels, and accuracy after each epoch."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plans import HEAD, LR, MODEL, SVD_LR, TASKS
from sections import SETS, draws_of, newest, rows_of
from table import Row

METHODS = (LR, SVD_LR, HEAD, MODEL)
SIZE = (2.6, 2.4)
"""Inches of one set."""


def pictures_of(rows: Sequence[Row]) -> list[str]:
    """The pictures of the experiments that have rows, as Markdown."""
    there = {row["config"]["table"] for row in rows}
    shown = [f"![{title}](accuracy/{name}.svg)" for name, (title, _) in PICTURES.items() if name in there]
    return ["## Pictures", *shown] if shown else []


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Write the pictures."""
    mpl.rcParams["svg.hashsalt"] = "accuracy"
    for name, (_, drawn) in PICTURES.items():
        tasks = [task for task in TASKS if rows_of(rows, name, set=task[0], labels=task[1])]
        if not tasks:
            continue
        figure = Figure((SIZE[0] * len(tasks), SIZE[1] + 0.6), layout="constrained")
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            axes.set_title(SETS[task], fontsize=9)
            drawn(axes, rows, task)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _curve(key: str, name: str, shares: Sequence[float], whole: float) -> Callable[..., None]:
    def drawn(axes: Axes, rows: Sequence[Row], task: tuple[str, str]) -> None:
        for model in METHODS:
            points = {share: list(draws_of(rows, name, task, model, key, share).values()) for share in shares}
            points[whole] = [
                row["figures"]["pooled"]["macro_f1"]
                for row in rows_of(
                    rows, "sets", set=task[0], labels=task[1], select="all", model=model, seed=0
                )
                if "held" not in row["config"]
            ]
            known = sorted(share for share, values in points.items() if values)
            means = [statistics.fmean(points[share]) for share in known]
            axes.plot([100 * share for share in known], means, marker="o", markersize=3, label=model)
        axes.set_xlabel("% of labels" if key == "share" else "% of labels wrong", fontsize=8)
        axes.set_ylabel("macro F1", fontsize=8)

    return drawn


def _epochs(axes: Axes, rows: Sequence[Row], task: tuple[str, str]) -> None:
    for row in newest(rows_of(rows, "epochs", set=task[0], labels=task[1])):
        curves = [curve["accuracy"] for curve in row["figures"]["curves"].values()]
        means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        trained = row["config"]["trained"]
        label = f"{row['config']['model']}, {'pretrained' if trained else 'not pretrained'}"
        axes.plot(range(1, len(means) + 1), means, linestyle="-" if trained else "--", label=label)
    axes.set_xlabel("epoch", fontsize=8)
    axes.set_ylabel("accuracy", fontsize=8)


PICTURES: Mapping[str, tuple[str, Callable[..., None]]] = {
    "noise": ("Macro F1 by share of wrong labels", _curve("noise", "noise", (0.05, 0.1, 0.15, 0.2), 0.0)),
    "shares": ("Macro F1 by share of labels", _curve("share", "shares", (0.4, 0.6, 0.8), 1.0)),
    "epochs": ("Accuracy after each epoch", _epochs),
}
