"""Fine-tuning: a pretrained encoder and a cell-type head on labelled cells, to a model that annotates."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.nn import functional

from annatac_scale.errors import ConfigError, InputError, ModelError
from annatac_scale.model.calibration import VECTOR_CELLS
from annatac_scale.model.cell_typer import CellTyper, build_head
from annatac_scale.model.conformal import fewest_calib
from annatac_scale.model.encoder import batch_tokens
from annatac_scale.model.folder import Model, ModelInfo, read_model, write_model
from annatac_scale.model.heads import LossSum, PooledHead
from annatac_scale.model.novelty import PAPER_SCORE, Outputs
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.place import Location, on_disk
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.cell_matrix import CellMatrix
from annatac_scale.stream.loader import BatchStream
from annatac_scale.stream.selection import sequential
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.stream.vocabulary import count_open
from annatac_scale.train.card import finetuned_card
from annatac_scale.train.confidence_fit import Confidence, fit_confidence
from annatac_scale.train.interruption import interruption
from annatac_scale.train.loop import Loop, micro_batches, train
from annatac_scale.train.positions import inverse_document_frequency, truncated_svd
from annatac_scale.train.presets import FinetuneConfig
from annatac_scale.train.provenance import earlier_sight, made_by, run_inputs, sample_facts
from annatac_scale.train.ranks import Ranks
from annatac_scale.train.record import Record
from annatac_scale.train.run_folder import RunFolder
from annatac_scale.train.run_options import RunOptions
from annatac_scale.train.splits import SPLIT_FILE, LabelledCells, SplitRule, split_cells, write_split
from annatac_scale.train.train_options import TrainOptions


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
        """The loss named "type" over the cells of a batch; all of them have a code of at least 0."""
        device = self.class_weights.device
        logits = self.typer(*batch_tokens(batch, device)).float()
        target = torch.from_numpy(self._labelled.codes_of(batch.cell_ids)).to(device)
        loss = functional.cross_entropy(logits, target, self.class_weights, reduction="sum")
        count = torch.tensor(len(target), device=device)
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
        """The head, its tables, and the encoder with what reads it, each at its rate."""
        typer = self.module.typer
        tables, reading = typer.head.table_parameters(), typer.head.reading_parameters()
        apart = {id(p) for p in (*tables, *reading)}
        encoder = [p for p in typer.linformer.parameters() if p.requires_grad]
        return [
            {
                "params": [p for p in typer.head.parameters() if id(p) not in apart],
                "lr": options.learning_rate,
            },
            {"params": tables, "lr": options.table_learning_rate, "weight_decay": options.weight_decay},
            {"params": reading + encoder, "lr": options.encoder_learning_rate},
        ]

    def prepare(self, batch: Batch, epoch: int) -> Batch:
        """List the tokens to attend to."""
        return self._lister(batch)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Every cell is a target."""
        return {"type": len(batch)}

    def validate(self, ranks: Ranks, after_batch: Callable[[], None]) -> dict[str, float]:
        """Figures of the val cells; score is macro F1, the loss breaking ties."""
        figures = figures_of(*self.logits(self._labelled.of("val"), after_batch))
        return {"score": figures["macro_f1"] - 0.01 * figures["loss"], **figures}

    def logits(
        self, cells: NDArray[np.int64], after_batch: Callable[[], None] = lambda: None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Logits [n, types] and true codes [n] of labelled cells, in order of their ids."""
        return self.outputs(cells, after_batch).logits, self._labelled.codes_of(np.sort(cells))

    def outputs(self, cells: NDArray[np.int64], after_batch: Callable[[], None] = lambda: None) -> Outputs:
        """What the model says of cells, in order of their ids."""
        typer = self.module.typer
        logits = [np.empty((0, typer.head.classifier.out_features), np.float32)]
        embedding = [np.empty((0, typer.head.classifier.in_features), np.float32)]
        n_open = [np.empty(0, np.int64)]
        new_of_old = self._lister.vocabulary.new_of_old()
        for ids, rows in sequential(self._store, cells):
            read = rows.renumber(new_of_old)
            n_open.append(read.n_open)
            batch = self._lister(Batch.from_open(ids, read))
            for piece in micro_batches(batch, self._config.train.micro_tokens):
                said = typer.predict_with_embedding(piece)
                logits.append(said[0])
                embedding.append(said[1])
            after_batch()
        return Outputs(np.concatenate(logits), np.concatenate(embedding), np.concatenate(n_open))


def figures_of(logits: NDArray[np.float32], truth: NDArray[np.int64]) -> dict[str, float]:
    """accuracy, macro_f1 over the types in the truth, and loss over the cells of types that the model knows.

    truth: codes; those below 0 are types that the model does not know, whose cells are errors. Empty without cells.
    """
    if not len(truth):
        return {}
    best = logits.argmax(axis=1)
    macro_f1 = f1_score(truth, best, labels=np.unique(truth), average="macro", zero_division=0)
    figures = {"accuracy": float(accuracy_score(truth, best)), "macro_f1": float(macro_f1)}
    known = np.flatnonzero(truth >= 0)
    if len(known):
        scores = logits[known].astype(np.float64)
        own = scores[np.arange(len(known)), truth[known]]
        figures["loss"] = float(np.mean(logsumexp(scores, axis=1) - own))
    return figures


@dataclass(frozen=True, eq=False)
class _Work:
    """What a fine-tuning works with."""

    store: IslandStore
    pretrained: Model
    labels: str
    labelled: LabelledCells
    config: FinetuneConfig
    holdout: str


def finetune(
    store: IslandStore,
    model: Model | Location,
    labels: str,
    out: Location,
    config: FinetuneConfig,
    holdout: float | str = 0.2,
    progress: Progress | None = None,
) -> FinetuneReport:
    """Fine-tune a pretrained model on the cells of a store that have a label; the model folder is ``out``/model.

    model: a folder, on a disk or in object storage, or as it was read from one: its encoder is trained in place
    labels: obs column with the cell types; cells without one are left out and counted
    out: a folder on a disk
    holdout: share of each type's cells, or "column=value", that test and are never trained on

    Run again with the same arguments, it goes on after the newest checkpoint; a complete run is left as it is.
    Raises InputError where there are too few labelled cells or ``out`` is a URL, ModelError where model and store do
    not fit or the model was never written.
    """
    progress = progress or Silent()
    out = on_disk(out, "--out")
    pretrained = model if isinstance(model, Model) else read_model(model)
    if not pretrained.digest:
        raise ModelError(
            "the model was never written, so the run could not say what it is trained from; write it first"
        )
    pretrained.check_store(store)
    rule = SplitRule(holdout, config.validation_share, config.calibration_share, config.train.seed)
    labelled = split_cells(store, labels, rule)
    progress.say(_split_line(labels, labelled))
    if not labelled.sizes["val"]:
        raise InputError(_too_few(labels, labelled))
    work = _Work(store, pretrained, labels, labelled, config, rule.described)
    run = RunFolder(out, config, _identity(work))
    with run.use(progress.say):
        if run.complete:
            progress.say(f"{run.location}: complete already; its model stays as it is")
        else:
            _finetune(work, run, progress)
    return _report(run)


def _split_line(labels: str, labelled: LabelledCells) -> str:
    sizes = ", ".join(f"{n:,} {name}" for name, n in labelled.sizes.items())
    return f"labels {labels}: {len(labelled.types)} types, {sizes}; {labelled.n_without_label:,} cells without a label"


def _too_few(labels: str, labelled: LabelledCells) -> str:
    """Why no cell validates: few cells, or a column of something else, where most cells are a type of their own."""
    n_types, n_cells = len(labelled.types), len(labelled.cells)
    doubt = "; is this a column of cell types?" if n_types > n_cells / 2 else ""
    return (
        f"--labels {labels}: too few labelled cells of each type to hold any out for validation: found {n_types:,} "
        f"types in {n_cells:,} cells{doubt}; label more cells, hold out fewer, or --set validation_share=0.3"
    )


def _identity(work: _Work) -> dict[str, Any]:
    labelled = work.labelled
    cells = hashlib.sha256(labelled.cells.tobytes() + labelled.codes.tobytes())
    cells.update("\n".join([*labelled.split, *labelled.types]).encode())
    return {
        "kind": "finetune",
        "model": work.pretrained.digest,
        "labels": work.labels,
        "holdout": work.holdout,
        "labelled_cells": cells.hexdigest(),
        **run_inputs(work.store),
    }


def _finetune(work: _Work, run: RunFolder, progress: Progress) -> None:
    """Train, fit the temperature, test, and write split and model."""
    ranks, options, labelled = Ranks(), work.config.train, work.labelled
    torch.manual_seed(options.seed)
    task = _task(work, ranks)
    stream = BatchStream(
        work.store,
        cells=labelled.of("train"),
        vocabulary=work.pretrained.vocabulary,
        global_batch_size=options.global_batch_size,
        seed=options.seed,
        lanes=options.lanes or None,
    )
    with (
        Record.of(run, work.store, RunOptions(), ranks, progress) as record,
        interruption() as asked,
    ):
        loop = Loop(task, stream, options, ranks, record, progress, asked)
        figures = train(loop, lambda: _initialise(task.module.typer, work, progress))
    tested = task.logits(labelled.of("test"))
    calibration = work.config.calibration
    confidence = fit_confidence(task.outputs, work.store, labelled, calibration, options.seed, tested)
    if confidence.scaling.kind != calibration:
        progress.say(_no_vector(labelled))
    facts = {
        "labels": work.labels,
        "holdout": work.holdout,
        "split": labelled.sizes,
        "n_without_label": labelled.n_without_label,
        "validation": figures,
        "test": figures_of(*tested),
        "calibration": {"kind": confidence.scaling.kind, "errors": confidence.errors},
    }
    info = _info(work, confidence, facts)
    if info.novel_rate != work.config.novel_rate:
        progress.say(_no_rate(work.config.novel_rate, confidence))
    pretrained = work.pretrained
    typer = task.module.typer
    encoder = typer.encoder_and_pool(info.linformer_trained)
    model = Model(info, pretrained.vocabulary, pretrained.islands, encoder, typer, known=confidence.known)
    write_split(Path(run.location) / SPLIT_FILE, work.store, labelled)
    write_model(run.model, model, finetuned_card(info, model.vocabulary))


def _task(work: _Work, ranks: Ranks) -> FinetuneTask:
    """Pretrained encoder and new head, its start still to be set."""
    pretrained, labelled, config = work.pretrained, work.labelled, work.config
    n_types = len(labelled.types)
    head = build_head(config.head, pretrained.info.encoder, len(pretrained.vocabulary), n_types)
    if config.freeze_encoder and head.reads_encoder and not pretrained.info.linformer_trained:
        raise ConfigError(
            f"--freeze-encoder: the head reads the Linformer, which pretraining did not train ({pretrained.path}); "
            "leave --freeze-encoder out, or pretrain with --set reads=gate or another objective"
        )
    if config.freeze_encoder or not head.reads_encoder:
        pretrained.encoder.linformer.requires_grad_(False)
    counts = np.bincount(labelled.codes_of(labelled.of("train")), minlength=n_types)
    weights = torch.from_numpy(class_weights(counts, config.class_weights))
    module = CellTypeModel(CellTyper(pretrained.encoder.linformer, head), weights, labelled).to(ranks.device)
    attend = pretrained.info.encoder.attend if head.reads_encoder else "open"
    lister = TokenLister(work.store, pretrained.vocabulary, attend)
    return FinetuneTask(module, config, lister, work.store, labelled)


def _initialise(typer: CellTyper, work: _Work, progress: Progress) -> None:
    """Start a pooled head from the pretrained pooled layer; without one, from idf and SVD of the training cells."""
    if not isinstance(typer.head, PooledHead):
        return
    pretrained = work.pretrained.encoder.pool
    if pretrained is not None:
        typer.head.pool.start_from(pretrained)
        return
    training, vocabulary = work.labelled.of("train"), work.pretrained.vocabulary
    counts = count_open(work.store, training, progress)[vocabulary.islands]
    idf = inverse_document_frequency(counts, len(training))
    rank, seed = work.config.head.pooled, work.config.train.seed
    matrix = CellMatrix(work.store, vocabulary, training, idf)
    svd = truncated_svd(matrix, rank, seed, torch.get_num_threads(), progress)
    typer.head.pool.initialise(torch.from_numpy(idf), torch.from_numpy(svd.components * svd.singular_values))


def class_weights(counts: NDArray[np.int64], rule: str) -> NDArray[np.float32]:
    """Weight of each type in the loss, float32 [n_types].

    counts: training cells of each type, all above 0
    balanced: n / (types x count); paper: (1 - frequency)^2, as annATAC's released code; none: 1
    """
    frequency = counts / counts.sum()
    if rule == "balanced":
        return (1 / (len(counts) * frequency)).astype(np.float32)
    return ((1 - frequency) ** 2 if rule == "paper" else np.ones(len(counts))).astype(np.float32)


def _no_vector(labelled: LabelledCells) -> str:
    codes = labelled.codes_of(labelled.of("val"))
    counts = np.bincount(codes, minlength=len(labelled.types))
    return (
        f"calibration=vector: found {counts.min():,} val cells of {labelled.types[int(counts.argmin())]!r}, expected "
        f"{VECTOR_CELLS} of each type; one temperature is fitted instead"
    )


def _novelty_rule(config: FinetuneConfig, confidence: Confidence) -> tuple[str, float | None]:
    """Score and rate of the model's own rule: those of the settings, unless it has too few calib cells for the rate."""
    rate = config.novel_rate
    if rate is not None and confidence.known.n_calib < fewest_calib(rate):
        return PAPER_SCORE, None
    return config.novelty, rate


def _no_rate(rate: float | None, confidence: Confidence) -> str:
    assert rate is not None
    return (
        f"novel_rate={rate:g}: found {confidence.known.n_calib:,} calib cells, expected at least "
        f"{fewest_calib(rate):,} to tell what is so rare; the model calls novel what has a low confidence instead"
    )


def _info(work: _Work, confidence: Confidence, facts: dict[str, Any]) -> ModelInfo:
    labelled, before = work.labelled, work.pretrained.info.provenance
    before_trained = work.pretrained.info.linformer_trained
    reads = work.config.head.kind != "pooled" or work.config.head.reads != "none"
    counts = Counter(labelled.types[code] for code in labelled.codes_of(labelled.of("train")))
    novelty, novel_rate = _novelty_rule(work.config, confidence)
    return replace(
        work.pretrained.info,
        pool=None,
        linformer_trained=before_trained or (reads and not work.config.freeze_encoder),
        head=work.config.head,
        labels=labelled.types,
        temperature=confidence.scaling.temperature,
        scales=confidence.scaling.scales,
        biases=confidence.scaling.biases,
        novel_threshold=work.config.novel_threshold,
        novelty=novelty,
        novel_rate=novel_rate,
        calibration_errors=confidence.errors,
        provenance={
            "made_by": made_by(),
            "kind": "finetuned",
            **facts,
            "samples": sample_facts(work.store),
            "training_cells_per_type": {name: counts[name] for name in labelled.types},
            "class_weights": work.config.class_weights,
            "seed": work.config.train.seed,
            "pretraining_cells": earlier_sight(before, work.store),
            "pretrained": {"digest": work.pretrained.digest, **before},
        },
    )


def _report(run: RunFolder) -> FinetuneReport:
    info = read_model(run.model).info
    facts = info.provenance
    return FinetuneReport(
        Path(run.model),
        info.labels,
        facts["split"],
        facts["n_without_label"],
        info.temperature,
        facts["validation"],
        facts["test"],
    )
