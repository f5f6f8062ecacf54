"""What prediction, the bare model, or the published loop does in a benchmark, in a process of its own.

    python benchmarks/predict_work.py TASK.json

TASK.json: the fields of ``Task``. Ends with one line of JSON: cells, and the CPU and wall seconds that they took.
"""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain_encoder import PlainTyper

from annatac_scale.annotate.batches import BATCH_TOKENS, SUMMED_BATCH_TOKENS, cut_batches
from annatac_scale.annotate.predict import predict
from annatac_scale.annotate.predictor import one_thread_an_operation
from annatac_scale.memory import keep_freed_memory
from annatac_scale.model.cell_typer import CellTyper, HeadConfig, build_head
from annatac_scale.model.encoder import Encoder
from annatac_scale.model.folder import Model, ModelInfo, read_model, vocabulary_islands, write_model
from annatac_scale.model.island_sums import SummedHead
from annatac_scale.model.linformer import Linformer
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.schema import SHARD_BLOCKS
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.vocabulary import Vocabulary
from annatac_scale.train.presets import pretrain_preset

N_TYPES = 30


@dataclass(frozen=True)
class Task:
    """work: model, predict, tokens, sums or loop; cells: of the loop and of the bare model; threads: of torch

    preset, head: of the model; reads: what its pooled layer reads of the encoder
    """

    work: str
    store: str
    model: str
    out: str = ""
    preset: str = "tiny"
    head: str = "linear"
    reads: str = "none"
    cells: int = 0
    threads: int = 1
    least_s: float = 20.0


def make_model(task: Task) -> dict[str, Any]:
    """A model of all islands of the store with random weights: what they are costs nothing."""
    store = IslandStore.open(task.store)
    space, chosen = store.space, pretrain_preset(task.preset)
    tokens = float(sum(sample.n_open for sample in store.samples.values()) / max(store.n_cells, 1))
    config = replace(chosen.encoder, attend="open", tokens_per_cell=tokens)
    vocabulary = Vocabulary(space.sha256, len(space), np.arange(len(space), dtype=np.int32))
    torch.manual_seed(0)
    linformer = Linformer(config, len(vocabulary), torch.randn(len(vocabulary), config.width))
    head = HeadConfig(task.head, pooled=chosen.pooled, reads=task.reads)
    typer = CellTyper(linformer, build_head(head, config, len(vocabulary), N_TYPES))
    with torch.no_grad():
        for parameter in typer.head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    info = ModelInfo(
        assembly=space.assembly,
        width_bp=space.width_bp,
        selection=space.selection,
        counting=store.counting,
        space_sha256=space.sha256,
        n_space=len(space),
        preset=task.preset,
        encoder=config,
        head=head,
        labels=tuple(f"type {number:02}" for number in range(N_TYPES)),
    )
    model = Model(info, vocabulary, vocabulary_islands(space, vocabulary), Encoder(linformer), typer)
    write_model(task.model, model, "a model of the benchmark: random weights\n")
    return {"parameters": sum(parameter.numel() for parameter in typer.parameters())}


def timed(work: Callable[[], int]) -> dict[str, Any]:
    """What some cells took."""
    cpu, wall = time.process_time(), time.perf_counter()
    cells = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "cells": cells,
        "cpu_ms_per_cell": cpu / cells * 1e3,
        "cells_per_cpu_s": cells / cpu,
        "cells_per_s": cells / wall,
    }


def run_predict(task: Task) -> dict[str, Any]:
    """The whole of ``predict``: opening, reading, the model, writing."""
    return timed(lambda: predict(task.store, task.model, task.out).n_cells)


def run_tokens(task: Task) -> dict[str, Any]:
    """The model alone, on batches of tokens: the encoder where the head reads it."""
    typer = read_model(task.model).typer
    assert typer is not None

    def once(cells: OpenIslands) -> None:
        typer.predict_with_embedding(Batch.from_open(np.arange(len(cells)), cells))

    return _bare(task, once, BATCH_TOKENS)


def run_sums(task: Task) -> dict[str, Any]:
    """The model alone, as sums over open islands: what ``predict`` does where the head reads no encoder."""
    typer = read_model(task.model).typer
    assert typer is not None
    return _bare(task, SummedHead(typer.head), SUMMED_BATCH_TOKENS)


def _bare(task: Task, once: Callable[[OpenIslands], object], most_tokens: int) -> dict[str, Any]:
    """Over and over on the batches of a few parts that lie in memory; as many threads as predict."""
    store = IslandStore.open(task.store)
    batches = [
        part.take(chosen)
        for part in _parts(store, task.cells)
        for chosen in cut_batches(part.n_open, most_tokens)
    ]
    n_cells = sum(map(len, batches))
    keep_freed_memory()  # as predict does

    def work() -> int:
        begin, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - begin < task.least_s:
            list(pool.map(once, batches))
            done += n_cells
        return done

    with one_thread_an_operation(), ThreadPoolExecutor(task.threads) as pool:
        list(pool.map(once, batches[:2]))
        return timed(work)


def _parts(store: IslandStore, n_cells: int) -> list[OpenIslands]:
    blocks = store.blocks()[: max(1, -(-n_cells // 250))]
    rows = [store.read_block(block) for block in blocks]
    cuts = range(0, len(rows), SHARD_BLOCKS)
    return [OpenIslands.concatenate(rows[cut : cut + SHARD_BLOCKS]) for cut in cuts]


def run_loop(task: Task) -> dict[str, Any]:
    """The published way: one cell after the other, all its islands as tokens."""
    store, model = IslandStore.open(task.store), read_model(task.model)
    plain = PlainTyper(model.info.encoder, len(model.vocabulary), N_TYPES).eval()
    dense = store.read(np.arange(task.cells)).to_csr(store.n_islands).toarray()
    tokens = torch.from_numpy(dense.astype(np.int64))

    def work() -> int:
        for row in tokens:
            plain(row[None]).softmax(-1).argmax()
        return len(tokens)

    with torch.inference_mode():
        plain(tokens[:1])
        return timed(work)


WORKS = {
    "model": make_model,
    "predict": run_predict,
    "tokens": run_tokens,
    "sums": run_sums,
    "loop": run_loop,
}


def main() -> None:
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(task.threads)
    print(json.dumps(WORKS[task.work](task)))


if __name__ == "__main__":
    main()
