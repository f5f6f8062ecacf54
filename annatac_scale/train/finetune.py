"""Fine-tuning: a pretrained encoder and a cell-type head on labelled cells, to a model that annotates."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.nn import functional

from annatac_scale.errors import InputError
from annatac_scale.model.calibration import fit_temperature
from annatac_scale.model.cell_typer import CellTyper, batch_tokens, build_head
from annatac_scale.model.folder import Model, read_model, write_model
from annatac_scale.model.heads import LossSum, PooledHead
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.loader import IslandStream
from annatac_scale.stream.selection import sequential
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.stream.vocabulary import count_open
from annatac_scale.train.card import finetuned_card
from annatac_scale.train.checkpoint import RunFolder
from annatac_scale.train.loop import Ranks, TrainOptions, micro_batches, train
from annatac_scale.train.positions import inverse_document_frequency, truncated_svd
from annatac_scale.train.presets import FinetuneConfig
from annatac_scale.train.splits import SPLITS, LabelledCells, split_cells, write_split


@dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tuning run made. figures: of the val cells; test: of the held-out cells, empty without any."""

    model: Path
    types: tuple[str, ...]
    split: dict[str, int]
    n_without_label: int
    temperature: float
    figures: dict[str, float]
    test: dict[str, float]


class CellTypeModel(nn.Module):
    """A cell typer that maps labelled batches to summed, class-weighted cross-entropy."""

    class_weights: Tensor

    def __init__(self, typer: CellTyper, class_weights: Tensor, labelled: LabelledCells) -> None:
        super().__init__()
        self.typer = typer
        self.register_buffer("class_weights", class_weights)
        self._labelled = labelled

    def forward(self, batch: Batch) -> dict[str, LossSum]:
        """The loss named "type" over the cells of a batch; all of them are labelled."""
        device = self.class_weights.device
        logits = self.typer(*batch_tokens(batch, device)).float()
        target = torch.from_numpy(self._labelled.codes_of(batch.cell_ids)).to(device)
        loss = functional.cross_entropy(logits, target, self.class_weights, reduction="sum")
        count = torch.tensor(len(target))
        return {"type": LossSum(loss, count, (logits.argmax(1) == target).sum())}


class FinetuneTask:
    """Fine-tuning as the loop sees it."""

    def __init__(
        self,
        module: CellTypeModel,
        config: FinetuneConfig,
        lister: TokenLister,
        store: IslandStore,
        labelled: LabelledCells,
    ) -> None:
        self.module = module
        self.loss_weights = {"type": 1.0}
        self._config = config
        self._lister = lister
        self._store = store
        self._labelled = labelled

    def parameter_groups(self, options: TrainOptions) -> list[dict[str, Any]]:
        """Head, its tables, and the encoder unless it is frozen, each at its rate."""
        typer = self.module.typer
        tables = typer.head.table_parameters()
        rest = [p for p in typer.head.parameters() if all(p is not table for table in tables)]
        groups = [
            {"params": rest, "lr": options.learning_rate, "weight_decay": 0.0},
            {"params": tables, "lr": options.table_learning_rate},
        ]
        if not self._config.freeze_encoder:
            encoder = [p for p in typer.encoder.parameters() if p.requires_grad]
            groups.append({"params": encoder, "lr": options.encoder_learning_rate, "weight_decay": 0.0})
        return groups

    def prepare(self, batch: Batch, epoch: int) -> Batch:
        """List the tokens to attend to."""
        return self._lister(batch)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Every cell is a target."""
        return {"type": len(batch)}

    def validate(self, ranks: Ranks) -> dict[str, float]:
        """Accuracy and macro F1 of the val cells, their mean loss breaking ties in the score."""
        logits, truth = self.logits(self._labelled.of("val"))
        return figures_of(logits, truth)

    def logits(self, cells: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Logits [n, types] and true codes [n] of the given cells, in order of their ids."""
        parts, ids = [], []
        renumbering = self._lister.vocabulary.new_of_old()
        for block_ids, rows in sequential(self._store, cells):
            batch = self._lister(Batch.from_open(block_ids, rows.renumber(renumbering)))
            parts += [
                self.module.typer.predict(piece)
                for piece in micro_batches(batch, self._config.train.micro_tokens)
            ]
            ids.append(block_ids)
        n_types = len(self._labelled.types)
        logits = np.concatenate(parts) if parts else np.empty((0, n_types), np.float32)
        return logits, self._labelled.codes_of(np.concatenate(ids)) if ids else np.empty(0, np.int64)


def figures_of(logits: NDArray[np.float32], truth: NDArray[np.int64]) -> dict[str, float]:
    """accuracy, macro_f1 (over the types in the truth), loss, and score = macro F1 less a hundredth of the loss."""
    if not len(truth):
        return {}
    best = logits.argmax(axis=1)
    known = truth >= 0
    shifted = logits[known] - logits[known].max(axis=1, keepdims=True)
    own = shifted[np.arange(len(shifted)), truth[known]]
    loss = float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - own)) if known.any() else float("nan")
    macro_f1 = float(f1_score(truth, best, labels=np.unique(truth), average="macro", zero_division=0))
    return {
        "score": macro_f1 - 0.01 * loss,
        "accuracy": float(accuracy_score(truth, best)),
        "macro_f1": macro_f1,
        "loss": loss,
    }


def finetune(
    store: IslandStore,
    model: Path | str,
    labels: str,
    out: Path | str,
    config: FinetuneConfig,
    holdout: float | str = 0.2,
    progress: Progress | None = None,
) -> FinetuneReport:
    """Fine-tune a pretrained model on the cells of a store that have a label; the model folder is ``out``/model.

    labels: obs column with the cell types; cells without one are left out and counted
    holdout: share of cells, or "column=value", that test and are never trained on
    Run again with the same arguments, it goes on after the last complete epoch.
    """
    progress = progress or Silent()
    pretrained = read_model(model)
    pretrained.check_store(store)
    labelled = split_cells(
        store, labels, holdout, config.validation_share, config.calibration_share, config.train.seed
    )
    split = {name: int((labelled.split == name).sum()) for name in SPLITS}
    progress.say(
        f"labels {labels}: {len(labelled.types)} types, "
        + ", ".join(f"{n:,} {name}" for name, n in split.items())
        + f"; {labelled.n_without_label:,} cells without a label"
    )
    if not split["val"]:
        raise InputError(
            f"--labels {labels}: too few labelled cells of each type to hold any out for validation"
        )
    task = _task(store, pretrained, labelled, config, progress)
    run = RunFolder(
        out, config, {"kind": "finetune", **_identity(store, pretrained, labels, holdout, labelled)}
    )
    with run.use():
        stream = IslandStream(
            store,
            cells=labelled.of("train"),
            vocabulary=pretrained.vocabulary,
            global_batch_size=min(config.train.global_batch_size, split["train"]),
            seed=config.train.seed,
        )
        figures = train(task, stream, config.train, run, Ranks(), progress)
        temperature = fit_temperature(*task.logits(labelled.of("val")))
        test = figures_of(*task.logits(labelled.of("test")))
        write_split(run.path / "split.parquet", store, labelled)
        trained = _model(store, pretrained, task, labelled, config, temperature)
        trained.info.provenance.update(
            labels=labels, holdout=str(holdout), split=split, validation=figures, test=test
        )
        write_model(run.model, trained, finetuned_card(trained.info, trained.vocabulary))
    return FinetuneReport(
        run.model, labelled.types, split, labelled.n_without_label, temperature, figures, test
    )


def _task(
    store: IslandStore, pretrained: Model, labelled: LabelledCells, config: FinetuneConfig, progress: Progress
) -> FinetuneTask:
    torch.manual_seed(config.train.seed)
    vocabulary = pretrained.vocabulary
    head = build_head(config.head, pretrained.info.encoder, len(vocabulary), len(labelled.types))
    if isinstance(head, PooledHead):
        training = labelled.of("train")
        idf = inverse_document_frequency(count_open(store, training)[vocabulary.islands], len(training))
        rank = config.head.pooled
        svd = truncated_svd(store, vocabulary, training, rank, config.train.seed, idf, progress=progress)
        head.initialise(torch.from_numpy(idf), torch.from_numpy(svd.components * svd.singular_values))
    if config.freeze_encoder:
        pretrained.encoder.requires_grad_(False)
    codes = labelled.codes_of(labelled.of("train"))
    weights = class_weights(np.bincount(codes, minlength=len(labelled.types)), config.class_weights)
    module = CellTypeModel(CellTyper(pretrained.encoder, head), torch.from_numpy(weights), labelled)
    lister = TokenLister(store, vocabulary, pretrained.info.encoder.attend)
    return FinetuneTask(module, config, lister, store, labelled)


def class_weights(counts: NDArray[np.int64], rule: str) -> NDArray[np.float32]:
    """Weight of each type in the loss, float32 [n_types].

    balanced: n / (types x count); paper: (1 - frequency)^2, as annATAC's released code; none: 1
    """
    frequency = counts / counts.sum()
    if rule == "balanced":
        return (1 / (len(counts) * frequency)).astype(np.float32)
    return ((1 - frequency) ** 2 if rule == "paper" else np.ones(len(counts))).astype(np.float32)


def _identity(
    store: IslandStore, pretrained: Model, labels: str, holdout: float | str, labelled: LabelledCells
) -> dict[str, Any]:
    cells = hashlib.sha256(labelled.cells.tobytes() + labelled.codes.tobytes())
    cells.update("\n".join(labelled.split).encode())
    return {
        "model": pretrained.digest,
        "labels": labels,
        "holdout": str(holdout),
        "samples": {name: sample.x_sha256 for name, sample in store.samples.items()},
        "labelled_cells": cells.hexdigest(),
    }


def _model(
    store: IslandStore,
    pretrained: Model,
    task: FinetuneTask,
    labelled: LabelledCells,
    config: FinetuneConfig,
    temperature: float,
) -> Model:
    before = pretrained.info.provenance
    same = {s.digest for s in store.samples.values()} & set(before["samples"].values())
    about = (
        "pretraining saw all cells of these samples without their labels, the test cells among them"
        if same
        else "pretraining saw none of these cells"
    )
    counts = Counter(labelled.types[code] for code in labelled.codes_of(labelled.of("train")))
    info = replace(
        pretrained.info,
        head=config.head,
        labels=labelled.types,
        temperature=temperature,
        provenance={
            "made_by": f"annatac_scale {version('annatac_scale')}",
            "kind": "finetuned",
            "pretrained": {"digest": pretrained.digest, **before},
            "pretraining_cells": about,
            "samples": {name: sample.digest for name, sample in store.samples.items()},
            "training_cells_per_type": {name: counts[name] for name in labelled.types},
            "class_weights": config.class_weights,
            "seed": config.train.seed,
        },
    )
    return Model(info, pretrained.vocabulary, pretrained.islands, pretrained.encoder, task.module.typer)
