"""The rows of the protocol, by table and plan, and how long they will take.

sets          every method of this environment on every set: all bins, and some on bins with a TSS
peers         methods in environments of their own
subtypes      close types, with the paper's deeper head
noise         5, 10, 15, 20% wrong labels
shares        40, 60, 80% of the labelled cells
epochs        with and without pretraining, after each epoch
novelty       each type left out in turn
few           5, 10, 50 labels a type
calibration   ECE and coverage of out-of-fold predictions, and on unseen donors
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grid
from grid import Config, finetune_config, merged, pretrain_config
from outside import PEERS
from rows import digest
from sets import OWN, PRETRAINING

from annatac_scale.model.novelty import SCORES
from annatac_scale.store.store import IslandStore
from annatac_scale.train.presets import MOST_FITTED

TABLES = ("sets", "peers", "subtypes", "noise", "shares", "epochs", "novelty", "few", "calibration")
PLANS = ("tiny", "whole")
"""Preset tiny in about two hours on two cores; everything, overnight."""
SEEDS, ENSEMBLE = 5, 3
DRAWS = 3
FEW_DRAWS = 5

TASKS = (*grid.TASKS, ("snareseq", "cell_type"))
SHORT = TASKS[1:3]
"""BM0828, and granja's 8 types: what plan tiny runs where an experiment on every set would take too long."""
_QUICK_PEERS = ("SingleR", "CellTypist", "Cellcano")
"""The others train deep models on all islands: plan tiny runs them on BM0828 alone."""
_SLOW_PEERS = ("SCANVI", "EpiAnno")
"""They take up to an hour of a core on BM0828: plan tiny leaves them out."""
TYPES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("cerebellum", "cell_type"): ("Astrocytes", "Inhibitory neurons", "Microglia", "Oligodendrocytes"),
    ("bm0828", "cell_type"): ("CLP", "CMP", "GMP", "HSC", "LMPP", "MEP", "MPP"),
    ("granja", "coarse_label"): ("B", "CD4", "CD8", "GMP", "HSPC", "Mono", "NK", "Pre.B"),
    ("snareseq", "cell_type"): (
        *("Astro", "CGE", "Clau", "Endo", "L2/3", "L4/5", "L6", "MGC"),
        *("Mis", "Npy", "OPC", "Oligo", "Peri", "Pvalb", "Sst"),
    ),
}
"""The types that are left out in turn."""

LR = "logistic regression"
SVD_LR = "SVD64 of binary x idf, then logistic regression"
HEAD = "pooled head, no encoder, not pretrained"
TRAINED = "pooled head, no encoder, pretrained"
MODEL = "fine-tuned model"
ENCODER = "fine-tuned model with encoder"
LINEAR: Mapping[str, Config] = {
    LR: {"how": "regression", "values": ["log", "binary", "log-tf-idf", "idf"]},
    "SVD64 of log-TF-IDF, then logistic regression": {
        "how": "svd",
        "values": ["log-tf-idf"],
        "then": "regression",
    },
    SVD_LR: {"how": "svd", "values": ["idf"], "then": "regression"},
    "SVD64 of log-TF-IDF, then kNN": {"how": "svd", "values": ["log-tf-idf"], "then": "neighbours"},
    "SVD64 of binary x idf, then kNN": {"how": "svd", "values": ["idf"], "then": "neighbours"},
}
"""The best of these is the bar."""
NETWORKS: Mapping[str, Config] = {"MLP": {"how": "mlp"}, "CNN head, no encoder": {"how": "cnn"}}
PLAIN: Mapping[str, Config] = {**LINEAR, **NETWORKS}

_GATE: Config = {"reads": "gate"}
_AS_IT_COMES: Config = {"finetune": {"linear_up_to": MOST_FITTED}}
"""With the head that suits the number of labelled cells; the others train the pooled one."""
_PAPER: Config = {"objective": "level", "mask_fraction": 0.15, "mask_keep": 0.1, "mask_level_cap": 1.0}
_ONE_LEVEL = ("cerebellum", "snareseq")
"""Sets with hardly an island above the first level: the paper's objective has nothing to learn of them."""
_AND_OPEN: Config = {"objective": "level+open"}
"""What pretraining asks for in its place."""
PUBLISHED = "encoder and CNN head, as published"
MODELS: Mapping[str, Config] = {
    HEAD: {"trained": False},
    TRAINED: {},
    MODEL: _AS_IT_COMES,
    ENCODER: {"pretrain": _GATE},
    PUBLISHED: {
        "pretrain": {**_PAPER, **_GATE},
        "finetune": {"class_weights": "paper"},
        "head": "cnn",
    },
    "encoder and subtype head": {"pretrain": _GATE, "head": "subtype"},
    "fine-tuned model, pretrained on D6 and BM0828": {**_AS_IT_COMES, "store": "hg19"},
}
"""What is set over preset tiny."""
GRID: Mapping[str, Config] = {
    "as it comes": _AS_IT_COMES,
    "vectors alone": {"finetune": {"linear_up_to": MOST_FITTED, "head": {"per_island": False}}},
    "not pretrained": {**_AS_IT_COMES, "trained": False},
    "pooled head": {},
    "pooled head, not pretrained": {"trained": False},
    "encoder, not pretrained": {"trained": False, "pretrain": _GATE},
    "island dropout 0.3": {"finetune": {"head": {"island_dropout": 0.3}}},
    "island dropout 0.7": {"finetune": {"head": {"island_dropout": 0.7}}},
    "tables at 3e-3": {"finetune": {"train": {"table_learning_rate": 3e-3}}},
    "tables at 3e-4": {"finetune": {"train": {"table_learning_rate": 3e-4}}},
    "20 epochs": {"finetune": {"train": {"epochs": 20, "min_steps": 800, "patience": 20}}},
    "no class weights": {"finetune": {"class_weights": "none"}},
}
"""Settings of the tuned model, one of which three inner folds choose."""


def configs(table: str, plan: str) -> list[Config]:
    """The rows of a table in a plan, in the order in which they run."""
    made = {
        "sets": _sets,
        "peers": _peers,
        "subtypes": _subtypes,
        "noise": _noise,
        "shares": _shares,
        "epochs": _epochs,
        "novelty": _novelty,
        "few": _few,
        "calibration": _calibration,
    }[table](plan == "whole")
    return [{"table": table, **config} for config in made]


def _sets(whole: bool) -> Iterator[Config]:
    for task in TASKS:
        for name in PLAIN:
            yield _row(name, task)
        for seed in range(SEEDS if whole else ENSEMBLE if task in SHORT else 1):
            yield _row(MODEL, task, seed=seed)
        for seed in range(SEEDS if whole else 1):
            yield _row(HEAD, task, seed=seed)
        for name in (TRAINED, *((ENCODER, PUBLISHED) if whole or task in SHORT else ())):
            yield _row(name, task)
    for task in TASKS if whole else SHORT:
        for name in (LR, SVD_LR, *(NETWORKS if whole else ()), *_heads(whole)):
            yield _row(name, task, select="tss")
    for labels in ("coarse_label", "cell_type"):
        for name in (LR, SVD_LR, *_heads(whole)):
            yield {**_row(name, ("granja", labels), store="granja_d5"), "held": ["D6"]}
    if whole:
        joined = "fine-tuned model, pretrained on D6 and BM0828"
        for task in TASKS[1:4]:
            yield _row(joined, task)
        for task in TASKS:
            for seed in range(ENSEMBLE):
                yield _tuned(task, seed)


def _heads(whole: bool) -> tuple[str, ...]:
    return (HEAD, MODEL) if whole else (MODEL,)


def _peers(whole: bool) -> Iterator[Config]:
    for task in TASKS if whole else (TASKS[0], *SHORT):
        for name, peer in PEERS.items():
            if not whole and name not in _QUICK_PEERS and (task != SHORT[0] or name in _SLOW_PEERS):
                continue
            params = {"how": "peer", "package": peer.version, "reads": peer.reads}
            yield {**_task(task), "kind": "method", "model": name, "params": params}


def _subtypes(whole: bool) -> Iterator[Config]:
    others = (LR, SVD_LR, *NETWORKS, HEAD) if whole else (SVD_LR,)
    for name in (*others, MODEL, "encoder and subtype head"):
        yield _row(name, ("snareseq", "orig_label"))
    yield _row("encoder and subtype head", ("bm0828", "cell_type"))


def _noise(whole: bool) -> Iterator[Config]:
    for task in (TASKS[0], TASKS[1], TASKS[2], TASKS[4]) if whole else TASKS[1:2]:
        for draw in range(DRAWS if whole else 1):
            for share in (0.05, 0.1, 0.15, 0.2):
                for name in (LR, SVD_LR, HEAD, MODEL) if whole else (SVD_LR, MODEL):
                    yield {**_row(name, task), "change": {"noise": share, "draw": draw}}


def _shares(whole: bool) -> Iterator[Config]:
    for task in TASKS if whole else TASKS[1:2]:
        for share in (0.4, 0.6, 0.8):
            for draw in range(DRAWS):
                for name in (LR, SVD_LR, HEAD, MODEL) if whole else (SVD_LR, MODEL):
                    yield {**_row(name, task), "change": {"share": share, "draw": draw}}


def _epochs(whole: bool) -> Iterator[Config]:
    schedule = {"train": {"epochs": 15, "min_steps": 0, "patience": 99}}
    for task in TASKS if whole else TASKS[1:2]:
        for name in (TRAINED, ENCODER, PUBLISHED):
            for trained in (True, False):
                config = _row(name, task, over={"finetune": schedule, "trained": trained})
                settings = config["params"]["settings"]["as it comes"]
                params = {**config["params"], **settings}
                del params["settings"], params["how"]
                yield {
                    **config,
                    "kind": "epochs",
                    "model": name.removesuffix(", pretrained"),
                    "params": params,
                    "trained": trained,
                    **_first(whole),
                }


def _first(whole: bool) -> Config:
    """In the short plan the first fold stands for all of them."""
    return {} if whole else {"first": True}


def _novelty(whole: bool) -> Iterator[Config]:
    for task in (TASKS[0], TASKS[1], TASKS[2], *(TASKS[4:] if whole else ())):
        for left in TYPES[task]:
            for name in (SVD_LR, MODEL):
                row = {**_row(name, task), "kind": "novelty", "change": {"leave": left}}
                # Nothing reads the scores there: with another one, the row is another row.
                yield {**row, **_first(whole), "scores": list(SCORES)}


def _few(whole: bool) -> Iterator[Config]:
    for task in (*TASKS[1:], TASKS[0]) if whole else TASKS[1:]:
        for labels in (5, 10, 50) if whole or task == TASKS[2] else (10,):
            change = {"few": labels, "draws": FEW_DRAWS}
            for name in (LR, SVD_LR) if whole else (SVD_LR,):
                yield {**_row(name, task), "change": change}
            for trained in (False, True):
                yield {**_frozen(task, trained), "change": change}
            for name in _heads(whole):
                yield {**_row(name, task), "change": change}


def _calibration(whole: bool) -> Iterator[Config]:
    for task in TASKS if whole else (*TASKS[:3], *TASKS[4:]):
        for name in (SVD_LR, MODEL) if whole else (MODEL,):
            yield {**_row(name, task), "kind": "calibration"}


def _task(task: tuple[str, str], select: str = "all", seed: int = 0) -> Config:
    return {"set": task[0], "select": select, "labels": task[1], "seed": seed}


def _row(
    name: str,
    task: tuple[str, str],
    select: str = "all",
    seed: int = 0,
    store: str = "",
    over: Mapping[str, Any] | None = None,
) -> Config:
    """A method on a task. store: what a model is pretrained on; over: set over the model's own settings"""
    params = PLAIN.get(name) or _model_params(name, task[0], select, seed, store, over or {})
    return {**_task(task, select, seed), "kind": "method", "model": name, "params": params}


def _model_params(
    name: str, data_set: str, select: str, seed: int, store: str, over: Mapping[str, Any]
) -> Config:
    asked = merged(MODELS[name], over)
    if name == PUBLISHED and data_set in _ONE_LEVEL:
        asked = merged(asked, {"pretrain": _AND_OPEN})
    store = asked.get("store") or store or PRETRAINING[data_set]
    return {
        "how": "finetuned",
        "store": store,
        "select": select,
        "settings": {"as it comes": _settings(asked, seed)},
    }


def _settings(asked: Mapping[str, Any], seed: int) -> Config:
    pretrain, head = pretrain_config(asked.get("pretrain", {}), seed), asked.get("head")
    # A pooled head goes on from the pretrained layer, and reads what that one reads.
    pool = {} if head else {"head": {"reads": pretrain["reads"], "pooled": pretrain["pooled"]}}
    finetune = finetune_config(merged(pool, asked.get("finetune", {})), seed, head)
    return {"trained": asked.get("trained", True), "pretrain": pretrain, "finetune": finetune}


def _tuned(task: tuple[str, str], seed: int) -> Config:
    row = _row(MODEL, task, seed=seed)
    settings = {name: _settings(asked, seed) for name, asked in GRID.items()}
    return {**row, "model": f"{MODEL}, tuned", "params": {**row["params"], "settings": settings}}


def _frozen(task: tuple[str, str], trained: bool) -> Config:
    row = _row(MODEL, task)
    params = {
        "how": "frozen",
        "store": row["params"]["store"],
        "select": "all",
        "trained": trained,
        "pretrain": pretrain_config({}, 0),
    }
    name = "pretrained, frozen" if trained else "as pretraining starts, frozen"
    return {**row, "model": f"{name}, then logistic regression", "params": params}


def quick_configs() -> list[Config]:
    """A row of each kind on cerebellum's bins with a TSS, short, for the tests."""
    task = TASKS[0]
    brief = {
        "pretrain": {"train": {"epochs": 1, "min_steps": 0}},
        "finetune": {"train": {"epochs": 1, "min_steps": 60}},
    }
    model = _row(MODEL, task, "tss", over=brief)
    mlp = _row("MLP", task, "tss")
    params = {"how": "peer", "package": PEERS["SingleR"].version, "reads": "genes"}
    made = [
        _row("SVD64 of binary x idf, then kNN", task, "tss"),
        {**mlp, "params": {**mlp["params"], "quick": True}},
        model,
        {**model, "change": {"noise": 0.2, "draw": 0}},
        {**model, "kind": "novelty", "change": {"leave": "Microglia"}, "first": True},
        {**_row(SVD_LR, task, "tss"), "change": {"few": 5, "draws": 1}},
        {**_task(task), "kind": "method", "model": "SingleR", "params": params},
    ]
    made = [row if row["kind"] == "novelty" else {**row, "held": ["0"]} for row in made]
    return [{"table": "quick", **config} for config in made]


def own_configs(asked: str) -> list[Config]:
    """Rows on a store of one's own. asked: "NAME=STORE:LABELS" or "NAME=STORE:LABELS:GROUP".

    Raises ValueError for another form, StoreError where there is no store.
    """
    name, equals, rest = asked.partition("=")
    path, *columns = rest.split(":")
    if not (name and equals and path and 1 <= len(columns) <= 2 and all(columns)):
        raise ValueError(f"--set {asked}: expected NAME=STORE:LABELS or NAME=STORE:LABELS:GROUP")
    folder = Path(path).resolve()
    own = {
        "store": str(folder),
        "labels": columns[0],
        "group": columns[1] if len(columns) == 2 else "",
        "digest": IslandStore.open(folder).digest,
    }
    made = []
    for method in (*PLAIN, HEAD, MODEL):
        for seed in range(ENSEMBLE if method == MODEL else 1):
            row = _row(method, (name, columns[0]), "own", seed, store=f"{OWN}{folder}")
            made.append({"table": "own", **row, "own": own})
    for method, peer in PEERS.items():
        params = {"how": "peer", "package": peer.version, "reads": peer.reads}
        row = {**_task((name, columns[0]), "own"), "kind": "method", "model": method, "params": params}
        made.append({"table": "own", **row, "own": own})
    return made


UNKNOWN_S = 60.0


def estimated(waiting: Iterable[Config], saved: Sequence[Mapping[str, Any]]) -> float:
    """Wall seconds that rows will take one after the other, from those that were run.

    A row's own time, else the mean of the rows that are like it: in model, kind, set and islands, then in ever less.
    """
    times: dict[tuple[Any, ...], list[float]] = {}
    for row in saved:
        for key in _keys(row["config"]):
            times.setdefault(key, []).append(row["seconds"]["wall"])
    seconds = 0.0
    for config in waiting:
        key = next((key for key in _keys(config) if key in times), None)
        seconds += statistics.fmean(times[key]) if key else UNKNOWN_S
    return seconds


def _keys(config: Config) -> list[tuple[Any, ...]]:
    model, kind = config.get("model"), config["kind"]
    where = config.get("set"), config.get("select")
    few = "draws" in config.get("change", {})
    return [(digest(config),), (model, kind, few, *where), (kind, few, *where), (model, kind, few), (kind,)]
