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

from annatac_scale.errors import AnnatacError, RunInterruptedError, StoreError
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
from annatac_scale.train.train_options import TrainOptions, autocast, rate_factor

GIVE_BACK_EVERY_S = 60.0
"""Seconds of steps after which freed memory goes back to the system: not all arrays are of round lengths."""
MOST_SKIPPED = 20
"""Steps in a row that may be left out because their loss is not finite: then the weights are past help."""


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

    def validate(self, ranks: Ranks, after_batch: Callable[[], None]) -> dict[str, float]:
        """Figures on the held-out cells, the same on every rank; ``score`` is what early stopping maximises.

        after_batch: called on all ranks equally often; may raise, and the run is left
        """
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
    optimizer = torch.optim.AdamW(loop.task.parameter_groups(loop.options), weight_decay=0.0, fused=True)
    state = _begin(loop, optimizer, start)
    with loop.asked.heeded():
        _train(loop, optimizer, state)
    return _load_best(loop, state)


def _train(loop: Loop, optimizer: torch.optim.Optimizer, state: _State) -> None:
    """The steps and validations from ``state`` on."""
    task, stream, options, ranks, record = loop.task, loop.stream, loop.options, loop.ranks, loop.record
    rates = [
        group["lr"] for group in task.parameter_groups(options)
    ]  # not those that a checkpoint had come to
    module = ranks.parallel(task.module)
    _lay_out_buckets(loop, module)
    n_steps = options.epochs * len(stream)
    given_back = time.monotonic()
    epoch = stream.state_dict()["epoch"]
    with loop.progress.task("Training", n_steps, "steps") as advance:
        advance.found(state.step)
        while epoch < options.epochs and state.validations_since_gain < options.patience:
            meter, place = Meter(), stream.state_dict()
            task.module.train()
            for batch, place, waited_s in _prepared(loop, epoch):
                factor = rate_factor(options, state.step, len(stream))
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                _seed_step(options.seed, state.step, ranks.rank)
                record.cells(state.step, epoch, batch.cell_ids)
                begin = time.monotonic()
                counts = _counted(loop, batch, waited_s)
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
                facts = StepFacts(losses, counts.cells, rates[0] * factor, counts.waited_s, computed_s)
                meter.add(facts)
                state.step += 1
                advance(1)
                record.step(facts, state.step, n_steps, epoch + 1)
                if counts.asked:
                    _leave(loop, state, _checkpoint(loop, state, optimizer, place), counts.asked)
                if record.is_due(state.step):
                    record.save(state.step, _checkpoint(loop, state, optimizer, place), state.bests)
                if time.monotonic() - given_back > GIVE_BACK_EVERY_S:
                    give_back_freed_memory()
                    given_back = time.monotonic()
            epoch += 1
            _after_epoch(loop, state, optimizer, epoch, meter, place)
            give_back_freed_memory()


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
    """Of all ranks. targets: by loss; waited_s: mean; asked: the number of a signal that asks to end, or 0"""

    targets: Sequence[float]
    cells: int
    waited_s: float
    asked: int


def _counted(loop: Loop, batch: Batch, waited_s: float) -> _Counts:
    own = loop.task.counts(batch)
    targets = [float(own[name]) for name in loop.task.loss_weights]
    found = loop.ranks.sum([*targets, float(len(batch)), waited_s, *_asked(loop)])
    n = len(targets)
    return _Counts(found[:n], int(found[n]), found[n + 1] / loop.ranks.world_size, _number(found[n + 2 :]))


def _asked(loop: Loop) -> list[float]:
    """For each signal that asks to end, whether this rank got it; to be summed over the ranks."""
    return [float(loop.asked.signal == number) for number in ASKING]


def _number(asked: Sequence[float]) -> int:
    """Of the signal that some rank got, or 0."""
    return next((int(number) for number, times in zip(ASKING, asked, strict=True) if times), 0)


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
    pieces = list(micro_batches(batch, options.micro_tokens))
    for number, piece in enumerate(pieces, 1):
        with _alone(module) if number < len(pieces) else nullcontext():
            with autocast(options.precision, ranks.device):
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
    for number in range(len(batch)):
        _seed_step(loop.options.seed, step, loop.ranks.rank)
        with autocast(loop.options.precision, loop.ranks.device):
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
    loop: Loop,
    state: _State,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    meter: Meter,
    last: StreamState,
) -> None:
    """Validate, keep the state, log. last: place of the stream after the epoch's last batch, yet to be validated"""

    def leave_if_asked() -> None:
        if number := _number(loop.ranks.sum(_asked(loop))):
            _leave(loop, state, _checkpoint(loop, state, optimizer, last), number)

    figures = loop.task.validate(loop.ranks, leave_if_asked)
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
