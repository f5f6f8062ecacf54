"""Small stores, models with random weights, and what those models say of single cells, for the tests of this folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import sparse

from annatac_scale.genome.islands import IslandSpace
from annatac_scale.model.cell_typer import CellTyper, HeadConfig, build_head
from annatac_scale.model.encoder import Encoder
from annatac_scale.model.folder import Model, ModelInfo, vocabulary_islands, write_model
from annatac_scale.model.linformer import EncoderConfig, Linformer
from annatac_scale.model.novelty import SCORES, TRENDED, DepthTrend, KnownCells
from annatac_scale.model.profiles import Profiles
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, create_store
from annatac_scale.stream.vocabulary import Vocabulary

N_ISLANDS, TYPES = 40, ("astro", "B cell", "neuron")
VOCABULARY = np.arange(1, N_ISLANDS - 4, dtype=np.int32)
TEMPERATURE, NOVEL_THRESHOLD = 0.5, 0.8


def small_space() -> IslandSpace:
    start = np.arange(N_ISLANDS, dtype=np.int64) * 5000
    genes, chrom = np.full(N_ISLANDS, "", object), np.zeros(N_ISLANDS, np.int32)
    return IslandSpace("toy", ("chr1",), 5000, "all", chrom, start, start + 5000, genes)


@dataclass
class SmallSample:
    """levels: uint8 [n, N_ISLANDS]; measured: bool [N_ISLANDS]"""

    levels: np.ndarray
    measured: np.ndarray


def draw_sample(n_cells: int, seed: int) -> SmallSample:
    """Cells of very unequal depth; the first is closed, the second open only outside the vocabulary."""
    rng = np.random.default_rng(seed)
    measured = rng.random(N_ISLANDS) < 0.9
    measured[0] = True
    opened = rng.random((n_cells, N_ISLANDS)) < rng.uniform(0, 0.6, (n_cells, 1))
    levels = (rng.integers(1, 6, opened.shape) * opened * measured).astype(np.uint8)
    levels[:1] = 0
    levels[1:2] = 0
    levels[1:2, 0] = 3
    return SmallSample(levels, measured)


def add_sample(path: Path, name: str, sample: SmallSample, obs: pd.DataFrame | None = None) -> None:
    rows = OpenIslands.from_csr(sparse.csr_matrix(sample.levels))
    if obs is None:
        obs = pd.DataFrame(index=[f"{name}-{i}" for i in range(len(rows))])
    with SampleWriter(path, name, len(rows)) as writer:
        for shard in range(-(-len(rows) // 4000)):
            writer.write_shard(shard, rows[shard * 4000 : (shard + 1) * 4000])
        writer.commit(obs, sample.measured, {"kind": "fragments"})


def small_store(path: Path, samples: dict[str, SmallSample], counting: str = "insertion") -> IslandStore:
    create_store(path, small_space(), counting)
    for name, sample in samples.items():
        add_sample(path, name, sample)
    return IslandStore.open(path)


def small_known(n_calib: int, types: tuple[str, ...] = TYPES, channels: int = 6, seed: int = 3) -> KnownCells:
    """What a model with a pooled head may keep: random values."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return KnownCells(
        means=draw(len(types), channels),
        whitening=draw(channels, channels),
        references=draw(60, channels),
        reference_codes=np.repeat([0, 2, 1], [40, 19, 1]).astype(np.int32),
        trends={name: DepthTrend(1.5, -0.25, 0.75, 0.125, 0.5, 3.0) for name in TRENDED},
        chances=rng.uniform(0, 1, n_calib).astype(np.float32),
        codes=rng.integers(0, len(types), n_calib).astype(np.int32),
        scores={
            name: (rng.uniform(0, 1, n_calib) if name == "max_probability" else draw(n_calib) * 3).astype(
                np.float32
            )
            for name in SCORES
        },
        n_open=rng.integers(0, N_ISLANDS, n_calib).astype(np.int32),
        profiles=Profiles(-np.abs(draw(len(VOCABULARY), len(types))) - 5),
    )


def small_model(
    path: Path | str,
    head: str | None = "pooled",
    types: tuple[str, ...] = TYPES,
    attend: str = "open",
    seed: int = 0,
    space: IslandSpace | None = None,
    vocabulary: np.ndarray = VOCABULARY,
    known: KnownCells | None = None,
    reads: str = "gate",
) -> Model:
    """A written model of some islands, width 8, one layer, random weights; returns it as it was in memory."""
    space = small_space() if space is None else space
    config = EncoderConfig(8, 1, 2, 4, 4, 16, attend, "pre", "frozen")
    islands = Vocabulary(space.sha256, len(space), vocabulary)
    torch.manual_seed(seed)
    encoder = Linformer(config, len(islands), torch.randn(len(islands), 8))
    typing: dict[str, Any] = {}
    typer = None
    if head is not None:
        chosen = HeadConfig(head, hidden=(9, 7) if head != "pooled" else (), pooled=6, reads=reads)
        typer = CellTyper(encoder, build_head(chosen, config, len(islands), len(types)))
        with torch.no_grad():
            for parameter in typer.head.parameters():
                parameter.copy_(torch.randn_like(parameter))
        typing = {
            "head": chosen,
            "labels": types,
            "temperature": TEMPERATURE,
            "novel_threshold": NOVEL_THRESHOLD,
        }
    info = ModelInfo(
        space.assembly, 5000, space.selection, "insertion", space.sha256, len(space), "tiny", config, **typing
    )
    model = Model(info, islands, vocabulary_islands(space, islands), Encoder(encoder), typer, known=known)
    write_model(path, model, "card")
    return model


def one_by_one(model: Model, sample: SmallSample) -> np.ndarray:
    """Logits [n, types] of each cell alone, straight from encoder and head."""
    number = {island: i for i, island in enumerate(model.vocabulary.islands.tolist())}
    logits = []
    model.typer.eval()
    for row in sample.levels:
        listed = np.flatnonzero(sample.measured if model.info.encoder.attend == "all" else row)
        listed = [island for island in listed.tolist() if island in number]
        tokens = torch.tensor([int(row[island]) for island in listed], dtype=torch.int64)
        islands = torch.tensor([number[island] for island in listed], dtype=torch.int64)
        offsets = torch.tensor([0, len(listed)])
        with torch.no_grad():
            hidden = model.encoder.linformer(tokens, islands, offsets)
            logits.append(model.typer.head(hidden, tokens, islands, offsets)[0].numpy())
    return np.array(logits).reshape(-1, len(model.info.labels))


def write_split(path: Path, rows: list[tuple[str, str, str]], digests: dict[str, str]) -> None:
    """split.parquet as `finetune` writes it: rows of sample, barcode, split."""
    columns = zip(("sample", "barcode", "split"), zip(*rows, strict=True), strict=True)
    table = pa.table({name: list(values) for name, values in columns})
    pq.write_table(table.replace_schema_metadata({"store_digests": json.dumps(digests)}), path)
