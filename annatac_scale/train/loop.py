"""The one training loop: batch, micro-steps, clip, step, log, validate, checkpoint.

It runs alone in one process and, unchanged, as one of several ranks. A loss is a sum over targets divided by the
number of targets of the *global* batch: how cells are dealt to ranks and micro-steps changes rounding only. Random
numbers of a step are seeded by (seed, step, rank), so that a resumed run needs no generator state.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from annatac_scale.errors import AnnatacError, ConfigError
from annatac_scale.memory import give_back_freed_memory
from annatac_scale.model.heads import LossSum
from annatac_scale.progress import Progress
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.loader import BatchStream
from annatac_scale.train.checkpoint import RunFolder

SCHEDULES = ("step", "cosine")
PRECISIONS = ("auto", "fp32", "bf16")
LOG_EVERY = 20
"""Steps between two lines of metrics.jsonl."""


@dataclass(frozen=True)
class TrainOptions:
    """How to optimise. Raises ConfigError where a value is out of range."""

    epochs: int = 20
    min_steps: int = 0
    """Steps below which training does not stay: a small set is gone through in more epochs than ``epochs``."""
    global_batch_size: int = 64
    """Cells of a step, over all ranks."""
    lanes: int = 0
    """Runs of cells read side by side, a divisor of the global batch, at least the ranks; 0: the one nearest 36."""
    micro_tokens: int = 12_000
    """Tokens of a micro-step: bounds memory; changes the result by rounding only."""
    learning_rate: float = 1e-3
    table_learning_rate: float = 1e-3
    """Rate of tables with a row for each island, which a cell trains few rows of."""
    encoder_learning_rate: float = 1e-3
    """Rate of the encoder where a head is trained with it."""
    weight_decay: float = 0.0
    """Decoupled decay (AdamW) of the tables, and of nothing else."""
    schedule: str = "cosine"
    """"step" multiplies the rate by ``decay`` every ``decay_epochs``; "cosine" falls to 0 over all epochs."""
    warmup_steps: int = 0
    """Steps in which the rate rises from nearly 0, under either schedule."""
    decay_epochs: int = 10
    decay: float = 0.9
    clip: float = 1.0
    """Largest norm of the gradient."""
    patience: int = 10
    """Validations after which training stops when none of them gained ``min_gain`` in score."""
    min_gain: float = 1e-3
    precision: str = "auto"
    """Forward and backward in "fp32" or "bf16" (autocast; weights, sums and optimizer stay in fp32). "auto": bf16 on
    GPUs that compute in it, fp32 elsewhere."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule: found {self.schedule!r}, expected {' or '.join(SCHEDULES)}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision: found {self.precision!r}, expected {', '.join(PRECISIONS)}")
        for name in ("epochs", "global_batch_size", "micro_tokens", "decay_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "table_learning_rate", "encoder_learning_rate", "clip", "decay"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected more than 0")
        for name in ("min_steps", "lanes", "weight_decay", "warmup_steps", "min_gain", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected at least 0")


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether forward and backward run in bfloat16 on a device."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


class Task(Protocol):
    """What is trained. ``module`` maps a prepared batch to summed losses by name."""

    loss_weights: dict[str, float]

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        ...

    def parameter_groups(self, options: TrainOptions) -> list[dict[str, Any]]:
        """Optimizer groups, each with params and lr; those that decay with weight_decay."""
        ...

    def prepare(self, batch: Batch, epoch: int) -> Batch:
        """The batch with masks, targets and all tokens to attend to."""
        ...

    def counts(self, batch: Batch) -> dict[str, int]:
        """Targets of a prepared batch by loss name."""
        ...

    def validate(self, ranks: "Ranks") -> dict[str, float]:
        """Figures on the held-out cells, the same on every rank; ``score`` is what early stopping maximises."""
        ...


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, and the device of this one; alone by default."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=default_device)

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.world_size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def sum_gradients(self, module: nn.Module) -> None:
        """Replace every gradient by its sum over all ranks, in one exchange: the order of additions is fixed."""
        if self.world_size == 1:
            return
        trained = [p for p in module.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(flat)
        for parameter, grad in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            parameter.grad = grad.view_as(parameter)

    def share(self, module: nn.Module) -> None:
        """Give all ranks the weights and buffers of rank 0."""
        if self.world_size > 1:
            for tensor in module.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)

    def agree(self, value: float) -> bool:
        """Whether all ranks hold the same number."""
        if self.world_size == 1:
            return True
        extremes = torch.tensor([value, -value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
        return extremes.tolist() == [value, -value]

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()


@dataclass(frozen=True)
class LossTotal:
    """A loss over the global batches of some steps, not yet divided by the targets."""

    sum: float = 0.0
    count: float = 0.0
    correct: float = 0.0

    def __add__(self, other: "LossTotal") -> "LossTotal":
        return LossTotal(self.sum + other.sum, self.count + other.count, self.correct + other.correct)


@dataclass
class _State:
    """Where training is; with the weights, the optimizer's and the stream's state all that a checkpoint holds."""

    step: int = 0
    best_score: float = -math.inf
    best_epoch: int = -1
    best_figures: dict[str, float] = field(default_factory=dict)
    gained_score: float = -math.inf
    validations_since_gain: int = 0

    def judge(self, figures: dict[str, float], epoch: int, min_gain: float) -> None:
        """Take in a validation."""
        score = figures["score"]
        if score > self.best_score:
            self.best_score, self.best_epoch, self.best_figures = score, epoch, {**figures, "epoch": epoch}
        if score > self.gained_score + min_gain:
            self.gained_score, self.validations_since_gain = score, 0
        else:
            self.validations_since_gain += 1


@dataclass(frozen=True, eq=False)
class _Loop:
    """What a run of the loop works with."""

    task: Task
    stream: BatchStream
    options: TrainOptions
    run: RunFolder
    ranks: Ranks
    progress: Progress
    optimizer: torch.optim.Optimizer


def train(
    task: Task, stream: BatchStream, options: TrainOptions, run: RunFolder, ranks: Ranks, progress: Progress
) -> dict[str, float]:
    """Train until the last epoch or until validation stops gaining; leaves the best weights in ``task.module``.

    Resumes from the run's last checkpoint when there is one. Returns the figures of the best validation.
    Raises AnnatacError when a gradient is not finite, ModelError when a checkpoint is damaged.
    """
    epochs = max(options.epochs, -(-options.min_steps // max(len(stream), 1)))
    if epochs > options.epochs:
        progress.say(
            f"{len(stream)} steps an epoch: up to {epochs} epochs, for train.min_steps = {options.min_steps}"
        )
    options = replace(options, epochs=epochs)
    optimizer = torch.optim.AdamW(task.parameter_groups(options), weight_decay=0.0, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    loop = _Loop(task, stream, options, run, ranks, progress, optimizer)
    state = _resume(loop)
    ranks.share(task.module)
    epoch = stream.state_dict()["epoch"]
    with progress.task("Training", options.epochs * len(stream), "steps") as advance:
        advance(state.step)
        while epoch < options.epochs and state.validations_since_gain < options.patience:
            meter = _Meter(ranks.world_size)
            task.module.train()
            for batch in stream:
                factor = rate_factor(options, state.step, len(stream))
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                _seed_step(options.seed, state.step, ranks.rank)
                losses = accumulate(task, task.prepare(batch, epoch), options, ranks)
                norm = nn.utils.clip_grad_norm_(task.module.parameters(), options.clip)
                _check_finite(norm, batch, state.step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
                meter.add(losses, len(batch))
                state.step += 1
                advance(1)
                if state.step % LOG_EVERY == 0 and ranks.rank == 0:
                    rate = rates[0] * factor
                    run.log({"step": state.step, "epoch": epoch, "rate": rate, **meter.figures()})
            epoch += 1
            _after_epoch(loop, state, epoch, meter)
            give_back_freed_memory()
    return _load_best(loop, state)


def accumulate(task: Task, batch: Batch, options: TrainOptions, ranks: Ranks) -> dict[str, LossTotal]:
    """Add the gradient of the mean losses over the global batch, in micro-steps; returns the losses by name.

    batch: this rank's share, prepared; a rank without targets takes part all the same
    """
    names = list(task.loss_weights)
    own = task.counts(batch)
    counts = ranks.sum([float(own[name]) for name in names])
    scales = [task.loss_weights[name] / max(n, 1.0) for name, n in zip(names, counts, strict=True)]
    found = torch.zeros(2, len(names), dtype=torch.float64, device=ranks.device)
    in_bf16 = uses_bf16(options.precision, ranks.device)
    for piece in micro_batches(batch, options.micro_tokens):
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=in_bf16):
            losses: dict[str, LossSum] = task.module(piece)
        sums = torch.stack([losses[name].sum for name in names])
        (sums * sums.new_tensor(scales)).sum().backward()
        found[0] += sums.detach()
        found[1] += torch.stack([losses[name].correct for name in names]).to(found.device)
    ranks.sum_gradients(task.module)
    totals = ranks.sum(found.flatten().tolist())
    return {name: LossTotal(totals[i], counts[i], totals[len(names) + i]) for i, name in enumerate(names)}


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
    """What the learning rates are multiplied by in a step (from 0): a function of the step alone."""
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
            f"step {step}: the gradient is not finite (cells {cells}, ...); train again into another --out with a "
            "lower rate, as --set train.learning_rate=1e-4"
        )


class _Meter:
    """Mean losses and accuracies over the steps of an epoch so far."""

    def __init__(self, world_size: int) -> None:
        self._totals: dict[str, LossTotal] = {}
        self._world_size = world_size
        self._cells = 0
        self._start = time.monotonic()

    def add(self, losses: dict[str, LossTotal], n_cells: int) -> None:
        """Take in a step; n_cells: cells of this rank."""
        for name, loss in losses.items():
            self._totals[name] = self._totals.get(name, LossTotal()) + loss
        self._cells += n_cells

    def figures(self) -> dict[str, float]:
        """Figures by name; cells_per_s takes the ranks for equally loaded."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        figures = {"cells_per_s": round(self._cells * self._world_size / seconds, 1)}
        for name, loss in self._totals.items():
            figures[f"{name}_loss"] = loss.sum / max(loss.count, 1.0)
            figures[f"{name}_accuracy"] = loss.correct / max(loss.count, 1.0)
        return figures


def _after_epoch(loop: _Loop, state: _State, epoch: int, meter: _Meter) -> None:
    """Validate, write the checkpoints, log."""
    figures = loop.task.validate(loop.ranks)
    state.judge(figures, epoch, loop.options.min_gain)
    if loop.ranks.rank != 0:
        return
    weights = loop.task.module.state_dict()
    loop.run.save(
        "last",
        {
            "module": weights,
            "optimizer": loop.optimizer.state_dict(),
            "state": vars(state),
            "stream": {**loop.stream.state_dict(), "epoch": epoch, "step": 0},
        },
    )
    # After "last", which names the best epoch: where a run ends in between, ``_resume`` makes up for it.
    if state.best_epoch == epoch:
        loop.run.save("best", {"module": weights})
    validated = {f"validation_{name}": value for name, value in figures.items()}
    loop.run.log({"step": state.step, "epoch": epoch, **validated})
    loop.progress.say(f"epoch {epoch}: {_shown(meter.figures())}  |  validation {_shown(figures)}")


def _shown(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "score")


def _resume(loop: _Loop) -> _State:
    """Go to the last checkpoint, on every rank to the same one."""
    state, run = _State(), loop.run
    if run.has("last"):
        saved = run.load("last")
        loop.task.module.load_state_dict(saved["module"])
        loop.optimizer.load_state_dict(saved["optimizer"])
        loop.stream.load_state_dict(saved["stream"])
        state = _State(**saved["state"])
        epoch = saved["stream"]["epoch"]
        loop.progress.say(f"resuming {run.path} after epoch {epoch}, step {state.step}")
        if loop.ranks.rank == 0:
            run.log({"step": state.step, "epoch": epoch, "resumed": True})
            if state.best_epoch == epoch:
                run.save("best", {"module": saved["module"]})
    if not loop.ranks.agree(state.step):
        raise AnnatacError(f"{run.path}: rank {loop.ranks.rank} sees another last checkpoint than the others")
    return state


def _load_best(loop: _Loop, state: _State) -> dict[str, float]:
    if state.best_epoch < 0:
        raise AnnatacError(
            f"{loop.run.path}: no validation gave a number; train again into another --out with a lower rate"
        )
    loop.ranks.wait()
    loop.task.module.load_state_dict(loop.run.load("best")["module"])
    return state.best_figures
