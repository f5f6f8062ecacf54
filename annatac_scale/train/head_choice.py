"""Which head suits the labelled cells, and a refusal where there are too few for it."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.progress import Progress
from annatac_scale.train.presets import FinetuneConfig
from annatac_scale.train.splits import LabelledCells


def training_counts(labelled: LabelledCells) -> NDArray[np.int64]:
    """Training cells of each type, int64 [types]."""
    return np.bincount(labelled.codes[labelled.split == "train"], minlength=len(labelled.types))


def with_head(
    config: FinetuneConfig,
    untouched: FinetuneConfig,
    labelled: LabelledCells,
    has_pool: bool,
    progress: Progress,
) -> FinetuneConfig:
    """The configuration with the head that suits the labelled cells and the pretrained model.

    untouched: the model's preset; has_pool: whether the model has a pooled layer
    A pooled head becomes a linear one where no more than ``config.linear_up_to`` cells train, val cells that then train
    among them, unless something was asked for that training alone can do.
    """
    head = config.head
    n_training = labelled.sizes["train"] + (0 if "val" in labelled.whole else labelled.sizes["val"])
    if head.kind == "pooled" and n_training <= config.linear_up_to and not _asks_training(config, untouched):
        head = replace(head, kind="linear")
        progress.say(
            f"head linear: {n_training:,} cells train, no more than linear_up_to = {config.linear_up_to:,}; "
            "--head pooled trains the pooled layer"
        )
    if head.kind == "linear" and not has_pool:
        head = replace(head, reads="none")  # a gate that nobody trained passes nothing
    return replace(config, head=head)


def _asks_training(config: FinetuneConfig, untouched: FinetuneConfig) -> bool:
    """Whether a value was set that a fitted head does not look at."""
    train = replace(config.train, seed=untouched.train.seed, micro_tokens=untouched.train.micro_tokens)
    as_trained = config.head.island_dropout, config.head.reads
    return bool(
        config.lora
        or config.label_smoothing
        or config.freeze_encoder
        or train != untouched.train
        or as_trained != (untouched.head.island_dropout, untouched.head.reads)
    )


def check_enough(labels: str, labelled: LabelledCells, kind: str) -> None:
    """Raise InputError where no cell could judge: too few, or a column where most cells are a type of their own.

    labels: the column; kind: of the head. A linear one is cross-validated, the others need val cells.
    """
    linear = kind == "linear"
    if (training_counts(labelled) >= 2).sum() >= 2 if linear else labelled.sizes["val"]:
        return
    n_types, n_cells = len(labelled.types), len(labelled.cells)
    doubt = "; is this a column of cell types?" if n_types > n_cells / 2 else ""
    why = "to cross-validate the linear head" if linear else "to hold any out for validation"
    do = "label more cells, hold out fewer"
    if not linear:
        do = f"use --head linear, which needs none, {do}, or --set validation_share=0.3"
    raise InputError(
        f"--labels {labels}: too few labelled cells of each type {why}: found {n_types:,} types in {n_cells:,} cells"
        f"{doubt}; {do}"
    )
