"""Which rows there are: every configuration whole, so that a row is run again when a preset of the package changes."""

from collections.abc import Iterator, Mapping
from typing import Any

from baselines import VALUES
from sets import SETS

from annatac_scale.config import from_dict, to_dict
from annatac_scale.model.novelty import PAPER_SCORE
from annatac_scale.train.presets import FinetuneConfig, PretrainConfig, finetune_preset, pretrain_preset

Config = dict[str, Any]
TABLES = ("bars", "models", "signal")
"""Of the first page; those of the protocol are in plans.py."""

PRESET = "tiny"
SEEDS = 5
SELECTIONS = ("tss", "all")
TASKS = (
    ("cerebellum", "cell_type"),
    ("bm0828", "cell_type"),
    ("granja", "coarse_label"),
    ("granja", "cell_type"),
)
Schedule = Mapping[str, Mapping[str, int]]
LONG: Schedule = {"pretrain": {"epochs": 6, "min_steps": 150}, "finetune": {"epochs": 4, "min_steps": 100}}
SHORT: Schedule = {"pretrain": {"epochs": 3, "min_steps": 40}, "finetune": {"epochs": 3, "min_steps": 60}}
"""Where the encoder attends to all measured islands, 1,000 to 11,000 of a cell, and for its counterpart."""
ALL_SEEDS = {"cerebellum": 5, "bm0828": 5, "granja": 2}
"""Seeds that attend to all measured islands, of TSS bins: of all bins a cell measures 10,000 to 30,000."""


def configs(table: str) -> list[Config]:
    """The rows of a table, in the order in which they run."""
    made = {"bars": _bars, "models": _models, "signal": _signal}[table]()
    return [{"table": table, **config} for config in made]


def quick_configs() -> list[Config]:
    """A few rows that run within three minutes: cerebellum, one seed, one epoch."""
    chosen: list[Config] = []
    for config in [*_bars(), *_models()]:
        asked = config["set"], config["select"], config.get("attend", "open"), config.get("seed", 0)
        if asked != ("cerebellum", "tss", "open", 0) or config.get("short"):
            continue
        if config["kind"] == "model":
            config = merged(config, {"pretrain": {"train": {"epochs": 1, "min_steps": 0}}})
            config = merged(config, {"finetune": {"train": {"epochs": 1, "min_steps": 60}}})
        chosen.append({"table": "quick", **config})
    return chosen


def _bars() -> Iterator[Config]:
    for name, labels in TASKS:
        for select in SELECTIONS:
            task = {"set": name, "select": select, "labels": labels}
            yield {"kind": "regression", "model": "logistic regression", **task}
            yield {"kind": "svd", "model": "SVD64, then logistic regression", **task}


def _models() -> Iterator[Config]:
    """By seed, so that a table that is not whole has all its lines; what is slow comes last."""
    tasks: list[Config] = [
        {"set": name, "select": select, "labels": labels, "seed": seed, "holdout": _held_out(name, seed)}
        for seed in range(SEEDS)
        for name, labels in TASKS
        for select in SELECTIONS
    ]
    for task in tasks:
        for model in ("no encoder", "encoder"):
            for trained in (False, True):
                yield _model(task, model, "open", LONG, trained)
    for attend in ("open", "all"):
        for task in tasks:
            if task["select"] == "tss" and task["seed"] < ALL_SEEDS[task["set"]]:
                for trained in (False, True):
                    yield {**_model(task, "encoder", attend, SHORT, trained), "short": True}


def _held_out(name: str, seed: int) -> str:
    """Of folds, a seed holds out the one of its number."""
    values = SETS[name].holdout[1]
    return values[seed % len(values)]


def _model(task: Config, model: str, attend: str, schedule: Schedule, trained: bool) -> Config:
    seed = task["seed"]
    asked = {"no encoder": ("vector", "none"), "encoder": ("vector", "gate")}[model]
    pretrain = {
        **dict(zip(("objective", "reads"), asked, strict=True)),
        "encoder": {"attend": attend},
        "train": schedule["pretrain"],
    }
    finetune = {"head": {"reads": asked[1]}, "train": schedule["finetune"]}
    return {
        "kind": "model",
        **task,
        "attend": attend,
        "model": model,
        "trained": trained,
        "pretrain": pretrain_config(pretrain, seed),
        "finetune": finetune_config(finetune, seed),
    }


SIGNAL: Config = {
    "objective": "vector",
    "mask_fraction": 0.5,
    "mask_keep": 0.0,
    "mask_level_cap": 0.5,
    "reads": "gate",
    "train": {"epochs": 6, "global_batch_size": 64, "learning_rate": 1e-3, "table_learning_rate": 1e-3},
}
"""What the variants of pretraining differ from, over the preset: the sizes are the preset's."""

_CELL: Config = {"objective": "cell", "mask_fraction": 0.3, "mask_level_cap": 1.0, "negatives": 4}
_TOKENS: Config = {"mask_fraction": 0.15, "mask_keep": 0.1, "negatives": 1}
_OPEN: Config = {**_TOKENS, "objective": "open"}

VARIANTS: dict[str, Config] = {
    "vector": {},
    "vector, no encoder": {"reads": "none"},
    "vector, gate and sum": {"reads": "gate+sum"},
    "cell": _CELL,
    "cell, no encoder": {**_CELL, "reads": "none"},
    "cell, gate and sum": {**_CELL, "reads": "gate+sum"},
    "level (the paper's)": {**_TOKENS, "objective": "level"},
    "open": _OPEN,
    "level+open": {**_TOKENS, "objective": "level+open"},
    "open, 30% masked, 4 negatives": {**_CELL, "objective": "open"},
    "open, half of the negatives nearby": {**_OPEN, "nearby": 0.5},
    "open, closed islands in the first layer": {**_OPEN, "encoder": {"closed": "first"}},
    "open, closed islands in every layer": {**_OPEN, "encoder": {"closed": "every"}},
    "open, depth feature": {**_OPEN, "encoder": {"depth": True}},
    "open, post-norm": {**_OPEN, "encoder": {"norm": "post"}},
    "open, learned positions": {**_OPEN, "encoder": {"positions": "learned"}},
    "open, E started as published": {**_OPEN, "encoder": {"tokens_per_cell": 9782.0}},
    "open, width 64, k 32": {**_OPEN, "encoder": {"width": 64, "k": 32, "ff": 256}},
    "open+vector": {"objective": "open+vector"},
    "cell+vector": {"objective": "cell+vector", "negatives": 4},
    "cell, no encoder, 1 negative": {**_CELL, "reads": "none", "negatives": 1},
    "cell, no encoder, 8 negatives": {**_CELL, "reads": "none", "negatives": 8},
    "cell, no encoder, half of the negatives nearby": {**_CELL, "reads": "none", "nearby": 0.5},
    "cell, no encoder, tables at 3e-4": {**_CELL, "reads": "none", "train": {"table_learning_rate": 3e-4}},
    "cell, no encoder, tables at 1e-2": {**_CELL, "reads": "none", "train": {"table_learning_rate": 1e-2}},
    "vector, closed islands in the first layer": {"encoder": {"closed": "first"}},
    "vector, closed islands in every layer": {"encoder": {"closed": "every"}},
    "vector, depth feature": {"encoder": {"depth": True}},
    "vector, post-norm": {"encoder": {"norm": "post"}},
    "vector, learned positions": {"encoder": {"positions": "learned"}},
    "vector, E started as published": {"encoder": {"tokens_per_cell": 9782.0}},
    "vector, positions from levels": {"position_values": "levels"},
    "vector, width 64, k 32": {"encoder": {"width": 64, "k": 32, "ff": 256}},
    "vector, 4 layers": {"encoder": {"layers": 4}},
    "vector, 20 epochs": {"train": {"epochs": 20}},
    "vector, no encoder, 20 epochs": {"reads": "none", "train": {"epochs": 20}},
    "vector, no encoder, 128 channels": {"reads": "none", "pooled": 128},
    "vector, no encoder, 30% masked": {"reads": "none", "mask_fraction": 0.3},
    "vector, no encoder, tables at 3e-4": {"reads": "none", "train": {"table_learning_rate": 3e-4}},
    "vector, no encoder, tables at 3e-3": {"reads": "none", "train": {"table_learning_rate": 3e-3}},
    "vector, on granja D6 and BM0828": {},
    "vector, no encoder, on granja D6 and BM0828": {"reads": "none"},
}
"""By name, over ``SIGNAL``."""

UNTRAINED = ("vector", "level (the paper's)")
"""Variants that are measured as pretraining starts, too: the SVD-initialised pool, and the mean of token states."""

SEVERAL_SEEDS = dict.fromkeys(
    ("vector", "vector, no encoder", "cell, no encoder", "level (the paper's)", "open", "open+vector"), 3
)
"""Seeds of the variants that are worth more than one."""

FINE_TUNED = frozenset(
    {
        "vector",
        "vector, no encoder",
        "vector, gate and sum",
        "cell",
        "level (the paper's)",
        "open",
        "vector, closed islands in every layer",
    }
)
"""Variants that are fine-tuned too: ten times for a row."""


def _signal() -> Iterator[Config]:
    for values in VALUES:
        yield {"kind": "few_svd", "model": f"SVD64 of {values}", "values": values, "seed": 0}
    for seed in range(max(SEVERAL_SEEDS.values(), default=1)):
        for trained, names in ((False, UNTRAINED), (True, tuple(VARIANTS))):
            for name in names:
                if seed < SEVERAL_SEEDS.get(name, 1):
                    yield _few(name, trained, seed)


def _few(name: str, trained: bool, seed: int) -> Config:
    pretrain = pretrain_config(merged(SIGNAL, VARIANTS[name]), seed)
    start = merged(SIGNAL, {key: pretrain[key] for key in ("pooled", "reads", "encoder")})
    fine = finetune_config({"head": {"reads": pretrain["reads"], "pooled": pretrain["pooled"]}}, seed)
    return {
        "kind": "few",
        "model": name,
        "store": "hg19" if "BM0828" in name else "granja_d6",
        "seed": seed,
        "trained": trained,
        "pretrain": pretrain,
        "start": pretrain_config(start, seed),
        "finetune": fine if name in FINE_TUNED else {},
    }


def pretrain_config(over: Mapping[str, Any], seed: int) -> Config:
    """All of a PretrainConfig as plain values: the preset, and what is set over it."""
    base = pretrain_preset(PRESET)
    return to_dict(from_dict(PretrainConfig, merged(over, {"train": {"seed": seed}}), base))


def finetune_config(over: Mapping[str, Any], seed: int, head: str | None = None) -> Config:
    """All of a FinetuneConfig; no cells are set aside for thresholds, which nothing here looks at, nor at the rule.

    head: its kind, with the rates that go with it; None for the pooled one, however few the labels are
    """
    settled = {"calibration_share": 0.0, "novelty": PAPER_SCORE, "train": {"seed": seed}}
    return to_dict(
        from_dict(FinetuneConfig, merged(over, settled), finetune_preset(PRESET, head or "pooled"))
    )


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Config:
    """Nested mappings, the second over the first."""
    both = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = merged(both[key], value) if nested else value
    return both


def sets_of(config: Mapping[str, Any]) -> set[str]:
    """The labelled sets that a row reads."""
    if config["kind"].startswith("few"):
        return {"granja", "bm0828"} if config.get("store") == "hg19" else {"granja"}
    if "own" in config:
        return set()
    assert config["set"] in SETS
    return {config["set"]} | (
        {"granja", "bm0828"} if config.get("params", {}).get("store") == "hg19" else set()
    )
