"""Models of a row: pretrained, or as pretraining starts, kept by digest; fine-tuned; asked for types and vectors."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rows import digest
from sets import Stores, alone

from annatac_scale.config import from_dict
from annatac_scale.model.encoder import Encoder
from annatac_scale.model.folder import (
    Model,
    ModelInfo,
    PoolConfig,
    read_model,
    vocabulary_islands,
    write_model,
)
from annatac_scale.model.novelty import Outputs
from annatac_scale.progress import Silent
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import CLOSED_TOKEN, Batch
from annatac_scale.stream.selection import sequential
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.train.card import pretrained_card
from annatac_scale.train.finetune import finetune
from annatac_scale.train.loop import micro_batches
from annatac_scale.train.presets import FinetuneConfig, PretrainConfig, with_tokens_per_cell
from annatac_scale.train.pretrain import PretrainData, initialise, pretrain, pretrain_task
from annatac_scale.train.provenance import made_by, sample_facts, store_identity
from annatac_scale.train.ranks import Ranks

MICRO_TOKENS = 100_000

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass
class Clock:
    """CPU seconds of this process, by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        begin = time.process_time()
        try:
            yield
        finally:
            spent = time.process_time() - begin
            self.seconds[what] = round(self.seconds.get(what, 0.0) + spent, 2)


@dataclass(frozen=True)
class Models:
    """The model folders of the work folder. clock: takes the time, also of a model that was there already."""

    stores: Stores
    clock: Clock

    def pretrained(self, store: str, select: str, config: Mapping[str, Any], trained: bool) -> Path:
        """A model of a store's cells; ``trained`` False: as pretraining starts, its SVD included.

        config: all of a PretrainConfig as plain values
        """
        key = {"store": store, "select": select, "pretrain": config, "trained": trained}
        folder = self.stores.work / "models" / digest(key)
        took = folder.with_suffix(".json")
        with alone(folder.with_suffix(".lock"), took):
            if not took.exists():
                clock = Clock()
                with clock.on("pretrain"):
                    opened, whole = self.stores.open(store, select), from_dict(PretrainConfig, config)
                    if trained:
                        pretrain(opened, folder, whole)
                        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                    else:
                        _write_untrained(opened, folder / "model", whole)
                aside = took.with_suffix(".part")
                aside.write_text(json.dumps({**key, "seconds": clock.seconds}, indent=1))
                aside.rename(took)
        self.clock.seconds |= json.loads(took.read_text())["seconds"]
        return folder / "model"

    def with_pool(self, model: Path, store: str, select: str, start: Mapping[str, Any]) -> Path:
        """The model; where pretraining had no pooled layer, with the one that pretraining by ``start`` begins with."""
        whole = read_model(model)
        if whole.encoder.pool is not None:
            return model
        folder = model.with_name("model_with_pool")
        with alone(folder.with_suffix(".lock"), folder):
            if not folder.exists():
                other = read_model(
                    Models(self.stores, Clock()).pretrained(store, select, start, trained=False)
                )
                info = replace(whole.info, pool=other.info.pool)
                encoder = Encoder(whole.encoder.linformer, other.encoder.pool)
                made = Model(info, whole.vocabulary, whole.islands, encoder)
                write_model(folder, made, pretrained_card(info, made.vocabulary))
        return folder

    def finetuned(
        self,
        store: IslandStore,
        model: Path,
        labels: str,
        holdout: float | str,
        config: Mapping[str, Any],
        log: list[dict[str, Any]] | None = None,
    ) -> Model:
        """A fine-tuned model; its folder is not kept. log: gets the lines of its metrics."""
        key = {"model": str(model), "labels": labels, "holdout": holdout, "finetune": config}
        # Rows run side by side, and labels in memory have one name.
        out = self.stores.work / "runs" / f"{digest(key)}-{os.getpid()}"
        shutil.rmtree(out, ignore_errors=True)
        with self.clock.on("finetune"):
            finetune(store, model, labels, out, from_dict(FinetuneConfig, config), holdout)
        made = read_model(out / "model")
        if log is not None:
            log += [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(out)
        return made

    def states(self, model: Model, store: IslandStore, cells: Ints, fits: bool = False) -> Outputs:
        """What a fine-tuned model says of cells in any order. fits: also how well they fit its profiles"""
        assert model.typer is not None
        typer, order = model.typer, np.argsort(cells)
        told = []
        with self.clock.on("predict"):
            for batch in _batches(model, store, cells[order]):
                opened = _opened(batch)
                of_batch = [*typer.predict_with_embedding(batch), opened.n_open]
                if fits:
                    assert model.known is not None
                    of_batch.append(model.known.profiles.fit(opened))
                told.append(of_batch)
        back = np.argsort(order)
        return Outputs(*(np.concatenate(parts)[back] for parts in zip(*told, strict=True)))

    def types(self, model: Model, store: IslandStore, cells: Ints) -> NDArray[np.str_]:
        """The likeliest type of each cell."""
        assert model.typer is not None
        with self.clock.on("predict"):
            logits = [model.typer.predict(batch) for batch in _batches(model, store, cells)]
        return np.array(model.info.labels)[np.concatenate(logits).argmax(axis=1)]

    def embedding(self, model: Path, store: IslandStore, cells: Ints) -> Floats:
        """The vector of each cell that ats.Encoder gives, [n, channels]."""
        whole = read_model(model)
        with self.clock.on("embed"), torch.inference_mode():
            parts = [whole.encoder(batch).embedding.numpy() for batch in _batches(whole, store, cells)]
        return np.concatenate(parts)


def _opened(batch: Batch) -> OpenIslands:
    """Open islands of each cell, among the tokens that are listed."""
    is_open = batch.tokens > CLOSED_TOKEN
    before = np.concatenate([[0], np.cumsum(is_open)])
    return OpenIslands(before[batch.offsets], batch.islands[is_open], batch.tokens[is_open])


def _batches(model: Model, store: IslandStore, cells: Ints) -> Iterator[Batch]:
    """The cells, which must be in order, with the tokens that the model attends to."""
    lister = TokenLister(store, model.vocabulary, model.info.encoder.attend)
    new_of_old = model.vocabulary.new_of_old()
    for ids, rows in sequential(store, cells):
        yield from micro_batches(lister(Batch.from_open(ids, rows.renumber(new_of_old))), MICRO_TOKENS)


def _write_untrained(store: IslandStore, path: Path, config: PretrainConfig) -> None:
    data = PretrainData.of(store, config, Silent())
    config = with_tokens_per_cell(config, data.tokens_per_cell)
    torch.manual_seed(config.train.seed)
    encoder = pretrain_task(data, config, Ranks()).module.encoder
    initialise(encoder, data, config, Silent(), torch.get_num_threads())
    provenance = {
        "made_by": made_by(),
        "kind": "pretrained",
        "objective": "none: as pretraining starts",
        "samples": sample_facts(store),
        "n_training_cells": len(data.training),
        "level_shares": list(data.level_shares),
        "seed": config.train.seed,
        "validation": {},
    }
    info = ModelInfo(
        **store_identity(store),
        preset=config.preset,
        encoder=config.encoder,
        pool=PoolConfig(config.pooled, config.reads) if encoder.pool is not None else None,
        provenance=provenance,
    )
    model = Model(info, data.vocabulary, vocabulary_islands(store.space, data.vocabulary), encoder)
    write_model(path, model, pretrained_card(info, data.vocabulary))
