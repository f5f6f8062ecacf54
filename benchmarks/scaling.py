"""Writes docs/scaling.md: a step's time on many GPUs by a model whose constants were measured here, or are named.

    python benchmarks/scaling.py

Measured constants come from benchmarks/results/; assumed ones stand in ``Machine``. Nothing is run.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annatac_scale.model.cost import FLOAT_BYTES, CellTokens, parameters, training_flops
from annatac_scale.train.presets import PretrainConfig, pretrain_preset

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = Path(__file__).with_name("results")

GPUS = (8, 64, 512)
CELLS = (1_000_000, 10_000_000, 100_000_000)
CELLS_PER_GPU = 112
"""Of a step: the paper's global batch, 900, on 8 GPUs; with more of them the global batch grows."""
OPEN = 1_500


@dataclass(frozen=True)
class Machine:
    """What is assumed of the machines, not measured: a node of 8 GPUs as clouds rent them.

    flops: that a GPU sustains in bf16; gpu_bytes_s: of its memory; node_bytes_s: that a GPU exchanges within a node;
    network_bytes_s: that a node exchanges; network_s: a message's way; storage_bytes_s: of one node from object storage
    """

    gpus_per_node: int = 8
    flops: float = 150e12
    gpu_bytes_s: float = 3e12
    node_bytes_s: float = 200e9
    network_bytes_s: float = 50e9
    network_s: float = 20e-6
    storage_bytes_s: float = 5e9


@dataclass(frozen=True)
class Measured:
    """What was measured on one core of the machine named in the results.

    read_s, mask_s: CPU of a cell in the stream and in masking; cell_bytes: on disk; svd_core_h: of a million cells
    """

    read_s: float
    mask_s: float
    cell_bytes: float
    svd_core_h: float

    @classmethod
    def load(cls) -> "Measured":
        stream = _results("stream")["cases"]["peers"]["runs"]["ours_ragged"]
        masking = _results("masking")["bars"]["cells_per_s"]["found"]
        svd = _results("positions")["bars"]["core_h_per_million"]["found"]
        return cls(stream["cpu_us_per_cell"]["median"] / 1e6, 1 / masking, stream["x_bytes_per_cell"], svd)


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


@dataclass(frozen=True)
class Case:
    """A preset on islands: what is trained, and what a cell costs."""

    name: str
    config: PretrainConfig
    n_islands: int

    @property
    def flops(self) -> float:
        """Forward and backward of a cell."""
        masking = self.config.masking
        tokens = CellTokens.to_train("open", OPEN, self.n_islands, masking.fraction, masking.negatives)
        tokens = CellTokens(tokens.listed, tokens.listed) if self.config.asks_cells else tokens
        return training_flops(self.config.encoder, tokens)

    @property
    def table_bytes(self) -> float:
        """Gradient of E, whole only when backward ends: its exchange cannot hide behind it."""
        return FLOAT_BYTES * self.n_islands * self.config.encoder.k

    @property
    def gradient_bytes(self) -> float:
        pooled = self.n_islands * self.config.pooled if self.config.asks_cells else 0
        return FLOAT_BYTES * (parameters(self.config.encoder, self.n_islands) + pooled)


@dataclass(frozen=True)
class Step:
    """Seconds of a step by part. exchange: of what backward does not hide; prepare: on one core beside each GPU"""

    compute: float
    optimizer: float
    exchange: float
    prepare: float
    storage: float

    @property
    def total(self) -> float:
        """Preparing and reading run beside the rest, a batch ahead."""
        return max(self.compute + self.optimizer + self.exchange, self.prepare, self.storage)

    @property
    def bottleneck(self) -> str:
        """The largest part."""
        parts = {
            "computing": self.compute,
            "exchange of gradients": self.exchange,
            "optimizer": self.optimizer,
            "masking on one core": self.prepare,
            "storage": self.storage,
        }
        if self.total > self.compute + self.optimizer + self.exchange:
            return max(("masking on one core", "storage"), key=parts.__getitem__)
        return max(("computing", "exchange of gradients", "optimizer"), key=parts.__getitem__)


def step(case: Case, gpus: int, machine: Machine, measured: Measured) -> Step:
    """The parts of a step of ``CELLS_PER_GPU`` cells a GPU."""
    compute = CELLS_PER_GPU * case.flops / machine.flops
    hidden = max(case.gradient_bytes - case.table_bytes, 0.0)
    exchange = all_reduce(case.table_bytes, gpus, machine)
    exchange += max(0.0, all_reduce(hidden, gpus, machine) - compute * 2 / 3)
    # AdamW reads and writes weights, gradients and two moments.
    optimizer = 7 * case.gradient_bytes / machine.gpu_bytes_s
    prepare = CELLS_PER_GPU * (measured.mask_s + measured.read_s)
    per_node = min(gpus, machine.gpus_per_node)
    storage = CELLS_PER_GPU * per_node * measured.cell_bytes / machine.storage_bytes_s
    return Step(compute, optimizer, exchange, prepare, storage)


def fewest_cells(case: Case, gpus: int, machine: Machine) -> int:
    """Cells of a GPU in a step with which computing takes as long as the exchange of all gradients."""
    return round(all_reduce(case.gradient_bytes, gpus, machine) / (case.flops / machine.flops))


def all_reduce(size: float, gpus: int, machine: Machine) -> float:
    """Seconds of an all-reduce: in rings within each node, then over nodes, each of which sends its share once."""
    inside = min(gpus, machine.gpus_per_node)
    nodes = -(-gpus // machine.gpus_per_node)
    seconds = 2 * (inside - 1) / inside * size / machine.node_bytes_s
    if nodes > 1:
        seconds += 2 * (nodes - 1) / nodes * size / machine.network_bytes_s
        seconds += 2 * nodes.bit_length() * machine.network_s
    return seconds


def cases() -> list[Case]:
    small, paper = pretrain_preset("small"), pretrain_preset("paper")
    return [
        Case("small, islands with a TSS", small, 16_657),
        Case("small, all bins that peaks measure", small, 120_000),
        Case("paper with `--attend open`, islands with a TSS", paper, 16_657),
        Case("paper with `--attend open`, all bins of hg38", paper, 642_102),
    ]


def page() -> str:
    """The page as Markdown."""
    machine, measured = Machine(), Measured.load()
    parts = ["# Scaling on paper", INTRODUCTION, "## Constants", _constants(machine, measured)]
    for case in cases():
        parts += [f"## {case.name[0].upper()}{case.name[1:]}", _case(case, machine, measured)]
    parts += ["## What follows", _conclusions(machine, measured)]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = (
    "Generated by `benchmarks/scaling.py`; edit that file. No GPU was at hand: this page is arithmetic, to be held "
    "against the first real run. A step is computing, the exchange of gradients that backward does not hide, and the "
    "optimizer; reading and masking run beside it, a batch ahead, on a core for each GPU, and count where they take "
    f"longer. Each GPU takes {CELLS_PER_GPU} cells a step (900 on 8), of {OPEN:,} open islands each; with more GPUs "
    "the global batch grows, and rates have to be chosen anew."
)


def _constants(machine: Machine, measured: Measured) -> str:
    stream, masking, positions = (
        f"measured: results/{name}.json" for name in ("stream", "masking", "positions")
    )
    network = f"{machine.network_bytes_s / 1e9:.0f} GB/s, {machine.network_s * 1e6:.0f} µs"
    rows = [
        ("reading a cell, one core", f"{measured.read_s * 1e6:.1f} µs", stream),
        ("masking a cell, one core", f"{measured.mask_s * 1e6:.0f} µs", masking),
        ("a cell on disk", f"{measured.cell_bytes:,.0f} bytes", stream),
        ("SVD of the positions", f"{measured.svd_core_h:.2f} core-hours a million cells", positions),
        (
            "a GPU computes",
            f"{machine.flops / 1e12:.0f} TFLOP/s in bf16",
            "assumed: an H100 at 15% of its peak",
        ),
        ("a GPU's memory", f"{machine.gpu_bytes_s / 1e12:.0f} TB/s", "assumed"),
        ("exchange within a node of 8", f"{machine.node_bytes_s / 1e9:.0f} GB/s a GPU", "assumed: NVLink"),
        ("exchange of a node", network, "assumed: 400 Gbit/s"),
        ("a node reads", f"{machine.storage_bytes_s / 1e9:.0f} GB/s from object storage", "assumed"),
    ]
    return _table(("what", "value", "from"), rows)


def _case(case: Case, machine: Machine, measured: Measured) -> str:
    few = {gpus: fewest_cells(case, gpus, machine) for gpus in GPUS[1:]}
    facts = (
        f"{case.flops / 1e9:.2f} GFLOP a cell, forward and backward; {case.gradient_bytes / 1e6:,.0f} MB of gradients, "
        f"{case.table_bytes / 1e6:,.0f} of them the table E. With fewer than "
        + " and ".join(f"{cells:,} cells a GPU on {gpus} GPUs" for gpus, cells in few.items())
        + ", their exchange takes longer than computing."
    )
    body = []
    for gpus in GPUS:
        found = step(case, gpus, machine, measured)
        rate = gpus * CELLS_PER_GPU / found.total
        body.append(
            (
                str(gpus),
                *(
                    f"{part * 1e3:.1f}"
                    for part in (found.compute, found.optimizer, found.exchange, found.prepare, found.storage)
                ),
                f"{rate:,.0f}",
                *(_hours(cells / rate) for cells in CELLS),
                found.bottleneck,
            )
        )
    head = (
        "GPUs", "computing, ms", "optimizer", "exchange", "masking", "storage", "cells/s",
        *(f"epoch of {cells // 1_000_000} M cells" for cells in CELLS), "most goes into",
    )  # fmt: skip
    return f"{facts}\n\n{_table(head, body)}"


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3600:.1f} h"


def _conclusions(machine: Machine, measured: Measured) -> str:
    ceiling = 1 / (measured.mask_s + measured.read_s)
    disk = CELLS[-1] * measured.cell_bytes / 1e9
    svd = [cells / 1e6 * measured.svd_core_h for cells in CELLS]
    small = cases()[0]
    shallow = OPEN * machine.flops / small.flops / ceiling
    masking = (
        f"**Masking.** One core prepares {ceiling:,.0f} cells/s, the most that a GPU can be fed with. Preset small on "
        f"such a GPU would ask for more where cells have fewer than {shallow:,.0f} open islands, others later."
    )
    exchange = (
        "**Exchange.** It is bound by the tables, whose size follows the islands and not the batch. More cells a GPU "
        "in a step make it a smaller share; so does a vocabulary of the islands that peaks measure instead of all bins."
    )
    storage = (
        f"**Storage.** 100 million cells are {disk:,.0f} GB; an epoch reads them once, over all nodes together, and no "
        f"node comes near the {machine.storage_bytes_s / 1e9:.0f} GB/s assumed."
    )
    before = (
        f"**Before the first step.** One pass to count, {1e6 * measured.read_s:.0f} core-seconds a million cells, "
        f"which all ranks share, and the SVD on the first rank's cores: {svd[0]:.1f}, {svd[1]:.0f} and {svd[2]:.0f} "
        "core-hours for 1, 10 and 100 million cells. From 10 million cells on it takes longer than epochs do: give "
        "that rank many cores."
    )
    return "\n".join(f"- {line}" for line in (masking, exchange, storage, before))


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
