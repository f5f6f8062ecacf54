"""Rows that follow from the predictions of others: ensembles of seeds, and paired differences from the linear bar.

They are made when the page's rows are merged, and are saved with them, so that the page needs no predictions.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments import evaluated
from paired import Told, ensemble, f1_difference
from plans import ENSEMBLE, LINEAR, NETWORKS
from rows import digest

Row = Mapping[str, Any]
TASK = ("set", "select", "labels")
TABLE = "derived"


def derived(rows: Iterable[Row], predictions: Path) -> list[dict[str, Any]]:
    """The rows, for each task of the tables "sets", "peers" and "subtypes" whose predictions are there.

    The linear bar of a task is the best linear row of it, whether or not its predictions are there.
    """
    tasks: dict[tuple[str, ...], dict[str, dict[int, Told]]] = {}
    linear: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        config = row["config"]
        if config["table"] not in ("sets", "peers", "subtypes") or "held" in config or "failed" in row:
            continue
        key = tuple(config[name] for name in TASK)
        if config["model"] in LINEAR:
            linear.setdefault(key, {})[config["model"]] = row["figures"]["pooled"]["macro_f1"]
        path = predictions / f"{digest(config)}.npz"
        if path.is_file():
            tasks.setdefault(key, {}).setdefault(config["model"], {})[config["seed"]] = Told.read(path)
    return [
        made
        for key, told in tasks.items()
        for made in _of_task(dict(zip(TASK, key, strict=True)), told, linear.get(key, {}))
    ]


def key(row: Row) -> tuple[str, str]:
    """What tells such rows apart: one method may be compared with several."""
    return digest(row["config"]), row["figures"].get("against", "")


def _of_task(
    task: Mapping[str, str], told: Mapping[str, Mapping[int, Told]], linear: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    single = {name: seeds[0] for name, seeds in told.items() if 0 in seeds}
    for name, seeds in told.items():
        members = [seeds[seed] for seed in range(ENSEMBLE) if seed in seeds]
        if len(members) == ENSEMBLE and members[0].chances.size:
            joined = ensemble(members)
            single[f"{name}, {ENSEMBLE} seeds"] = joined
            yield _row(task, "ensemble", f"{name}, {ENSEMBLE} seeds", {"pooled": _figures(joined)})
    bar = max(linear, key=lambda name: linear[name], default="")
    for name, one in single.items():
        for other in (bar, *NETWORKS):
            if other in single and other != name and (other == bar or name not in (*LINEAR, *NETWORKS)):
                theirs = single[other]
                found = f1_difference(one.truth, one.types, theirs.types)
                yield _row(task, "paired", name, {**found, "against": other, "is_bar": other == bar})


def _figures(told: Told) -> dict[str, Any]:
    return evaluated(told.truth, told.types)


def _row(task: Mapping[str, str], kind: str, model: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"config": {"table": TABLE, "kind": kind, **task, "model": model}, "figures": figures}
