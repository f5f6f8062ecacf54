"""The one training loop: batch, micro-steps, clip, step, log, validate, checkpoint.

It runs alone in one process and, unchanged, as one of several ranks. A loss is a sum over targets divided by the
number of targets of the *global* batch: how cells are dealt to ranks and micro-steps changes rounding only. Random
numbers of a step are seeded by (seed, epoch, step, rank), so that a resumed run needs no generator state.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from annatac_scale.errors import AnnatacError, ConfigError
from annatac_scale.model.heads import LossSum
from annatac_scale.progress import Progress
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.loader import IslandStream
from annatac_scale.train.checkpoint import RunFolder

SCHEDULES = ("step", "cosine")
LOG_EVERY = 20


@dataclass(frozen=True)
class TrainOptions:
    """How to optimise. Raises ConfigError where a value is out of range."""

    epochs: int = 20
    global_batch_size: int = 64
    micro_tokens: int = 12_000
    """Tokens of a micro-step: bounds memory; changes the result by rounding only."""
    learning_rate: float = 1e-3
    table_learning_rate: float = 1e-3
    """Rate of tables with a row for each island, which a cell trains few rows of."""
    encoder_learning_rate: float = 1e-3
    """Rate of the encoder where a head is trained with it."""
    weight_decay: float = 0.0
    """Decoupled decay of tables and matrices (AdamW)."""
    schedule: str = "cosine"
    """"step" multiplies the rate by ``decay`` every ``decay_epochs``; "cosine" falls to 0 over all epochs."""
    warmup_steps: int = 0
    decay_epochs: int = 10
    decay: float = 0.9
    clip: float = 1.0
    """Largest norm of the gradient."""
    patience: int = 10
    """Validations after which training stops when none of them gained ``min_gain`` in score."""
    min_gain: float = 1e-3
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule: found {self.schedule!r}, expected {' or '.join(SCHEDULES)}")
        for name in ("epochs", "global_batch_size", "micro_tokens", "decay_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "table_learning_rate", "encoder_learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected more than 0")


class Task(Protocol):
    """What is trained. ``module`` maps a prepared batch to summed losses by name."""

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        ...

    loss_weights: dict[str, float]

    def parameter_groups(self, options: TrainOptions) -> list[dict[str, Any]]:
        """Optimizer groups, each with params and lr."""
        ...

    def prepare(self, batch: Batch, epoch: int) -> Batch:
        """The batch with masks, targets and all tokens to attend to."""
        ...

    def counts(self, batch: Batch) -> dict[str, int]:
        """Targets of a prepared batch by loss name."""
        ...

    def validate(self, ranks: "Ranks") -> dict[str, float]:
        """Figures on the held-out cells; ``score`` is what early stopping maximises."""
        ...


@dataclass(frozen=True)
class Ranks:
    """The processes that train together; alone by default."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.world_size == 1:
            return values
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(totals)
        return totals.tolist()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over the ranks."""
        if self.world_size == 1:
            return module
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


@dataclass
class _State:
    """Where training is; with the weights, the optimizer's and the stream's state all that a checkpoint holds."""

    step: int = 0
    best_score: float = -math.inf
    best_epoch: int = -1
    gained_score: float = -math.inf
    validations_since_gain: int = 0


@dataclass(frozen=True, eq=False)
class _Loop:
    """What a run of the loop works with."""

    task: Task
    stream: IslandStream
    options: TrainOptions
    run: RunFolder
    ranks: Ranks
    progress: Progress
    optimizer: torch.optim.Optimizer
    state: _State


def train(
    task: Task, stream: IslandStream, options: TrainOptions, run: RunFolder, ranks: Ranks, progress: Progress
) -> dict[str, float]:
    """Train until the last epoch or until validation stops gaining; leaves the best weights in ``task.module``.

    Resumes from the run's last checkpoint when there is one. Returns the figures of the best validation.
    Raises AnnatacError when a gradient is not finite.
    """
    module = ranks.wrap(task.module)
    optimizer = torch.optim.AdamW(task.parameter_groups(options), weight_decay=options.weight_decay)
    rates = [group["lr"] for group in optimizer.param_groups]
    state = _resume(task, optimizer, stream, run, progress)
    loop = _Loop(task, stream, options, run, ranks, progress, optimizer, state)
    epoch = stream.state_dict()["epoch"]
    with progress.task("Training", options.epochs * len(stream), "steps") as advance:
        advance(state.step)
        while epoch < options.epochs and state.validations_since_gain < options.patience:
            meter = _Meter(task.loss_weights)
            task.module.train()
            for batch in stream:
                factor = rate_factor(options, state.step, len(stream))
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                _seed_step(options.seed, state.step, ranks.rank)
                losses = accumulate(task, module, task.prepare(batch, epoch), options, ranks)
                norm = nn.utils.clip_grad_norm_(task.module.parameters(), options.clip)
                _check_finite(norm, batch, state.step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
                meter.add(losses, len(batch))
                state.step += 1
                advance(1)
                if state.step % LOG_EVERY == 0 and ranks.rank == 0:
                    run.log(
                        {"step": state.step, "epoch": epoch, "rate": rates[0] * factor, **meter.figures()}
                    )
            epoch += 1
            _after_epoch(loop, epoch, meter)
    return _load_best(task, run, ranks)


def accumulate(
    task: Task, module: nn.Module, batch: Batch, options: TrainOptions, ranks: Ranks
) -> dict[str, tuple[float, float, float]]:
    """Add the gradient of this rank's share of a global batch in micro-steps.

    Returns by loss name (sum, count, correct) over the global batch.
    """
    names = list(task.loss_weights)
    own = task.counts(batch)
    totals = dict(zip(names, ranks.sum([float(own[name]) for name in names]), strict=True))
    sums = dict.fromkeys(names, (0.0, 0.0))
    pieces = list(micro_batches(batch, options.micro_tokens))
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        held = nullcontext() if last or ranks.world_size == 1 else module.no_sync()  # type: ignore[operator]
        with held:
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=options.bf16):
                losses: dict[str, LossSum] = module(piece)
            # DDP averages gradients over ranks, the loss is a mean over the global batch: hence world_size.
            terms = [
                task.loss_weights[name] * losses[name].sum * (ranks.world_size / max(totals[name], 1.0))
                for name in names
            ]
            torch.stack(terms).sum().backward()
        for name in names:
            loss_sum, correct = sums[name]
            sums[name] = loss_sum + losses[name].sum.item(), correct + losses[name].correct.item()
    reduced = ranks.sum([value for name in names for value in sums[name]])
    return {name: (reduced[2 * i], totals[name], reduced[2 * i + 1]) for i, name in enumerate(names)}


def micro_batches(batch: Batch, max_tokens: int) -> Iterator[Batch]:
    """Runs of cells of at most ``max_tokens`` tokens (one cell at least); an empty batch gives itself."""
    start = 0
    while start < len(batch) or start == 0:
        limit = batch.offsets[start] + max_tokens
        stop = int(np.searchsorted(batch.offsets, limit, side="right")) - 1
        stop = min(max(stop, start + 1), len(batch))
        yield batch[start:stop]
        start = max(stop, 1)


def rate_factor(options: TrainOptions, step: int, steps_per_epoch: int) -> float:
    """What the learning rates are multiplied by in a step: a function of the step alone."""
    warm = min(1.0, (step + 1) / (options.warmup_steps + 1))
    if options.schedule == "step":
        return float(warm * options.decay ** (step // steps_per_epoch // options.decay_epochs))
    return warm * 0.5 * (1 + math.cos(math.pi * step / (options.epochs * steps_per_epoch)))


def _seed_step(seed: int, step: int, rank: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def _check_finite(norm: Tensor, batch: Batch, step: int) -> None:
    if not torch.isfinite(norm):
        cells = ", ".join(str(cell) for cell in batch.cell_ids[:5])
        raise AnnatacError(
            f"step {step}: the gradient is not finite (cells {cells}, ...); lower the learning rate with "
            "--set train.learning_rate=..., and start again from the last checkpoint"
        )


class _Meter:
    """Mean losses and accuracies over the steps of an epoch so far."""

    def __init__(self, names: dict[str, float]) -> None:
        self._sums = {name: np.zeros(3) for name in names}
        self._cells = 0
        self._start = time.monotonic()

    def add(self, losses: dict[str, tuple[float, float, float]], n_cells: int) -> None:
        for name, values in losses.items():
            self._sums[name] += values
        self._cells += n_cells

    def figures(self) -> dict[str, float]:
        figures = {"cells_per_s": round(self._cells / max(time.monotonic() - self._start, 1e-9), 1)}
        for name, (loss, count, correct) in self._sums.items():
            figures[f"{name}_loss"] = loss / max(count, 1.0)
            figures[f"{name}_accuracy"] = correct / max(count, 1.0)
        return figures


def _after_epoch(loop: "_Loop", epoch: int, meter: "_Meter") -> None:
    """Validate, keep what validated best, write the checkpoint, log."""
    task, state, run = loop.task, loop.state, loop.run
    figures = task.validate(loop.ranks)
    better = figures["score"] > state.best_score
    if better:
        state.best_score, state.best_epoch = figures["score"], epoch
    if figures["score"] > state.gained_score + loop.options.min_gain:
        state.gained_score, state.validations_since_gain = figures["score"], 0
    else:
        state.validations_since_gain += 1
    if loop.ranks.rank != 0:
        return
    weights = task.module.state_dict()
    if better:
        run.save("best", {"module": weights, "figures": {**figures, "epoch": epoch}})
    stream = {**loop.stream.state_dict(), "epoch": epoch, "step": 0}
    optimizer = loop.optimizer.state_dict()
    run.save("last", {"module": weights, "optimizer": optimizer, "state": vars(state), "stream": stream})
    run.log({"step": state.step, "epoch": epoch, **{f"validation_{name}": v for name, v in figures.items()}})
    loop.progress.say(f"epoch {epoch}: {_shown(meter.figures())}  |  validation {_shown(figures)}")


def _shown(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "score")


def _resume(
    task: Task, optimizer: torch.optim.Optimizer, stream: IslandStream, run: RunFolder, progress: Progress
) -> _State:
    saved = run.load("last")
    if saved is None:
        return _State()
    task.module.load_state_dict(saved["module"])
    optimizer.load_state_dict(saved["optimizer"])
    stream.load_state_dict(saved["stream"])
    progress.say(f"resuming {run.path} after epoch {saved['stream']['epoch']}, step {saved['state']['step']}")
    return _State(**saved["state"])


def _load_best(task: Task, run: RunFolder, ranks: Ranks) -> dict[str, float]:
    if ranks.world_size > 1:
        torch.distributed.barrier()
    best = run.load("best")
    if best is None:
        raise AnnatacError(f"{run.path}: no validation score was a number; lower the learning rate")
    task.module.load_state_dict(best["module"])
    figures: dict[str, float] = best["figures"]
    return figures
