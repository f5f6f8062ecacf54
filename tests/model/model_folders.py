"""Small models with random weights for the tests of the model folder and the cell typer."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from annatac_scale.genome.islands import IslandSpace
from annatac_scale.model.cell_typer import CellTyper, HeadConfig, build_head
from annatac_scale.model.encoder import Encoder
from annatac_scale.model.folder import Model, ModelInfo, vocabulary_islands
from annatac_scale.model.linformer import EncoderConfig, Linformer
from annatac_scale.model.novelty import SCORES, TRENDED, DepthTrend, KnownCells
from annatac_scale.model.profiles import Profiles
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.vocabulary import Vocabulary

N_SPACE, LABELS = 30, ("B cell", "T cell", "été")
CHROMOSOMES = ("1", "2", "10")
GENES = ["", "7", "NA", 'A,"B"', "nan", "Gm1"]
HEADS = [
    None,
    HeadConfig("pooled", pooled=5),
    HeadConfig("cnn", hidden=(7, 6)),
    HeadConfig("subtype", (6, 5, 4)),
    HeadConfig("linear", pooled=5),
]
MODEL_FILES = {"config.json", "weights.safetensors", "positions.safetensors", "islands.tsv.gz", "README.md"}
TYPER_FILES = MODEL_FILES | {"labels.json", "calibration.json", "known_cells.safetensors"}


def toy_space(width_bp: int = 5000, assembly: str = "toy") -> IslandSpace:
    """30 islands on chromosomes whose names are not to be taken for numbers."""
    start = np.arange(N_SPACE, dtype=np.int64) % 10 * width_bp
    genes = np.array([GENES[i % len(GENES)] for i in range(N_SPACE)], object)
    chrom = np.repeat(np.arange(3, dtype=np.int32), 10)
    return IslandSpace(assembly, CHROMOSOMES, width_bp, "all", chrom, start, start + width_bp, genes)


def toy_model(head: HeadConfig | None, labels: tuple[str, ...] = LABELS, **encoder: Any) -> Model:
    """A model of 20 of the islands, width 8, one layer; frozen positions are random too."""
    sizes: dict[str, Any] = {"width": 8, "layers": 1, "heads": 2, "head_dim": 4, "k": 4, "ff": 16}
    choices = {"attend": "open", "norm": "pre", "positions": "frozen", **encoder}
    config = EncoderConfig(**sizes, **choices)
    space = toy_space()
    islands = np.sort(np.random.default_rng(0).choice(N_SPACE, 20, replace=False)).astype(np.int32)
    vocabulary = Vocabulary(space.sha256, N_SPACE, islands)
    torch.manual_seed(1)
    network = Linformer(config, len(vocabulary), torch.randn(len(vocabulary), config.width))
    encoder, typer = Encoder(network), None
    if head is not None:
        typer = CellTyper(network, build_head(head, config, len(vocabulary), len(labels)))
        randomise(typer)
        encoder = typer.encoder_and_pool(True)
    info = ModelInfo(
        assembly=space.assembly,
        width_bp=space.width_bp,
        selection=space.selection,
        counting="insertion",
        space_sha256=space.sha256,
        n_space=N_SPACE,
        preset="tiny",
        encoder=config,
        head=head,
        labels=labels if head is not None else (),
        temperature=1.7 if head is not None else 1.0,
        scales=(1.5, 0.75, 1.0)[: len(labels)] if head is not None else (),
        biases=(0.25, -0.25, 0.0)[: len(labels)] if head is not None else (),
        novel_threshold=0.4 if head is not None else 0.5,
        novelty="knn" if head is not None else "max_probability",
        novel_rate=0.1 if head is not None else None,
        calibration_errors={"calib": {"before": 0.25, "after": 0.125}} if head is not None else {},
        provenance={"seed": 3, "figures": {"accuracy": 0.1}, "stores": ["atlas.zarr"]},
    )
    known = (
        None if typer is None else toy_known(len(labels), typer.head.classifier.in_features, len(vocabulary))
    )
    return Model(info, vocabulary, vocabulary_islands(space, vocabulary), encoder, typer, known=known)


def toy_known(n_types: int, channels: int, n_islands: int, n_calib: int = 12) -> KnownCells:
    """Random values, none of them alike, so that none can be lost or swapped unnoticed."""
    rng = np.random.default_rng(5)

    def draw(*shape: int) -> NDArray[np.float32]:
        return rng.normal(size=shape).astype(np.float32)

    return KnownCells(
        means=draw(n_types, channels),
        whitening=draw(channels, channels),
        references=draw(7, channels),
        reference_codes=rng.integers(0, n_types, 7).astype(np.int32),
        profiles=Profiles(-abs(draw(n_islands, n_types))),
        trends={name: DepthTrend(*map(float, abs(draw(6)))) for name in TRENDED},
        chances=draw(n_calib),
        codes=rng.integers(0, n_types, n_calib).astype(np.int32),
        scores={name: draw(n_calib) for name in SCORES},
        n_open=rng.integers(0, N_SPACE, n_calib).astype(np.int32),
    )


def randomise(module: torch.nn.Module) -> None:
    """Every parameter and buffer random and not zero, so that none can be lost unnoticed."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.copy_(torch.rand_like(tensor) + 0.1)


def toy_batch(counts: tuple[int, ...] = (5, 0, 20, 1)) -> Batch:
    """Cells with that many open islands of 20."""
    rng = np.random.default_rng(2)
    islands = [np.sort(rng.choice(20, n, replace=False)) for n in counts]
    flat = np.concatenate([np.empty(0, int), *islands]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    tokens = rng.integers(1, 6, len(flat)).astype(np.uint8)
    return Batch(np.arange(len(counts)), offsets, flat, tokens)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    """One digit or letter of the text changed, which leaves JSON valid; else a byte in the middle."""
    at = max(data.find(b'": ') + 3, len(data) // 2) if data.startswith((b"{", b"[")) else len(data) // 2
    while not chr(data[at]).isalnum():
        at += 1
    return data[:at] + (b"1" if data[at : at + 1] != b"1" else b"2") + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": cut,
    "changed": flip,
    "emptied": lambda data: b"",
    "lengthened": lambda data: data + b"x",
}


def resigned(config: dict[str, Any]) -> bytes:
    """config.json with the digest of its content, as one who knows the format could write it."""
    content = {key: value for key, value in config.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}).encode()
