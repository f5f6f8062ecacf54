"""Saved rows as lines of tables: means over seeds with 95% intervals, and differences paired by seed and split."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

Row = Mapping[str, Any]
Key = tuple[int, str]
"""Seed and value that is held out; draws of labels stand in the place of the latter."""

BAR_SEED = -1
"""Linear bars have no seed: they are paired with the rows of every seed by what is held out."""


@dataclass(frozen=True)
class Line:
    """Figures of one model: accuracy and macro F1 by seed and held-out value."""

    name: str
    accuracy: Mapping[Key, float]
    macro_f1: Mapping[Key, float]

    def minus(self, other: "Line | None", what: str) -> list[float]:
        """Differences of a figure, paired; of seeds and held-out values that both have."""
        if other is None or other is self:
            return []
        theirs: Mapping[Key, float] = getattr(other, what)
        own: Mapping[Key, float] = getattr(self, what)
        partner = {key: key if key in theirs else (BAR_SEED, key[1]) for key in own}
        return [own[key] - theirs[partner[key]] for key in own if partner[key] in theirs]


def method_lines(rows: Iterable[Row]) -> str:
    """Markdown of rows of methods: the pooled figures, in the order of macro F1; what could not run, and why."""
    ran, failed = [], []
    for row in rows:
        config = row["config"]
        name = f"{config['model']}, seed {config['seed']}" if config["seed"] else config["model"]
        if "failed" in row:
            failed.append(f"| {name} | - | - | {row['failed']} |")
        else:
            pooled = row["figures"]["pooled"]
            ran.append(
                (pooled["macro_f1"], f"| {name} | {pooled['accuracy']:.3f} | {pooled['macro_f1']:.3f} | |")
            )
    body = [line for _, line in sorted(ran, reverse=True)] + failed
    return "\n".join(["| method | accuracy | macro F1 | |", "| --- | --- | --- | --- |", *body])


def models_lines(rows: Iterable[Row], task: Mapping[str, str]) -> dict[str, Line]:
    """The lines of a set, its islands and its column of types, by name."""
    lines: dict[str, Line] = {}
    for row in rows:
        config = row["config"]
        if "splits" not in row["figures"] or any(config[key] != value for key, value in task.items()):
            continue
        line = lines.setdefault(_name(config), Line(_name(config), {}, {}))
        for value, found in row["figures"]["splits"].items():
            _put(line, (config.get("seed", BAR_SEED), value), found)
    return lines


def _name(config: Mapping[str, Any]) -> str:
    if config["kind"] != "model":
        return str(config["model"])
    trained = "pretrained" if config["trained"] else "not pretrained"
    if config["model"] == "no encoder":
        return f"pooled head, no encoder, {trained}"
    attend = {"open": "open islands", "all": "all islands"}[config["attend"]]
    return f"encoder of {attend}{', short' if config.get('short') else ''}, {trained}"


def signal_lines(rows: Iterable[Row], how: str, column: str) -> dict[str, Line]:
    """The lines of few labels by name. how: "frozen" or "finetuned"; column: of types."""
    lines: dict[str, Line] = {}
    for row in rows:
        config, figures = row["config"], row["figures"].get(how)
        if not config["kind"].startswith("few") or not figures:
            continue
        name = config["model"] if config.get("trained", True) else f"{config['model']}, as pretraining starts"
        line = lines.setdefault(name, Line(name, {}, {}))
        found = figures[column]
        for draw, (accuracy, macro_f1) in enumerate(zip(found["accuracy"], found["macro_f1"], strict=True)):
            _put(line, (config["seed"], str(draw)), {"accuracy": accuracy, "macro_f1": macro_f1})
    return lines


def _put(line: Line, key: Key, found: Mapping[str, float]) -> None:
    for figures, what in ((line.accuracy, "accuracy"), (line.macro_f1, "macro_f1")):
        assert isinstance(figures, dict)
        figures[key] = found[what]


def over_draws(line: Line, what: str) -> list[float]:
    """A figure of each draw, the mean over its seeds: draws are what varies."""
    figures: Mapping[Key, float] = getattr(line, what)
    draws = sorted({draw for _, draw in figures})
    return [statistics.fmean(v for (_, d), v in figures.items() if d == draw) for draw in draws]


def difference_over_draws(line: Line, other: Line, what: str) -> list[float]:
    """The same of a difference; both lines have every draw."""
    return [a - b for a, b in zip(over_draws(line, what), over_draws(other, what), strict=True)]


def half_width(values: Sequence[float]) -> float:
    """Half the 95% interval of the mean, by Student's t; NaN for one value."""
    n = len(values)
    if n < 2:
        return math.nan
    return float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def shown(values: Iterable[float], signed: bool = False) -> str:
    """Mean and interval, as ``.747 ±.007``; a dash for no value."""
    values = list(values)
    if not values:
        return "-"
    mean, half = statistics.fmean(values), half_width(values)
    text = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    return text if math.isnan(half) else f"{text} ±{half:.3f}"
