"""Pretraining on the cells of a store: what is asked of masked islands, by encoder and pooled layer."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from annatac_scale.errors import ConfigError, InputError
from annatac_scale.model.encoder import Encoder
from annatac_scale.model.folder import (
    Model,
    ModelInfo,
    PoolConfig,
    read_model,
    vocabulary_islands,
    write_model,
)
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.place import Location
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.cell_matrix import CellMatrix
from annatac_scale.stream.loader import BatchStream
from annatac_scale.stream.masking import mask
from annatac_scale.stream.negatives import ClosedSampler
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.stream.vocabulary import Vocabulary, count_levels
from annatac_scale.train.card import pretrained_card
from annatac_scale.train.interruption import Interruption, interruption
from annatac_scale.train.loop import Loop, micro_batches, train
from annatac_scale.train.masked_islands import MaskedIslandModel, n_targets
from annatac_scale.train.positions import (
    Svd,
    inverse_document_frequency,
    position_table,
    truncated_svd,
)
from annatac_scale.train.presets import PretrainConfig, with_tokens_per_cell
from annatac_scale.train.provenance import made_by, run_inputs, sample_facts, store_identity
from annatac_scale.train.ranks import Ranks
from annatac_scale.train.record import Record
from annatac_scale.train.run_folder import RunFolder
from annatac_scale.train.run_options import RunOptions
from annatac_scale.train.train_options import TrainOptions, autocast

MOST_LEVEL_ONE = 0.97
"""Above this share of one level among the open islands, guessing the level is guessing a constant."""

VALIDATION_EPOCH = 2**31
"""Masks of the validation cells are those of an epoch that training never reaches: the same each time."""

_SPLIT = 1
"""Sets the random numbers of the split of cells apart from others of the same seed."""


@dataclass(frozen=True)
class PretrainReport:
    """What a pretraining run made. figures: of the validation cells; n_parameters: trained ones of the encoder."""

    model: Location
    n_cells: int
    n_islands: int
    n_parameters: int
    level_shares: tuple[float, ...]
    figures: dict[str, float]


class PretrainTask:
    """Masked-island pretraining as the loop sees it.

    validation: the validation cells, this rank's share of them
    sampler: draws the closed islands that objectives "open" and "cell" ask
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
        self.loss_weights = dict.fromkeys(config.objectives, 1.0)
        self._config = config
        self._lister = lister
        self._sampler = sampler
        self._validation = validation

    def parameter_groups(self, options: TrainOptions) -> list[dict[str, Any]]:
        """The tables with a row for each island and all else, each at its rate."""
        linformer, pool, cell_head = (
            self.module.encoder.linformer,
            self.module.encoder.pool,
            self.module.cell_head,
        )
        tables = [linformer.projection, linformer.positions]
        tables += [] if pool is None else [pool.table]
        tables += [] if cell_head is None else [cell_head.table, cell_head.bias]
        tables = [p for p in tables if p.requires_grad]
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
        """Targets by objective."""
        found = n_targets(batch)
        return {name: found[name] for name in self.loss_weights}

    def check_targets(self, ranks: Ranks) -> None:
        """Raise InputError, on every rank, where an objective asks nothing of the validation cells."""
        totals = dict.fromkeys(self.loss_weights, 0.0)
        begin = self._validation.state_dict()
        for batch in self._validation:
            for name, n in self.counts(self.prepare(batch, VALIDATION_EPOCH)).items():
                totals[name] += n
            if all(totals.values()):
                break
        self._validation.load_state_dict(begin)
        nothing = [name for name, n in zip(totals, ranks.sum(list(totals.values())), strict=True) if not n]
        if nothing:
            raise InputError(
                f"objective {nothing[0]}: found nothing to ask of the validation cells: too few open islands; "
                "hold out more cells (--set validation_share=0.2), mask more (--set mask_level_cap=1.0), or convert "
                "with more islands (--select all)"
            )

    @torch.no_grad()
    def validate(self, ranks: Ranks, after_batch: Callable[[], None]) -> dict[str, float]:
        """Mean losses and accuracies on the held-out cells; the score is the negative sum of the losses."""
        self.module.eval()
        names = list(self.loss_weights)
        totals = np.zeros((len(names), 3))
        self._validation.set_epoch(0)
        for batch in self._validation:
            prepared = self.prepare(batch, VALIDATION_EPOCH)
            for piece in micro_batches(prepared, self._config.train.micro_tokens):
                with autocast(self._config.train.precision, ranks.device):
                    losses = self.module(piece)
                totals += [
                    [losses[name].sum.item(), losses[name].count.item(), losses[name].correct.item()]
                    for name in names
                ]
            after_batch()
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
    def of(
        cls, store: IslandStore, config: PretrainConfig, progress: Progress, ranks: Ranks | None = None
    ) -> "PretrainData":
        """Split the cells and count; one pass over the store, of which each rank takes its share."""
        ranks = ranks or Ranks()
        training, validation = _split(store, config)
        own = np.array_split(training, ranks.world_size)[ranks.rank]
        by_level = ranks.sum_counts(count_levels(store, own, progress))
        counts, totals = by_level.sum(0), by_level.sum(1)
        vocabulary = Vocabulary.fit(store, training, config.min_cells, counts)
        shares = tuple((totals / totals.sum()).tolist())
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
    store: IslandStore,
    out: Location,
    config: PretrainConfig,
    progress: Progress | None = None,
    options: RunOptions | None = None,
) -> PretrainReport:
    """Pretrain an encoder on all cells of a store; the model folder is ``out``/model.

    In this process, or as one of those that torchrun started: each calls it, and the first one shows progress and
    writes. Run again with the same arguments, it goes on after the newest checkpoint, on as many ranks as there are
    then; a complete run is left as it is.

    Raises ConfigError when the objective can teach nothing on this data or the run is of other settings, InputError
    when there are too few cells, RunInterruptedError when a signal asked the process to end.
    """
    options, progress = options or RunOptions(), progress or Silent()
    run = pretrain_folder(store, out, config)
    with Ranks.launched() as ranks:
        if ranks.rank:
            progress = Silent()
        with run.use(progress.say) if ranks.rank == 0 else nullcontext():
            if all(ranks.gather(run.complete)):
                progress.say(f"{run.location}: complete already; its model stays as it is")
            else:
                with interruption() as asked:
                    pretrain_rank(store, run, config, options, ranks, progress, asked)
            ranks.wait()
    return report_of(run)


def pretrain_folder(store: IslandStore, out: Location, config: PretrainConfig) -> RunFolder:
    """The folder of a pretraining run, not yet in use."""
    return RunFolder(out, config, {"kind": "pretrain", **run_inputs(store)})


def report_of(run: RunFolder) -> PretrainReport:
    """What a complete pretraining run made."""
    model = read_model(run.model)
    facts = model.info.provenance
    shares = tuple(facts["level_shares"])
    return PretrainReport(
        run.model,
        facts["n_training_cells"],
        len(model.vocabulary),
        facts["n_parameters"],
        shares,
        facts["validation"],
    )


def pretrain_rank(
    store: IslandStore,
    run: RunFolder,
    config: PretrainConfig,
    options: RunOptions,
    ranks: Ranks,
    progress: Progress,
    asked: Interruption,
) -> None:
    """What each rank does; rank 0 writes into ``run``, which its caller holds. asked: whether to end before the end"""
    data = PretrainData.of(store, config, progress, ranks)
    progress.say(
        "levels of open islands: "
        + ", ".join(f"{level}: {share:.1%}" for level, share in enumerate(data.level_shares, 1))
    )
    _check_objective(config, data.level_shares)
    config = with_tokens_per_cell(config, data.tokens_per_cell)
    torch.manual_seed(config.train.seed)
    task = pretrain_task(data, config, ranks)
    encoder = task.module.encoder
    progress.say(
        f"{len(data.training):,} cells to train, {len(data.validation):,} to validate, "
        f"{len(data.vocabulary):,} islands, {_n_trained(task.module):,} parameters to train, {_what_is_trained(config)}"
    )
    task.check_targets(ranks)

    def start() -> None:
        initialise(encoder, data, config, progress, ranks.threads_of_first)
        task.module.start_heads(data.store, data.vocabulary, data.training)

    stream = data.stream(data.training, config.train, ranks)
    with Record.of(run, store, options, ranks, progress) as record:
        figures = train(Loop(task, stream, config.train, ranks, record, progress, asked), start)
    if ranks.rank == 0:
        model = _model(data, config, encoder, figures)
        write_model(run.model, model, pretrained_card(model.info, model.vocabulary))


def pretrain_task(data: PretrainData, config: PretrainConfig, ranks: Ranks) -> PretrainTask:
    """A new model, its positions still to be placed, and its validation."""
    module = MaskedIslandModel(config, len(data.vocabulary)).to(ranks.device)
    lister = TokenLister(
        data.store, data.vocabulary, config.encoder.attend if config.runs_encoder else "open"
    )
    sampler = None
    if config.asks_closed:
        sampler = ClosedSampler(data.counts, lister.measured, lister.first_cells)
    return PretrainTask(module, config, lister, sampler, data.stream(data.validation, config.train, ranks))


def initialise(
    encoder: Encoder, data: PretrainData, config: PretrainConfig, progress: Progress, threads: int
) -> None:
    """Start positions and pooled layer from the SVD of the training cells; the same for any number of threads."""
    idf = inverse_document_frequency(data.counts, len(data.training))
    width, pool = config.encoder.width, encoder.pool
    ranks = {config.position_values: width}
    if pool is not None:
        ranks["idf"] = max(ranks.get("idf", 0), pool.table.shape[1])
    svds: dict[str, Svd] = {}
    for values, rank in ranks.items():
        matrix = CellMatrix(data.store, data.vocabulary, data.training, idf if values == "idf" else None)
        svds[values] = truncated_svd(matrix, rank, config.train.seed, threads, progress)
    table = position_table(svds[config.position_values].leading(width), width, encoder.linformer.token_rms)
    with torch.no_grad():
        encoder.linformer.positions.copy_(torch.from_numpy(table))
    if pool is not None:
        svd = svds["idf"].leading(pool.table.shape[1])
        pool.initialise(torch.from_numpy(idf), torch.from_numpy(svd.components * svd.singular_values))


def _what_is_trained(config: PretrainConfig) -> str:
    if not config.runs_encoder:
        return "all in the pooled layer; the Linformer is not trained: --set reads=gate lets the pooled layer read it"
    return f"attend {config.encoder.attend}"


def _n_trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _model(data: PretrainData, config: PretrainConfig, encoder: Encoder, figures: dict[str, float]) -> Model:
    info = ModelInfo(
        **store_identity(data.store),
        preset=config.preset,
        linformer_trained=config.runs_encoder,
        encoder=config.encoder,
        pool=PoolConfig(config.pooled, config.reads) if encoder.pool is not None else None,
        provenance={
            "made_by": made_by(),
            "kind": "pretrained",
            "objective": config.objective,
            "samples": sample_facts(data.store),
            "n_training_cells": len(data.training),
            "n_parameters": _n_trained(encoder),
            "level_shares": list(data.level_shares),
            "seed": config.train.seed,
            "validation": figures,
        },
    )
    return Model(info, data.vocabulary, vocabulary_islands(data.store.space, data.vocabulary), encoder)


def _check_objective(config: PretrainConfig, shares: tuple[float, ...]) -> None:
    if config.objectives == ("level",) and max(shares) > MOST_LEVEL_ONE:
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
