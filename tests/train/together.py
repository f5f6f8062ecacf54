"""Runs of several ranks on this machine, each a process, joined by gloo."""

import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import StopInStep
from torch import multiprocessing

from annatac_scale.errors import RunInterruptedError
from annatac_scale.progress import Silent
from annatac_scale.store.store import IslandStore
from annatac_scale.train.interruption import Interruption
from annatac_scale.train.presets import PretrainConfig
from annatac_scale.train.pretrain import pretrain_folder, pretrain_rank
from annatac_scale.train.ranks import Ranks
from annatac_scale.train.run_options import RunOptions

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Attempt:
    """An attempt at a run; ``ask_after``: steps after which a signal asks it to end, 0: it is left in peace."""

    out: Path
    config: PretrainConfig
    options: RunOptions = field(default_factory=RunOptions)
    ask_after: int = 0


def join(rank: int, world_size: int, meet: Path) -> Ranks:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=world_size
    )
    return Ranks(rank, world_size, CPU)


def _process(rank: int, world_size: int, meet: Path, store_path: Path, attempts: list[Attempt]) -> None:
    ranks = join(rank, world_size, meet)
    store = IslandStore.open(store_path)
    for attempt in attempts:
        if attempt.ask_after:
            with pytest.raises(RunInterruptedError) as raised:
                _make(attempt, store, ranks)
            assert raised.value.number == signal.SIGTERM
        else:
            _make(attempt, store, ranks)
        ranks.wait()
    torch.distributed.destroy_process_group()


def _make(attempt: Attempt, store: IslandStore, ranks: Ranks) -> None:
    asked = Interruption()
    run = pretrain_folder(store, attempt.out, attempt.config)
    progress = Silent()
    if attempt.ask_after and ranks.rank == 0:
        progress = StopInStep(attempt.ask_after, lambda: asked.ask(signal.SIGTERM))
    with run.use(progress.say) if ranks.rank == 0 else nullcontext():
        pretrain_rank(store, run, attempt.config, attempt.options, ranks, progress, asked)


def pretrain_together(world_size: int, scratch: Path, store: IslandStore, attempts: list[Attempt]) -> None:
    """Make some attempts one after the other, on ``world_size`` ranks. scratch: an empty folder"""
    arguments = (world_size, scratch / "meet", store.path, attempts)
    started(_process, arguments, world_size)


def started(function: Callable[..., None], arguments: tuple[Any, ...], world_size: int) -> None:
    """Call a function with a rank and ``arguments`` in ``world_size`` processes, and wait for all."""
    multiprocessing.start_processes(function, arguments, world_size, start_method="forkserver")
