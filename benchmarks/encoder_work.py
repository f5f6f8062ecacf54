"""What the encoder, or the plain reference, does in a benchmark, in a process of its own.

    python benchmarks/encoder_work.py TASK.json

TASK.json: the fields of ``Task``. Ends with one line of JSON. Costs are of forward and backward (``train``) or of
forward alone (``predict``), without the optimizer, after a first call; memory is what one first call takes beyond what
the process held with weights and gradients in place.
"""

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plain_encoder import PlainPretraining, PlainTyper
from torch import Tensor, nn
from torch.nn import functional

from annatac_scale.memory import keep_freed_memory
from annatac_scale.model.cell_typer import CellTyper, HeadConfig, build_head
from annatac_scale.model.linformer import EncoderConfig, Linformer
from annatac_scale.model.ragged import table_rows
from annatac_scale.store.schema import N_LEVELS
from annatac_scale.stream.batch import MASK_TOKEN, NOT_COUNTED
from annatac_scale.train.presets import pretrain_preset

N_TYPES = 30
SPREAD_OF_OPEN = 0.3
"""Cells have this share more or less open islands than the mean, evenly spread."""
MASKED = 0.15


@dataclass(frozen=True)
class Task:
    """work: train, predict or tables; model: plain or ours; cells: of a call; n_open: mean open islands of a cell.

    least_s: seconds that are measured at least
    queries: masked share of the "open" islands, or of "all" islands; head: of predict, cnn or pooled
    """

    work: str
    model: str = "ours"
    preset: str = "paper"
    attend: str = "open"
    n_open: int = 1500
    n_islands: int = 16_657
    cells: int = 1
    queries: str = "open"
    head: str = "cnn"
    precision: str = "fp32"
    checkpoint: bool = False
    compiled: bool = False
    device: str = "cpu"
    least_s: float = 1.0

    def config(self) -> EncoderConfig:
        """The preset's encoder, attending as asked."""
        chosen = pretrain_preset(self.preset).encoder
        tokens = float(self.n_open)
        return dataclasses.replace(
            chosen, attend=self.attend, tokens_per_cell=tokens, checkpoint=self.checkpoint
        )


@dataclass(frozen=True)
class Cells:
    """Cells drawn at random. tokens int64 [T], islands int64 [T], offsets int64 [B + 1]; queries int64 [Q];
    targets int64 [Q], levels from 0."""

    tokens: Tensor
    islands: Tensor
    offsets: Tensor
    queries: Tensor
    targets: Tensor

    @classmethod
    def drawn(cls, task: Task) -> "Cells":
        draw = torch.Generator().manual_seed(0)
        spread = torch.linspace(1 - SPREAD_OF_OPEN, 1 + SPREAD_OF_OPEN, task.cells)
        counts = (spread * task.n_open).round() if task.cells > 1 else torch.tensor([task.n_open])
        counts = counts.long().clamp(1, task.n_islands)[torch.randperm(task.cells, generator=draw)]
        tokens, islands = [], []
        for count in counts.tolist():
            opened = torch.randperm(task.n_islands, generator=draw)[:count].sort().values
            levels = torch.randint(1, N_LEVELS + 1, (count,), generator=draw)
            if task.attend == "all":
                levels = torch.zeros(task.n_islands, dtype=torch.int64).index_copy(0, opened, levels)
                opened = torch.arange(task.n_islands)
            tokens.append(levels)
            islands.append(opened)
        lengths = torch.tensor([0, *map(len, tokens)])
        levels = torch.cat(tokens)
        asked = torch.rand(len(levels), generator=draw) < MASKED
        if task.queries == "open":
            asked &= levels > 0
        queries = asked.nonzero().squeeze(1)
        targets = (levels[queries] - 1).clamp_min(0)
        return cls(
            levels.index_fill(0, queries, MASK_TOKEN), torch.cat(islands), lengths.cumsum(0), queries, targets
        )

    def to(self, device: torch.device) -> "Cells":
        """On a device, offsets on the CPU."""
        moved = {f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)}
        return Cells(**{**moved, "offsets": self.offsets})

    def dense(self, n_islands: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets as [B, N]; of cells that list all islands."""
        targets = torch.full_like(self.tokens, NOT_COUNTED).index_copy(0, self.queries, self.targets)
        return self.tokens.view(-1, n_islands), targets.view(-1, n_islands)


class Pretraining(nn.Module):
    """Ours: levels of the masked islands, and no other token's last layer."""

    def __init__(self, config: EncoderConfig, n_islands: int) -> None:
        super().__init__()
        self.encoder = Linformer(config, n_islands)
        self.level = nn.Linear(config.width, N_LEVELS)

    def forward(
        self, tokens: Tensor, islands: Tensor, offsets: Tensor, queries: Tensor, targets: Tensor
    ) -> Tensor:
        """Summed cross-entropy."""
        hidden = self.encoder(tokens, islands, offsets, queries)
        return functional.cross_entropy(self.level(hidden).float(), targets, reduction="sum")


def module_of(task: Task) -> nn.Module:
    config, n_islands = task.config(), task.n_islands
    if task.work == "train":
        return (PlainPretraining if task.model == "plain" else Pretraining)(config, n_islands)
    if task.model == "plain":
        return PlainTyper(config, n_islands, N_TYPES)
    head = build_head(HeadConfig(task.head), config, n_islands, N_TYPES)
    return CellTyper(Linformer(config, n_islands), head)


def arguments_of(task: Task, cells: Cells) -> tuple[Tensor, ...]:
    trains = task.work == "train"
    if task.model == "plain":
        return cells.dense(task.n_islands) if trains else cells.dense(task.n_islands)[:1]
    given = (cells.tokens, cells.islands, cells.offsets)
    return (*given, cells.queries, cells.targets) if trains else given


def call_of(task: Task) -> Callable[[], None]:
    """One call of the module over the cells, with weights, gradients and cells in place."""
    torch.manual_seed(0)
    device = torch.device(task.device)
    module = module_of(task).to(device).train(task.work == "train")
    given = arguments_of(task, Cells.drawn(task).to(device))
    called = torch.compile(module) if task.compiled else module

    def call() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=task.precision == "bf16"):
            if task.work == "predict":
                with torch.inference_mode():
                    called(*given)
                return
            loss = called(*given)
        loss.backward()

    if task.work == "train":
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
    return call


def costs(task: Task) -> dict[str, Any]:
    """Memory of a first call and the mean cost of as many as ``least_s`` takes, all by cell."""
    small = dataclasses.replace(task, n_islands=64, n_open=8, cells=2, compiled=False)
    call_of(small)()  # libraries are loaded and threads started
    call = call_of(task)
    memory = Memory(torch.device(task.device))
    first = time.process_time()
    call()
    first = time.process_time() - first
    peak = memory.peak_mb()
    n, cpu, wall = 0, time.process_time(), time.perf_counter()
    while n == 0 or time.perf_counter() - wall < task.least_s:
        call()
        n += 1
        synchronize(task.device)
    cells = n * task.cells
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "cells": task.cells,
        "open_per_cell": task.n_open,
        "cpu_ms_per_cell": cpu / cells * 1e3,
        "cells_per_cpu_s": cells / cpu,
        "cells_per_s": cells / wall,
        "first_call_cpu_s": first,
        "peak_mb_per_cell": peak / task.cells,
        "device": torch.cuda.get_device_name() if task.device == "cuda" else "cpu",
    }


class Memory:
    """The largest memory from here on, beyond what is held here."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        synchronize(device.type)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            _forget_peak()
            self._before = _status("VmRSS")

    def peak_mb(self) -> float:
        synchronize(self._device.type)
        if self._device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self._device) - self._before) / 1e6
        return (_status("VmHWM") - self._before) / 1e6


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _forget_peak() -> None:
    """Let the kernel's peak begin anew; where it cannot be, that of the whole process stands."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(name: str) -> int:
    """Bytes in /proc/self/status; without /proc, the peak of the process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def tables(task: Task) -> dict[str, Any]:
    """What E costs a step beside the cells' own compute; a step takes as many micro-steps as its cells ask for."""
    device = torch.device(task.device)
    config = task.config()
    cells = Cells.drawn(task).to(device)
    table = nn.Parameter(torch.randn(task.n_islands, config.k, device=device))
    table.grad = torch.zeros_like(table)
    cotangent = torch.randn(len(cells.islands), config.k, device=device)
    optimizer = torch.optim.AdamW([table], weight_decay=0.0, fused=True)
    micro_steps = -(-GLOBAL_BATCH // task.cells)
    parts: dict[str, Callable[[], Any]] = {
        "zero_ms": lambda: optimizer.zero_grad(set_to_none=False),
        "gradient_ms": lambda: table_rows(table, cells.islands).backward(cotangent),
        "clip_ms": lambda: nn.utils.clip_grad_norm_([table], 1.0),
        "adamw_ms": optimizer.step,
    }
    found = {name: _milliseconds(part, task.device) for name, part in parts.items()}
    found["gradient_ms"] *= micro_steps
    total = sum(found.values())
    return {**found, "step_ms": total, "micro_steps": micro_steps, "table_mb": table.numel() * 4 / 1e6}


GLOBAL_BATCH = 256
"""Cells of a step that the tables' cost is held against."""


def _milliseconds(part: Callable[[], Any], device: str, calls: int = 5) -> float:
    """Median CPU time of a call (on a GPU: wall time) after a first one."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    part()
    taken = []
    for _ in range(calls):
        synchronize(device)
        begin = clock()
        part()
        synchronize(device)
        taken.append(clock() - begin)
    return sorted(taken)[calls // 2] * 1e3


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps(tables(task) if task.work == "tables" else costs(task)))


if __name__ == "__main__":
    main()
