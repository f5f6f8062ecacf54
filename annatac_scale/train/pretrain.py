"""Pretraining: masked open islands predicted by the encoder, on the cells of a store."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from annatac_scale.errors import ConfigError, InputError
from annatac_scale.model.cell_typer import batch_tokens
from annatac_scale.model.folder import Model, ModelInfo, read_model, vocabulary_islands, write_model
from annatac_scale.model.heads import LossSum, MaskedIslandHead
from annatac_scale.model.linformer import Linformer
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.schema import N_LEVELS
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import NOT_COUNTED, Batch
from annatac_scale.stream.loader import BatchStream
from annatac_scale.stream.masking import ClosedSampler, mask
from annatac_scale.stream.selection import sequential
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.stream.vocabulary import Vocabulary, count_open
from annatac_scale.train.card import pretrained_card
from annatac_scale.train.checkpoint import RunFolder
from annatac_scale.train.loop import Ranks, TrainOptions, micro_batches, train
from annatac_scale.train.positions import (
    CellMatrix,
    inverse_document_frequency,
    position_table,
    truncated_svd,
)
from annatac_scale.train.presets import PretrainConfig, with_tokens_per_cell
from annatac_scale.train.provenance import made_by, run_inputs, sample_facts, store_identity

MOST_LEVEL_ONE = 0.97
"""Above this share of one level among the open islands, guessing the level is guessing a constant."""

VALIDATION_EPOCH = 2**31
"""Masks of the validation cells are those of an epoch that training never reaches: the same each time."""

_SPLIT = 1
"""Sets the random numbers of the split of cells apart from others of the same seed."""


@dataclass(frozen=True)
class PretrainReport:
    """What a pretraining run made. figures: of the validation cells; n_parameters: trained ones of the encoder."""

    model: Path
    n_cells: int
    n_islands: int
    n_parameters: int
    level_shares: tuple[float, ...]
    figures: dict[str, float]


class MaskedIslandModel(nn.Module):
    """Encoder and masked-island head; maps a prepared batch to summed losses."""

    def __init__(self, encoder: Linformer, head: MaskedIslandHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, batch: Batch) -> dict[str, LossSum]:
        """Losses by name over the targets of a masked batch."""
        device = self.head.level.weight.device
        queries, levels, opened = _targets(batch)
        hidden = self.encoder(*batch_tokens(batch, device), queries.to(device))
        return self.head.masked_losses(
            hidden, levels.to(device), None if opened is None else opened.to(device)
        )


def _targets(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positions of tokens with a target, and the targets there."""
    assert batch.level_targets is not None
    asked = batch.level_targets != NOT_COUNTED
    if batch.open_targets is not None:
        asked = asked | (batch.open_targets != NOT_COUNTED)
    at = np.flatnonzero(asked)
    opened = None if batch.open_targets is None else torch.from_numpy(batch.open_targets[at]).long()
    return torch.from_numpy(at), torch.from_numpy(batch.level_targets[at]).long(), opened


class PretrainTask:
    """Masked-island pretraining as the loop sees it.

    validation: the validation cells, this rank's share of them
    sampler: draws the closed islands of objective "level+open"
    """

    def __init__(
        self,
        module: MaskedIslandModel,
        config: PretrainConfig,
        lister: TokenLister,
        sampler: ClosedSampler | None,
        validation: BatchStream,
    ) -> None:
        self.module = module
        self.loss_weights = dict.fromkeys(config.objective.split("+"), 1.0)
        self._config = config
        self._lister = lister
        self._sampler = sampler
        self._validation = validation

    def parameter_groups(self, options: TrainOptions) -> list[dict[str, Any]]:
        """The tables with a row for each island, E and learned positions, and all else, each at its rate."""
        encoder = self.module.encoder
        tables = [p for p in (encoder.projection, encoder.positions) if p.requires_grad]
        ids = {id(table) for table in tables}
        rest = [p for p in self.module.parameters() if p.requires_grad and id(p) not in ids]
        return [
            {"params": rest, "lr": options.learning_rate},
            {"params": tables, "lr": options.table_learning_rate, "weight_decay": options.weight_decay},
        ]

    def prepare(self, batch: Batch, epoch: int) -> Batch:
        """Mask the batch and list the tokens to attend to."""
        return self._lister(mask(batch, self._config.train.seed, epoch, self._config.masking, self._sampler))

    def counts(self, batch: Batch) -> dict[str, int]:
        """Masked islands, and those asked open or closed."""
        counts = {"level": int(np.count_nonzero(batch.level_targets != NOT_COUNTED))}
        if batch.open_targets is not None:
            counts["open"] = int(np.count_nonzero(batch.open_targets != NOT_COUNTED))
        return counts

    @torch.no_grad()
    def validate(self, ranks: Ranks) -> dict[str, float]:
        """Mean losses and accuracies on the held-out cells; the score is the negative sum of the losses."""
        self.module.eval()
        names = list(self.loss_weights)
        totals = np.zeros((len(names), 3))
        self._validation.set_epoch(0)
        for batch in self._validation:
            prepared = self.prepare(batch, VALIDATION_EPOCH)
            for piece in micro_batches(prepared, self._config.train.micro_tokens):
                losses = self.module(piece)
                totals += [
                    [losses[name].sum.item(), losses[name].count.item(), losses[name].correct.item()]
                    for name in names
                ]
        totals = np.reshape(ranks.sum(totals.ravel().tolist()), totals.shape)
        means = totals[:, [0, 2]] / np.maximum(totals[:, 1:2], 1)
        figures = {"score": -float(means[:, 0].sum())}
        for name, (loss, accuracy) in zip(names, means.tolist(), strict=True):
            figures |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        return figures


@dataclass(frozen=True, eq=False)
class PretrainData:
    """What pretraining takes from a store.

    training, validation: int64 cell ids, increasing
    counts: int64 [len(vocabulary)], training cells in which an island is open
    level_shares: of the levels 1 to 5 among the open islands of the training cells
    """

    store: IslandStore
    training: NDArray[np.int64]
    validation: NDArray[np.int64]
    vocabulary: Vocabulary
    counts: NDArray[np.int64]
    level_shares: tuple[float, ...]

    @classmethod
    def of(cls, store: IslandStore, config: PretrainConfig, progress: Progress) -> "PretrainData":
        """Split the cells and count; two passes over the store."""
        training, validation = _split(store, config)
        counts = count_open(store, training, progress)
        vocabulary = Vocabulary.fit(store, training, config.min_cells, counts)
        shares = level_shares(store, training, progress)
        return cls(store, training, validation, vocabulary, counts[vocabulary.islands], shares)

    @property
    def tokens_per_cell(self) -> float:
        """Mean open islands of a training cell."""
        return float(self.counts.sum() / len(self.training))

    def stream(self, cells: NDArray[np.int64], options: TrainOptions, ranks: Ranks) -> BatchStream:
        """Batches of the given cells, this rank's share."""
        return BatchStream(
            self.store,
            cells=cells,
            vocabulary=self.vocabulary,
            global_batch_size=options.global_batch_size,
            seed=options.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            lanes=options.lanes or None,
        )


def pretrain(
    store: IslandStore, out: Path | str, config: PretrainConfig, progress: Progress | None = None
) -> PretrainReport:
    """Pretrain an encoder on all cells of a store; the model folder is ``out``/model.

    Run again with the same arguments, it goes on after the last complete epoch; a complete run is left as it is.
    Raises ConfigError when the objective can teach nothing on this data or the run is of other settings, InputError
    when there are too few cells.
    """
    progress = progress or Silent()
    run = pretrain_folder(store, out, config, world_size=1)
    with run.use():
        if run.complete:
            progress.say(f"{run.path}: complete already; its model stays as it is")
        else:
            pretrain_rank(store, run, config, Ranks(), progress)
    return report_of(run)


def pretrain_folder(
    store: IslandStore, out: Path | str, config: PretrainConfig, world_size: int
) -> RunFolder:
    """The folder of a pretraining run, not yet in use."""
    return RunFolder(out, config, {"kind": "pretrain", **run_inputs(store), "world_size": world_size})


def report_of(run: RunFolder) -> PretrainReport:
    """What a complete pretraining run made."""
    model = read_model(run.model)
    facts = model.info.provenance
    n_parameters = sum(p.numel() for p in model.encoder.parameters())
    shares = tuple(facts["level_shares"])
    return PretrainReport(
        run.model, facts["n_training_cells"], len(model.vocabulary), n_parameters, shares, facts["validation"]
    )


def pretrain_rank(
    store: IslandStore, run: RunFolder, config: PretrainConfig, ranks: Ranks, progress: Progress
) -> None:
    """What each rank does; rank 0 writes into ``run``, which its caller holds. Errors are the same on every rank."""
    data = PretrainData.of(store, config, progress)
    progress.say(
        "levels of open islands: "
        + ", ".join(f"{level}: {share:.1%}" for level, share in enumerate(data.level_shares, 1))
    )
    _check_objective(config, data.level_shares)
    config = with_tokens_per_cell(config, data.tokens_per_cell)
    torch.manual_seed(config.train.seed)
    task = pretrain_task(data, config, ranks)
    encoder = task.module.encoder
    if ranks.rank == 0 and not run.has("last"):
        _place(encoder, data, config, progress)
    progress.say(
        f"{len(data.training):,} cells to train, {len(data.validation):,} to validate, "
        f"{len(data.vocabulary):,} islands, {sum(p.numel() for p in encoder.parameters()):,} parameters to train, "
        f"attend {config.encoder.attend}"
    )
    stream = data.stream(data.training, config.train, ranks)
    figures = train(task, stream, config.train, run, ranks, progress)
    if ranks.rank == 0:
        model = _model(data, config, encoder, figures)
        write_model(run.model, model, pretrained_card(model.info, model.vocabulary))


def pretrain_task(data: PretrainData, config: PretrainConfig, ranks: Ranks) -> PretrainTask:
    """A new model, its positions still to be placed, and its validation."""
    encoder = Linformer(config.encoder, len(data.vocabulary))
    head = MaskedIslandHead(config.encoder.width, config.objective)
    module = MaskedIslandModel(encoder, head).to(ranks.device)
    lister = TokenLister(data.store, data.vocabulary, config.encoder.attend)
    sampler = None
    if config.objective == "level+open":
        sampler = ClosedSampler(data.counts, lister.measured, lister.first_cells)
    return PretrainTask(module, config, lister, sampler, data.stream(data.validation, config.train, ranks))


def _place(encoder: Linformer, data: PretrainData, config: PretrainConfig, progress: Progress) -> None:
    """Set the encoder's positions to the SVD of the training cells."""
    idf = None
    if config.position_values == "idf":
        idf = inverse_document_frequency(data.counts, len(data.training))
    width, seed = config.encoder.width, config.train.seed
    matrix = CellMatrix(data.store, data.vocabulary, data.training, idf)
    svd = truncated_svd(matrix, width, seed, torch.get_num_threads(), progress)
    with torch.no_grad():
        encoder.positions.copy_(torch.from_numpy(position_table(svd, width, encoder.token_rms)))


def _model(
    data: PretrainData, config: PretrainConfig, encoder: Linformer, figures: dict[str, float]
) -> Model:
    info = ModelInfo(
        **store_identity(data.store),
        preset=config.preset,
        encoder=config.encoder,
        provenance={
            "made_by": made_by(),
            "kind": "pretrained",
            "objective": config.objective,
            "samples": sample_facts(data.store),
            "n_training_cells": len(data.training),
            "level_shares": list(data.level_shares),
            "seed": config.train.seed,
            "validation": figures,
        },
    )
    return Model(info, data.vocabulary, vocabulary_islands(data.store.space, data.vocabulary), encoder)


def level_shares(
    store: IslandStore, cells: NDArray[np.int64], progress: Progress | None = None
) -> tuple[float, ...]:
    """Share of each level among the open islands of the cells. Raises InputError where none is open."""
    totals = np.zeros(N_LEVELS, np.int64)
    with (progress or Silent()).task("Counting levels", len(cells), "cells") as advance:
        for ids, rows in sequential(store, cells):
            totals += np.bincount(rows.levels, minlength=N_LEVELS + 1)[1:]
            advance(len(ids))
    if not totals.sum():
        raise InputError(f"{store.path}: no cell has an open island; check the peaks and the assembly")
    return tuple((totals / totals.sum()).tolist())


def _check_objective(config: PretrainConfig, shares: tuple[float, ...]) -> None:
    if config.objective == "level" and max(shares) > MOST_LEVEL_ONE:
        level = int(np.argmax(shares)) + 1
        raise ConfigError(
            f"objective level: {max(shares):.1%} of the open islands are at level {level}, so that predicting levels "
            "teaches nothing; use --set objective=level+open"
        )


def _split(store: IslandStore, config: PretrainConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation cells."""
    if not store.n_cells:
        raise InputError(f"{store.path}: holds no cell; add a sample with `annatac convert`")
    n_validation = max(1, round(store.n_cells * config.validation_share))
    if store.n_cells - n_validation < 1:
        raise InputError(
            f"{store.path}: {store.n_cells} cells are too few to pretrain on; expected at least 2"
        )
    order = np.random.default_rng([config.train.seed, _SPLIT]).permutation(store.n_cells)
    return np.sort(order[n_validation:]), np.sort(order[:n_validation])
