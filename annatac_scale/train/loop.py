"""The one training loop: batch, micro-steps, clip, step, log, validate, checkpoint.

It runs alone in one process and, unchanged, as one of several ranks. A loss is a sum over targets divided by the
number of targets of the *global* batch: how cells are dealt to ranks and micro-steps changes rounding only. Random
numbers of a step are seeded by (seed, step, rank), and rates follow from the step, so that a resumed run needs neither
generator nor scheduler state. It goes on after any step, on any number of ranks.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from annatac_scale.errors import AnnatacError, ConfigError, RunInterruptedError, StoreError
from annatac_scale.memory import give_back_freed_memory
from annatac_scale.model.heads import LossSum
from annatac_scale.progress import Progress
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.stream.arrangement import StreamState
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.loader import BatchStream
from annatac_scale.train.checkpoint import state_of
from annatac_scale.train.interruption import ASKING, Interruption
from annatac_scale.train.metrics import LossTotal, Meter, StepFacts, shown
from annatac_scale.train.ranks import Ranks
from annatac_scale.train.record import Record

SCHEDULES = ("step", "cosine")
PRECISIONS = ("auto", "fp32", "bf16")
MOST_SKIPPED = 20
"""Steps in a row that may be left out because their loss is not finite: then the weights are past help."""


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

    def validate(self, ranks: Ranks) -> dict[str, float]:
        """Figures on the held-out cells, the same on every rank; ``score`` is what early stopping maximises."""
        ...


@dataclass
class _State:
    """Where training is; with the weights, the optimizer's and the stream's state all that a checkpoint holds.

    bests: steps after which validation was better than ever before
    """

    step: int = 0
    bests: list[int] = field(default_factory=list)
    best_score: float = -math.inf
    best_figures: dict[str, float] = field(default_factory=dict)
    gained_score: float = -math.inf
    validations_since_gain: int = 0
    n_skipped: int = 0
    n_skipped_in_a_row: int = 0

    def judge(self, figures: dict[str, float], epoch: int, min_gain: float) -> None:
        """Take in a validation."""
        score = figures["score"]
        if score > self.best_score:
            self.bests.append(self.step)
            self.best_score, self.best_figures = score, {**figures, "epoch": epoch}
        if score > self.gained_score + min_gain:
            self.gained_score, self.validations_since_gain = score, 0
        else:
            self.validations_since_gain += 1

    def forget_best(self) -> None:
        """As if no validation had gained: the weights of the best one are lost."""
        self.bests, self.best_score, self.best_figures = [], -math.inf, {}
        self.gained_score, self.validations_since_gain = -math.inf, 0


@dataclass(frozen=True, eq=False)
class Loop:
    """What a run of the loop works with. asked: whether somebody asked it to end, seen on any rank"""

    task: Task
    stream: BatchStream
    options: TrainOptions
    ranks: Ranks
    record: Record
    progress: Progress
    asked: Interruption = field(default_factory=Interruption)


def train(loop: Loop, start: Callable[[], None]) -> dict[str, float]:
    """Train until the last epoch or until validation stops gaining; leaves the best weights in ``task.module``.

    Goes on after the run's newest whole checkpoint when there is one; else ``start``, called on rank 0, sets the
    weights to begin with. Returns the figures of the best validation.

    Raises AnnatacError when a loss is not finite and is not to be skipped, RunInterruptedError when asked to end, its
    state kept, ModelError when no checkpoint is whole, StoreError when one that is needed cannot be written.
    """
    loop = replace(loop, options=_in_whole_epochs(loop))
    task, stream, options, ranks, record = loop.task, loop.stream, loop.options, loop.ranks, loop.record
    optimizer = torch.optim.AdamW(task.parameter_groups(options), weight_decay=0.0, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    state = _begin(loop, optimizer, start)
    module = ranks.parallel(task.module)
    _lay_out_buckets(loop, module)
    n_steps = options.epochs * len(stream)
    epoch = stream.state_dict()["epoch"]
    with loop.progress.task("Training", n_steps, "steps") as advance:
        advance.found(state.step)
        while epoch < options.epochs and state.validations_since_gain < options.patience:
            meter = Meter()
            task.module.train()
            for batch, place, waited_s in _prepared(loop, epoch):
                factor = rate_factor(options, state.step, len(stream))
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                _seed_step(options.seed, state.step, ranks.rank)
                record.cells(state.step, epoch, batch.cell_ids)
                begin = time.monotonic()
                counts = _counted(loop, batch)
                losses = accumulate(module, task, batch, options, ranks, counts.targets)
                norm = float(nn.utils.clip_grad_norm_(task.module.parameters(), options.clip))
                if _is_finite(losses, norm):
                    optimizer.step()
                    state.n_skipped_in_a_row = 0
                else:
                    _skip_or_stop(loop, state, batch)
                    losses = {}
                optimizer.zero_grad(set_to_none=False)
                computed_s = time.monotonic() - begin
                facts = StepFacts(losses, counts.cells, rates[0] * factor, waited_s, computed_s)
                meter.add(facts)
                state.step += 1
                advance(1)
                record.step(facts, state.step, n_steps, epoch + 1)
                if counts.asked:
                    _leave(loop, state, _checkpoint(loop, state, optimizer, place), counts.asked)
                if record.is_due(state.step):
                    record.save(state.step, _checkpoint(loop, state, optimizer, place), state.bests)
            epoch += 1
            _after_epoch(loop, state, optimizer, epoch, meter)
            give_back_freed_memory()
    return _load_best(loop, state)


def _in_whole_epochs(loop: Loop) -> TrainOptions:
    options = loop.options
    epochs = max(options.epochs, -(-options.min_steps // max(len(loop.stream), 1)))
    if epochs > options.epochs:
        loop.progress.say(
            f"{len(loop.stream)} steps an epoch: up to {epochs} epochs, for train.min_steps = {options.min_steps}"
        )
    return replace(options, epochs=epochs)


def _begin(loop: Loop, optimizer: torch.optim.Optimizer, start: Callable[[], None]) -> _State:
    """Go to the newest checkpoint, on every rank to the same one."""
    data = loop.ranks.bytes_of_first(loop.record.newest())
    if data is None:
        if loop.ranks.rank == 0:
            start()
        loop.record.began(0, loop.ranks.world_size, [])
        place = loop.stream.state_dict()
        loop.record.save(0, _checkpoint(loop, _State(), optimizer, place), [], needed=True)
        return _State()
    saved = state_of(data)
    loop.task.module.load_state_dict(saved["module"])
    optimizer.load_state_dict(saved["optimizer"])
    loop.stream.load_state_dict(saved["stream"])
    state = _State(**saved["state"])
    if state.bests and not loop.ranks.sum([float(loop.record.has_whole(state.bests[-1]))])[0]:
        loop.progress.say(
            f"the best checkpoint, of step {state.bests[-1]:,}, is damaged: what comes is the best again"
        )
        state.forget_best()
    where = f"epoch {saved['stream']['epoch']}, step {saved['stream']['step']} of {len(loop.stream)}"
    loop.progress.say(f"resuming {loop.record.location} after {state.step:,} steps: {where}")
    loop.record.began(state.step, loop.ranks.world_size, saved["lineage"])
    return state


def _lay_out_buckets(loop: Loop, module: nn.Module) -> None:
    """One backward of a batch without cells: gradients are all there, and zero.

    DDP lays out its buckets in the order in which the first backward fills them. Without this one, sums of the first
    step of an attempt would be formed in another order than those of the same step in a run that goes on.
    """
    if loop.ranks.world_size == 1:
        return
    nothing = loop.task.prepare(Batch.from_open(np.empty(0, np.int64), OpenIslands.empty()), 0)
    no_targets = [0.0] * len(loop.task.loss_weights)
    for _ in range(2):
        accumulate(module, loop.task, nothing, loop.options, loop.ranks, no_targets)
    module.zero_grad(set_to_none=False)


def _prepared(loop: Loop, epoch: int) -> Iterator[tuple[Batch, StreamState, float]]:
    """The prepared batches of the rest of an epoch, made one ahead in a thread.

    Each comes with the place of the stream after it, and the seconds that it was waited for.
    """
    batches = iter(loop.stream)

    def make() -> tuple[Batch, StreamState] | None:
        batch = next(batches, None)
        return None if batch is None else (loop.task.prepare(batch, epoch), loop.stream.state_dict())

    with ThreadPoolExecutor(1, "prepare") as thread:
        ahead = thread.submit(make)
        try:
            while True:
                begin = time.monotonic()
                if (found := ahead.result()) is None:
                    return
                ahead = thread.submit(make)
                yield *found, time.monotonic() - begin
        finally:
            thread.submit(batches.close).result()  # after what is being made


@dataclass(frozen=True)
class _Counts:
    """Sums over all ranks. targets: by loss; asked: the number of a signal that asks to end, or 0"""

    targets: Sequence[float]
    cells: int
    asked: int


def _counted(loop: Loop, batch: Batch) -> _Counts:
    own = loop.task.counts(batch)
    asked = [float(loop.asked.signal == number) for number in ASKING]
    found = loop.ranks.sum(
        [*(float(own[name]) for name in loop.task.loss_weights), float(len(batch)), *asked]
    )
    n = len(loop.task.loss_weights)
    signals = [number for number, times in zip(ASKING, found[n + 1 :], strict=True) if times]
    return _Counts(found[:n], int(found[n]), signals[0] if signals else 0)


def accumulate(
    module: nn.Module, task: Task, batch: Batch, options: TrainOptions, ranks: Ranks, targets: Sequence[float]
) -> dict[str, LossTotal]:
    """Add the gradient of the mean losses over the global batch, in micro-steps; returns the losses by name.

    module: the task's, as the ranks train it together: gradients are exchanged in the last micro-step only
    batch: this rank's share, prepared; a rank without targets takes part all the same
    targets: of the global batch, by loss
    """
    names = list(task.loss_weights)
    scales = [task.loss_weights[name] / max(n, 1.0) for name, n in zip(names, targets, strict=True)]
    found = torch.zeros(2, len(names), dtype=torch.float64, device=ranks.device)
    in_bf16 = uses_bf16(options.precision, ranks.device)
    pieces = list(micro_batches(batch, options.micro_tokens))
    for number, piece in enumerate(pieces, 1):
        with _alone(module) if number < len(pieces) else nullcontext():
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=in_bf16):
                losses: dict[str, LossSum] = module(piece)
            sums = torch.stack([losses[name].sum for name in names])
            (sums * sums.new_tensor(scales)).sum().backward()
        found[0] += sums.detach()
        found[1] += torch.stack([losses[name].correct for name in names]).to(found.device)
    totals = ranks.sum(found.flatten().tolist())
    return {name: LossTotal(totals[i], targets[i], totals[len(names) + i]) for i, name in enumerate(names)}


def _alone(module: nn.Module) -> AbstractContextManager[None]:
    """Forward and backward in which gradients stay on this rank."""
    context: AbstractContextManager[None] = getattr(module, "no_sync", nullcontext)()
    return context


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


def _is_finite(losses: dict[str, LossTotal], norm: float) -> bool:
    return math.isfinite(norm) and all(math.isfinite(loss.sum) for loss in losses.values())


def _skip_or_stop(loop: Loop, state: _State, batch: Batch) -> None:
    """A step whose loss or gradient is not finite, on every rank: count it, or raise AnnatacError."""
    state.n_skipped += 1
    state.n_skipped_in_a_row += 1
    own = _cells_not_finite(loop, batch, state.step)
    cells = sorted(cell for of_rank in loop.ranks.gather(own) for cell in of_rank)
    which = "in no cell alone, only in their gradient"
    if cells:
        which = loop.ranks.gather(loop.record.names_of(cells) if loop.ranks.rank == 0 else "")[0]
    found = f"step {state.step}: the loss is not finite ({which})"
    if not loop.record.skips or state.n_skipped_in_a_row > MOST_SKIPPED:
        times = f", in {state.n_skipped_in_a_row} steps in a row" if loop.record.skips else ""
        raise AnnatacError(
            f"{found}{times}; train again into another --out with a lower rate, as --set train.learning_rate=1e-4, or "
            "leave such steps out: --on-nan skip"
        )
    loop.progress.say(f"{found}: left out, {state.n_skipped:,} so far")


@torch.no_grad()
def _cells_not_finite(loop: Loop, batch: Batch, step: int) -> list[int]:
    """The ids of this rank's cells whose own loss is not finite."""
    found = []
    in_bf16 = uses_bf16(loop.options.precision, loop.ranks.device)
    for number in range(len(batch)):
        _seed_step(loop.options.seed, step, loop.ranks.rank)
        with torch.autocast(loop.ranks.device.type, torch.bfloat16, enabled=in_bf16):
            losses: dict[str, LossSum] = loop.task.module(batch[number : number + 1])
        if not all(torch.isfinite(loss.sum) for loss in losses.values()):
            found.append(int(batch.cell_ids[number]))
    return found


def _checkpoint(
    loop: Loop, state: _State, optimizer: torch.optim.Optimizer, place: StreamState
) -> dict[str, Any]:
    """All that is needed to go on. place: of the stream, after the last batch that was trained on"""
    return {
        "module": loop.task.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "stream": place,
        "state": vars(state),
        "lineage": loop.record.lineage,
        "torch": str(torch.__version__),  # a class of its own, which weights_only refuses
    }


def _leave(loop: Loop, state: _State, checkpoint: dict[str, Any], number: int) -> None:
    """Keep the state, and raise RunInterruptedError; StoreError where it could not be kept, on every rank alike."""
    failure: StoreError | None = None
    try:
        loop.record.save(state.step, checkpoint, state.bests, needed=True)
        loop.record.settle()
    except StoreError as error:
        failure = error
    failed = loop.ranks.sum([float(failure is not None)])[0]
    if failed:
        raise failure or StoreError(
            f"{loop.record.location}: the first rank could not keep the state; see what it says"
        )
    raise RunInterruptedError(
        f"{loop.record.location}: asked to end, and ended after {state.step:,} steps, which are kept; the same command "
        "goes on",
        number,
    )


def _after_epoch(
    loop: Loop, state: _State, optimizer: torch.optim.Optimizer, epoch: int, meter: Meter
) -> None:
    """Validate, keep the state, log."""
    figures = loop.task.validate(loop.ranks)
    state.judge(figures, epoch, loop.options.min_gain)
    place = loop.stream.state_dict()
    loop.record.save(state.step, _checkpoint(loop, state, optimizer, place), state.bests, needed=True)
    loop.record.validated(state.step, epoch, figures)
    loop.progress.say(f"epoch {epoch}: {shown(meter.figures())}  |  validation {shown(figures)}")


def _load_best(loop: Loop, state: _State) -> dict[str, float]:
    if not state.bests:
        raise AnnatacError(
            f"{loop.record.location}: no validation gave a number; train again into another --out with a lower rate"
        )
    loop.record.settle()
    data = loop.ranks.bytes_of_first(loop.record.read(state.bests[-1]))
    assert data is not None
    loop.task.module.load_state_dict(state_of(data)["module"])
    return state.best_figures
