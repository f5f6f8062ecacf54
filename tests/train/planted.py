"""Toy stores with a planted structure, for the tests of this folder: each cell type opens islands of its own."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from annatac_scale.genome.islands import IslandSpace
from annatac_scale.progress import Advance, Silent
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, create_store
from annatac_scale.train.presets import FinetuneConfig, PretrainConfig, finetune_preset, pretrain_preset

N_ISLANDS = 60
TYPES = ("astro", "neuron")


def space(n_islands: int = N_ISLANDS) -> IslandSpace:
    start = np.arange(n_islands, dtype=np.int64) * 5000
    genes, chrom = np.full(n_islands, "", object), np.zeros(n_islands, np.int32)
    return IslandSpace("toy", ("chr1",), 5000, "all", chrom, start, start + 5000, genes)


@dataclass(frozen=True)
class Cells:
    """levels: uint8 [n, islands]; obs: one row a cell, indexed by barcode, with cell_type and donor"""

    levels: np.ndarray
    obs: pd.DataFrame


def draw_cells(n: int, seed: int = 0, own: float = 0.8, other: float = 0.05, binary: bool = False) -> Cells:
    """Cells of two types; one opens mostly the first half of the islands, the other the second. One is all closed."""
    rng = np.random.default_rng(seed)
    types = rng.integers(0, 2, n)
    half = np.arange(N_ISLANDS) >= N_ISLANDS // 2
    chance = np.where(half == types[:, None], own, other)
    levels = (rng.random((n, N_ISLANDS)) < chance) * (1 if binary else rng.integers(1, 6, (n, N_ISLANDS)))
    levels[0] = 0
    obs = pd.DataFrame(
        {"cell_type": np.array(TYPES)[types], "donor": rng.choice(["D1", "D2", "D3"], n)},
        index=pd.Index([f"cell{seed}-{i}" for i in range(n)], name="barcode"),
    )
    return Cells(levels.astype(np.uint8), obs)


def write_store(path: Path, samples: dict[str, Cells], measured: np.ndarray | None = None) -> IslandStore:
    n_islands = next(iter(samples.values())).levels.shape[1]
    create_store(path, space(n_islands), "insertion")
    if measured is None:
        measured = np.full(n_islands, True)
    for name, cells in samples.items():
        rows = OpenIslands.from_csr(sparse.csr_matrix(cells.levels))
        with SampleWriter(path, name, len(rows)) as writer:
            for shard in range(-(-len(rows) // 4000)):
                writer.write_shard(shard, rows[shard * 4000 : (shard + 1) * 4000])
            writer.commit(cells.obs, measured, {"kind": "fragments"})
    return IslandStore.open(path)


def small_pretraining(
    epochs: int = 2, attend: str = "open", positions: str = "frozen", **options: object
) -> PretrainConfig:
    """The tiny preset with a width of 16 and one layer, which learns to tell levels and closed islands."""
    preset = pretrain_preset("tiny")
    encoder = replace(
        preset.encoder,
        width=16,
        layers=1,
        heads=2,
        head_dim=8,
        k=8,
        ff=32,
        attend=attend,
        positions=positions,
    )
    train = {
        "epochs": epochs, "global_batch_size": 32, "learning_rate": 1e-2, "table_learning_rate": 1e-2,
        "micro_tokens": 400, "warmup_steps": 5,
    }  # fmt: skip
    own = {name: options.pop(name) for name in list(options) if name in PretrainConfig.__dataclass_fields__}
    asked = {
        "objective": "level+open",
        "reads": "gate",
        "mask_fraction": 0.15,
        "mask_keep": 0.1,
        "mask_level_cap": 0.5,
    }
    return replace(
        preset,
        encoder=encoder,
        train=replace(preset.train, **{**train, **options}),
        **{"validation_share": 0.1, **asked, **own},
    )


def small_finetuning(head: str = "pooled", epochs: int = 3, **options: object) -> FinetuneConfig:
    preset = finetune_preset("tiny", head)
    train = {
        "epochs": epochs,
        "min_steps": 0,
        "global_batch_size": 32,
        "warmup_steps": 2,
        "micro_tokens": 1000,
    }
    small_head = replace(preset.head, pooled=8, reads="gate", hidden=() if head == "pooled" else (16, 8))
    own = {name: options.pop(name) for name in list(options) if name in FinetuneConfig.__dataclass_fields__}
    return replace(preset, head=small_head, train=replace(preset.train, **{**train, **options}), **own)


class StopAfter(Silent):
    """Interrupts the training, as Ctrl-C does, when it says that ``epoch`` is over."""

    def __init__(self, epoch: int) -> None:
        self._start = f"epoch {epoch}:"

    def say(self, line: str) -> None:
        if line.startswith(self._start):
            raise KeyboardInterrupt


class StopInStep(Silent):
    """Calls ``stop`` in the training when so many steps are done, and in each one after."""

    def __init__(self, steps: int, stop) -> None:
        self._left = steps
        self._stop = stop

    @contextmanager
    def task(self, name, total, unit):
        yield _Counted(self._advance if name == "Training" else lambda n: None)

    def _advance(self, n: int) -> None:
        self._left -= n
        if self._left <= 0:
            self._stop()


class _Counted(Advance):
    def __init__(self, count) -> None:
        self._count = count

    def __call__(self, n: int, lines: int = 0, sample: str = "") -> None:
        self._count(n)

    def found(self, n: int, sample: str = "") -> None:
        self._count(n)


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def files_of(folder: Path) -> dict[str, bytes]:
    """Names and content of the files of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}
