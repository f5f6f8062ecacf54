"""What the presets' encoders cost on this machine for the cells of a store: a short measurement beside arithmetic."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from annatac_scale.errors import InputError
from annatac_scale.memory import keep_freed_memory
from annatac_scale.model.cost import (
    CellTokens,
    activation_bytes,
    forward_flops,
    parameters,
    training_bytes,
    training_flops,
)
from annatac_scale.model.linformer import CHOICES, EncoderConfig, Linformer
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.schema import N_LEVELS
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import MASK_TOKEN
from annatac_scale.stream.vocabulary import Vocabulary, count_open
from annatac_scale.train.presets import PRESETS, PretrainConfig, pretrain_preset
from annatac_scale.train.ranks import default_device
from annatac_scale.train.train_options import uses_bf16

MOST_ISLANDS = 65_536
"""Rows of the tables that are measured with: a cell's cost does not depend on how many more there are."""

MOST_CELLS = 128
"""Cells of a call, where their tokens would leave place for more."""

LEAST_S = 0.5
"""Seconds in which a call is repeated, after a small one; the fastest counts, since others may use the machine too."""

_HEAD = (
    "preset", "attend", "parameters", "tables", "GFLOP a cell", "forward", "memory a cell", "cells/s", "forward",
    "hours",
)  # fmt: skip


@dataclass(frozen=True)
class PresetCost:
    """The encoder of one preset on the cells of a store.

    in_pretraining: whether the preset's pretraining runs it; where not, figures are those of a pooled layer reading it
    parameters: of the encoder; table_mb: of E, as in its gradient; held_mb: weights, gradients and AdamW's moments
    gflop_training, gflop_forward: a cell, in pretraining (forward and backward) and in prediction
    mb_per_cell: activations of a cell in pretraining, in fp32
    cells_per_s_training, cells_per_s_forward: measured, without the optimizer and without reading
    hours_per_million: of pretraining a million cells for an epoch, by that
    """

    preset: str
    attend: str
    in_pretraining: bool
    parameters: int
    table_mb: float
    held_mb: float
    gflop_training: float
    gflop_forward: float
    mb_per_cell: float
    cells_per_s_training: float
    cells_per_s_forward: float
    hours_per_million: float

    def texts(self) -> list[str]:
        """As a line of the table."""
        return [
            self.preset,
            self.attend,
            f"{self.parameters:,}",
            f"{self.table_mb:,.1f} MB",
            f"{self.gflop_training:,.3f}",
            f"{self.gflop_forward:,.3f}",
            f"{self.mb_per_cell:,.2f} MB",
            _three_digits(self.cells_per_s_training),
            _three_digits(self.cells_per_s_forward),
            _three_digits(self.hours_per_million),
        ]


@dataclass(frozen=True)
class CostReport:
    """Costs of all presets' encoders for the cells of a store.

    open_per_cell: mean open islands of a cell; n_islands: of the vocabulary that pretraining on all cells would have
    device: what was measured on; threads: of torch, on the CPU; precision: that of forward and backward there
    """

    path: str
    n_cells: int
    open_per_cell: float
    n_islands: int
    device: str
    threads: int
    precision: str
    presets: list[PresetCost]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return asdict(self)

    def text(self) -> str:
        """All of it for people."""
        rows = [list(_HEAD), *(cost.texts() for cost in self.presets)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if i < 2 else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        threads = f", {self.threads} thread{'s'[: self.threads > 1]}" if self.device == "cpu" else ""
        idle = dict.fromkeys(one.preset for one in self.presets if not one.in_pretraining)
        return "\n".join(
            [
                self.path,
                f"  cells     {self.n_cells:,}, {self.open_per_cell:,.1f} open islands a cell",
                f"  islands   {self.n_islands:,} in the vocabulary",
                f"  measured  on {self.device}{threads}, {self.precision}",
                "",
                *lines,
                "",
                "GFLOP, cells/s: forward and backward of pretraining, then forward of prediction; hours: of a million",
                "cells for an epoch. Memory: activations in fp32; weights and optimizer are held besides.",
                *(
                    f"Preset {name} pretrains without its encoder, far faster, unless it is told to."
                    for name in idle
                ),
            ]
        )


def _three_digits(value: float) -> str:
    """As 12,300, 12.3 or 0.0123."""
    rounded = f"{value:.2e}"
    digits = max(2 - int(rounded.partition("e")[2]), 0)
    return f"{float(rounded):,.{digits}f}"


def cost(store: IslandStore, progress: Progress | None = None) -> CostReport:
    """What the encoder costs in pretraining and prediction, by preset and ``attend``.

    Takes one pass over the store, then some seconds.

    Raises InputError where no island is open in enough cells to be in a vocabulary.
    """
    progress = progress or Silent()
    device = default_device()
    keep_freed_memory()  # as training does
    counts = count_open(store, None, progress)
    if not store.n_cells:
        raise InputError(f"{store.path}: holds no cell; add a sample with `annatac convert`")
    min_cells = min(pretrain_preset(PRESETS[0]).min_cells, store.n_cells)
    vocabulary = Vocabulary.fit(store, None, min_cells, counts)
    n_open = float(counts[vocabulary.islands].sum() / store.n_cells)
    chosen = [_attending(pretrain_preset(name), attend) for name in PRESETS for attend in CHOICES["attend"]]
    costs = []
    with progress.task("Measuring", len(chosen), "encoders") as advance:
        for config in chosen:
            costs.append(_cost_of(config, n_open, len(vocabulary), device))
            advance(1)
    bf16 = uses_bf16(chosen[0].train.precision, device)
    return CostReport(
        path=str(store.path),
        n_cells=store.n_cells,
        open_per_cell=n_open,
        n_islands=len(vocabulary),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        precision="bf16" if bf16 else "fp32",
        presets=costs,
    )


def _attending(config: PretrainConfig, attend: str) -> PretrainConfig:
    closed = config.encoder.closed if attend == "open" else "none"
    return replace(config, encoder=replace(config.encoder, attend=attend, closed=closed))


def _cost_of(config: PretrainConfig, n_open: float, n_islands: int, device: torch.device) -> PresetCost:
    encoder = config.encoder
    training = _training_tokens(config, n_open, n_islands)
    forward = CellTokens.to_predict(encoder.attend, n_open, n_islands)
    sizes = training_bytes(encoder, n_islands)
    trained = _cells_per_s(config, training, training_flops, n_islands, device, trains=True)
    return PresetCost(
        preset=config.preset,
        attend=encoder.attend,
        in_pretraining=config.runs_encoder,
        parameters=parameters(encoder, n_islands),
        table_mb=sizes["tables"] / 1e6,
        held_mb=sum(sizes[name] for name in ("weights", "gradients", "optimizer")) / 1e6,
        gflop_training=training_flops(encoder, training) / 1e9,
        gflop_forward=forward_flops(encoder, forward) / 1e9,
        mb_per_cell=activation_bytes(encoder, training) / 1e6,
        cells_per_s_training=trained,
        cells_per_s_forward=_cells_per_s(config, forward, forward_flops, n_islands, device, trains=False),
        hours_per_million=1e6 / trained / 3600,
    )


def _training_tokens(config: PretrainConfig, n_open: float, n_islands: int) -> CellTokens:
    """Those of a mean cell; all are computed where a pooled layer reads them."""
    masking = config.masking
    negatives = masking.negatives if config.asks_tokens else 0
    tokens = CellTokens.to_train(config.encoder.attend, n_open, n_islands, masking.fraction, negatives)
    return CellTokens(tokens.listed, tokens.listed) if config.asks_cells else tokens


def _cells_per_s(
    config: PretrainConfig,
    tokens: CellTokens,
    flops: Callable[[EncoderConfig, CellTokens], float],
    n_islands: int,
    device: torch.device,
    *,
    trains: bool,
) -> float:
    """Measured with as many cells as a micro-step takes, at most ``MOST_CELLS``.

    A cell of more tokens than that is measured shortened to them, and its rate lowered by the share of FLOPs left out.
    """
    most = config.train.micro_tokens
    part = min(1.0, most / tokens.listed)
    measured = CellTokens(max(tokens.listed * part, 1.0), tokens.asked * part)
    encoder = Linformer(config.encoder, min(n_islands, MOST_ISLANDS)).to(device)
    bf16 = uses_bf16(config.train.precision, device)
    n_cells = min(max(int(most / measured.listed), 1), MOST_CELLS)
    call = _call(encoder, measured, n_cells, trains=trains, bf16=bf16)
    _call(encoder, CellTokens(2.0, 1.0), 1, trains=trains, bf16=bf16)()  # threads started, gradients in place
    _wait(device)
    seconds = [_seconds(call, device)]
    while sum(seconds) < LEAST_S:
        seconds.append(_seconds(call, device))
    return n_cells / min(seconds) * flops(config.encoder, measured) / flops(config.encoder, tokens)


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin


def _call(
    encoder: Linformer, cell: CellTokens, n_cells: int, *, trains: bool, bf16: bool
) -> Callable[[], None]:
    """One forward of ``n_cells`` cells drawn at random, or a forward and backward from the tokens asked for."""
    device = encoder.projection.device
    generator = torch.Generator().manual_seed(0)
    length = min(max(round(cell.listed), 1), encoder.n_islands)
    islands = torch.cat(list(_drawn(length, encoder.n_islands, n_cells, generator))).to(device)
    tokens = torch.randint(1, N_LEVELS + 1, (len(islands),), generator=generator)
    n_asked = min(max(round(cell.asked * n_cells), 1), len(tokens))
    queries = torch.randperm(len(tokens), generator=generator)[:n_asked].sort().values
    tokens[queries] = MASK_TOKEN
    tokens = tokens.to(device)
    offsets = torch.arange(n_cells + 1) * length

    def call() -> None:
        with torch.set_grad_enabled(trains), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = encoder(tokens, islands, offsets, queries if trains else None)
        if trains:
            hidden.float().square().sum().backward()

    return call


def _drawn(length: int, n_islands: int, n_cells: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(n_cells):
        yield torch.randperm(n_islands, generator=generator)[:length].sort().values


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
