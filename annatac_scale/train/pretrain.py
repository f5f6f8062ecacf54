"""Pretraining: masked open islands predicted by the encoder, on the cells of a store."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from annatac_scale.errors import ConfigError, InputError
from annatac_scale.model.cell_typer import batch_tokens
from annatac_scale.model.folder import Model, ModelInfo, vocabulary_islands, write_model
from annatac_scale.model.heads import LossSum, MaskedIslandHead
from annatac_scale.model.linformer import Encoder
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.schema import N_LEVELS
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import NOT_COUNTED, Batch
from annatac_scale.stream.loader import IslandStream
from annatac_scale.stream.masking import ClosedSampler, mask
from annatac_scale.stream.selection import sequential
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.stream.vocabulary import Vocabulary, count_open
from annatac_scale.train.card import pretrained_card
from annatac_scale.train.checkpoint import RunFolder
from annatac_scale.train.loop import Ranks, TrainOptions, micro_batches, train
from annatac_scale.train.positions import inverse_document_frequency, position_table, truncated_svd
from annatac_scale.train.presets import PretrainConfig, with_tokens_per_cell

MOST_LEVEL_ONE = 0.97
"""Above this share of one level among the open islands, guessing the level is guessing a constant."""

VALIDATION_EPOCH = 2**31
"""Masks of the validation cells are those of an epoch that training never reaches: the same each time."""


@dataclass(frozen=True)
class PretrainReport:
    """What a pretraining run made."""

    model: Path
    n_cells: int
    n_islands: int
    n_parameters: int
    level_shares: tuple[float, ...]
    figures: dict[str, float]


class MaskedIslandModel(nn.Module):
    """Encoder and masked-island head; maps a prepared batch to summed losses."""

    def __init__(self, encoder: Encoder, head: MaskedIslandHead) -> None:
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
    """Masked-island pretraining as the loop sees it."""

    def __init__(
        self,
        module: MaskedIslandModel,
        config: PretrainConfig,
        lister: TokenLister,
        sampler: ClosedSampler | None,
    ) -> None:
        self.module = module
        self.loss_weights = (
            {"level": 1.0, "open": 1.0} if config.objective == "level+open" else {"level": 1.0}
        )
        self._config = config
        self._lister = lister
        self._sampler = sampler
        self._validation: IslandStream | None = None

    def validate_on(self, stream: IslandStream) -> None:
        """Take the validation batches from ``stream``, this rank's share of them."""
        self._validation = stream

    def parameter_groups(self, options: TrainOptions) -> list[dict[str, Any]]:
        """The encoder's projection E, a table with a row for each island, and all else, each at its rate."""
        table = self.module.encoder.projection
        rest = [p for p in self.module.parameters() if p.requires_grad and p is not table]
        return [
            {"params": rest, "lr": options.learning_rate},
            {"params": [table], "lr": options.table_learning_rate},
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
        assert self._validation is not None
        self.module.eval()
        self._validation.set_epoch(0)
        totals = dict.fromkeys(self.loss_weights, np.zeros(3))
        for batch in self._validation:
            for piece in micro_batches(
                self.prepare(batch, VALIDATION_EPOCH), self._config.train.micro_tokens
            ):
                for name, loss in self.module(piece).items():
                    totals[name] = totals[name] + [loss.sum.item(), loss.count.item(), loss.correct.item()]
        flat = ranks.sum([float(v) for name in self.loss_weights for v in totals[name]])
        figures: dict[str, float] = {"score": 0.0}
        for i, name in enumerate(self.loss_weights):
            loss_sum, count, correct = flat[3 * i : 3 * i + 3]
            figures[f"{name}_loss"] = loss_sum / max(count, 1.0)
            figures[f"{name}_accuracy"] = correct / max(count, 1.0)
            figures["score"] -= figures[f"{name}_loss"]
        return figures


def pretrain(
    store: IslandStore,
    out: Path | str,
    config: PretrainConfig,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> PretrainReport:
    """Pretrain an encoder on all cells of a store; the model folder is ``out``/model.

    Run again with the same arguments, it goes on after the last complete epoch.
    Raises ConfigError when the objective can teach nothing on this data, InputError when there are too few cells.
    """
    ranks, progress = ranks or Ranks(), progress or Silent()
    if ranks.rank != 0:
        progress = Silent()
    samples = {name: sample.x_sha256 for name, sample in store.samples.items()}
    run = RunFolder(out, config, {"kind": "pretrain", "samples": samples, "world_size": ranks.world_size})
    training, validation = _split(store, config)
    counts = count_open(store, training, progress)
    vocabulary = Vocabulary.fit(store, training, config.min_cells, counts)
    shares = level_shares(store, training)
    progress.say(_histogram(shares))
    _check_objective(config, shares)
    config = with_tokens_per_cell(config, counts[vocabulary.islands].sum() / len(training))
    torch.manual_seed(config.train.seed)
    encoder = _encoder(store, vocabulary, counts, training, config, progress)
    head = MaskedIslandHead(config.encoder.width, config.objective)
    module = MaskedIslandModel(encoder, head).to(ranks.device)
    lister = TokenLister(store, vocabulary, config.encoder.attend)
    sampler = None
    if config.objective == "level+open":
        sampler = ClosedSampler(counts[vocabulary.islands], lister.measured, lister.first_cells)
    task = PretrainTask(module, config, lister, sampler)
    task.validate_on(_stream(store, validation, vocabulary, config, ranks))
    n_parameters = sum(p.numel() for p in encoder.parameters())
    progress.say(
        f"{len(training):,} cells to train, {len(validation):,} to validate, {len(vocabulary):,} islands, "
        f"{n_parameters:,} trainable parameters, attend {config.encoder.attend}"
    )
    if ranks.rank == 0:
        with run.use():
            return _train(
                store, task, vocabulary, config, (training, shares, n_parameters), run, ranks, progress
            )
    train(task, _stream(store, training, vocabulary, config, ranks), config.train, run, ranks, progress)
    return PretrainReport(run.model, len(training), len(vocabulary), n_parameters, shares, {})


def _train(
    store: IslandStore,
    task: PretrainTask,
    vocabulary: Vocabulary,
    config: PretrainConfig,
    facts: tuple[NDArray[np.int64], tuple[float, ...], int],
    run: RunFolder,
    ranks: Ranks,
    progress: Progress,
) -> PretrainReport:
    training, shares, n_parameters = facts
    stream = _stream(store, training, vocabulary, config, ranks)
    figures = train(task, stream, config.train, run, ranks, progress)
    info = ModelInfo(
        **store_identity(store),
        preset=config.preset,
        encoder=config.encoder,
        provenance={
            "made_by": f"annatac_scale {version('annatac_scale')}",
            "kind": "pretrained",
            "objective": config.objective,
            "samples": {name: sample.digest for name, sample in store.samples.items()},
            "n_training_cells": len(training),
            "level_shares": list(shares),
            "seed": config.train.seed,
            "validation": figures,
        },
    )
    islands = vocabulary_islands(store.space, vocabulary)
    write_model(
        run.model, Model(info, vocabulary, islands, task.module.encoder), pretrained_card(info, vocabulary)
    )
    return PretrainReport(run.model, len(training), len(vocabulary), n_parameters, shares, figures)


def store_identity(store: IslandStore) -> dict[str, Any]:
    """What a model keeps of the store that it was trained on."""
    a = store.attributes
    return {
        "assembly": a["assembly"],
        "width_bp": a["width_bp"],
        "selection": a["selection"],
        "counting": store.counting,
        "space_sha256": store.islands_sha256,
        "n_space": store.n_islands,
    }


def level_shares(store: IslandStore, cells: NDArray[np.int64]) -> tuple[float, ...]:
    """Share of each level among the open islands of the cells."""
    totals = np.zeros(N_LEVELS, np.int64)
    for _, rows in sequential(store, cells):
        totals += np.bincount(rows.levels, minlength=N_LEVELS + 1)[1:]
    if not totals.sum():
        raise InputError(f"{store.path}: no cell has an open island; check the peaks and the assembly")
    return tuple((totals / totals.sum()).tolist())


def _histogram(shares: tuple[float, ...]) -> str:
    return "levels of open islands: " + ", ".join(
        f"{level}: {share:.1%}" for level, share in enumerate(shares, 1)
    )


def _check_objective(config: PretrainConfig, shares: tuple[float, ...]) -> None:
    if config.objective == "level" and max(shares) > MOST_LEVEL_ONE:
        level = int(np.argmax(shares)) + 1
        raise ConfigError(
            f"objective level: {max(shares):.1%} of the open islands are at level {level}, so that predicting levels "
            "teaches nothing; use --set objective=level+open"
        )


def _split(store: IslandStore, config: PretrainConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation cells, each in order of their ids."""
    n_validation = max(1, round(store.n_cells * config.validation_share))
    if store.n_cells - n_validation < 1:
        raise InputError(
            f"{store.path}: {store.n_cells} cells are too few to pretrain on; expected at least 2"
        )
    order = np.random.default_rng([config.train.seed, 1]).permutation(store.n_cells)
    return np.sort(order[n_validation:]), np.sort(order[:n_validation])


def _encoder(
    store: IslandStore,
    vocabulary: Vocabulary,
    counts: NDArray[np.int64],
    training: NDArray[np.int64],
    config: PretrainConfig,
    progress: Progress,
) -> Encoder:
    """A new encoder whose positions are the SVD of the training cells."""
    idf = None
    if config.position_values == "idf":
        idf = inverse_document_frequency(counts[vocabulary.islands], len(training))
    svd = truncated_svd(
        store, vocabulary, training, config.encoder.width, config.train.seed, idf, progress=progress
    )
    encoder = Encoder(config.encoder, len(vocabulary))
    table = position_table(svd, config.encoder.width, encoder.token_rms)
    with torch.no_grad():
        encoder.positions.copy_(torch.from_numpy(table))
    return encoder


def _stream(
    store: IslandStore, cells: NDArray[np.int64], vocabulary: Vocabulary, config: PretrainConfig, ranks: Ranks
) -> IslandStream:
    return IslandStream(
        store,
        cells=cells,
        vocabulary=vocabulary,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
