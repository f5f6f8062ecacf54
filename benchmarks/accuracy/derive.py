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


def derived(rows: Iterable[Row], predictions: Path) -> list[dict[str, Any]]:
    """The rows, for each task of the tables "sets", "peers" and "subtypes" whose predictions are there."""
    tasks: dict[tuple[str, ...], dict[str, dict[int, Told]]] = {}
    for row in rows:
        config = row["config"]
        path = predictions / f"{digest(config)}.npz"
        if config["table"] in ("sets", "peers", "subtypes") and "held" not in config and path.is_file():
            task = tasks.setdefault(tuple(config[key] for key in TASK), {})
            task.setdefault(config["model"], {})[config["seed"]] = Told.read(path)
    return [made for key, told in tasks.items() for made in _of_task(dict(zip(TASK, key, strict=True)), told)]


def _of_task(task: Mapping[str, str], told: Mapping[str, Mapping[int, Told]]) -> Iterator[dict[str, Any]]:
    single = {name: seeds[0] for name, seeds in told.items() if 0 in seeds}
    for name, seeds in told.items():
        members = [seeds[seed] for seed in range(ENSEMBLE) if seed in seeds]
        if len(members) == ENSEMBLE and members[0].chances.size:
            joined = ensemble(members)
            single[f"{name}, {ENSEMBLE} seeds"] = joined
            yield _row(task, "ensemble", f"{name}, {ENSEMBLE} seeds", {"pooled": _figures(joined)})
    linear = [name for name in LINEAR if name in single]
    if not linear:
        return
    bar = max(linear, key=lambda name: _figures(single[name])["macro_f1"])
    for name, one in single.items():
        for other in (bar, *NETWORKS):
            if other in single and other != name and (other == bar or name not in (*LINEAR, *NETWORKS)):
                theirs = single[other]
                found = f1_difference(one.truth, one.types, theirs.types)
                yield _row(task, "paired", name, {**found, "against": other, "is_bar": other == bar})


def _figures(told: Told) -> dict[str, Any]:
    return evaluated(told.truth, told.types)


def _row(task: Mapping[str, str], kind: str, model: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"config": {"table": "derived", "kind": kind, **task, "model": model}, "figures": figures}
