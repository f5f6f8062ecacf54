"""Pretraining on Ray Train: the same loop, one process a worker, gradients summed over the workers.

Every worker opens the store itself and reads its own lanes. The run's folder holds all state, so that a worker group
which Ray starts again after a failure goes on from the last checkpoint. Store and folder must be on a file system that
all workers share.
"""

import json
import logging
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from annatac_scale import errors
from annatac_scale.config import from_dict, to_dict
from annatac_scale.errors import AnnatacError, ConfigError
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.store import IslandStore
from annatac_scale.train.checkpoint import RunFolder
from annatac_scale.train.loop import Ranks
from annatac_scale.train.presets import PretrainConfig
from annatac_scale.train.pretrain import PretrainReport, pretrain_folder, pretrain_rank, report_of

RESTARTS = 3
"""Times that Ray starts the workers again after a failure before it gives up."""

COLLECTIVE_TIMEOUT_S = 6 * 3600
"""Workers wait for the first one, which computes the positions."""

SHOW_EVERY_S = 0.5
"""Seconds between two looks at what the workers said."""


def pretrain_on_ray(
    store: Path,
    out: Path,
    config: PretrainConfig,
    workers: int,
    gpus: bool = False,
    progress: Progress | None = None,
) -> PretrainReport:
    """Pretrain with ``workers`` processes on Ray; errors and the result are those of ``pretrain``.

    Uses the cluster that this process is connected to, else the one that RAY_ADDRESS names, else one that it starts on
    this machine for the time of the run. Raises ConfigError when there are too few cells in a batch or GPUs for the
    workers, AnnatacError when the workers failed more often than Ray restarts them.
    """
    progress = progress or Silent()
    group = _Workers(workers, gpus)
    group.check(config)
    store, out = store.resolve(), out.resolve()
    run = pretrain_folder(IslandStore.open(store), out, config, workers)
    with run.use():
        if run.complete:
            progress.say(f"{run.path}: complete already; its model stays as it is")
        else:
            progress.say(f"Ray Train: starting {workers} workers, {'one GPU each' if gpus else 'on CPUs'}")
            with _scratch(run) as scratch, _shown(scratch / _LINES, progress):
                arguments = {"store": str(store), "out": str(out), "config": to_dict(config)}
                _fit({**arguments, "scratch": str(scratch)}, group)
                _raise_what_workers_met(scratch)
    return report_of(run)


_LINES, _ERROR = "lines.txt", "error.json"


@dataclass(frozen=True)
class _Workers:
    """How many processes, and what each one gets."""

    count: int
    gpus: bool

    @property
    def starts_ray(self) -> bool:
        """Whether there is no cluster at hand."""
        return not ray.is_initialized() and "RAY_ADDRESS" not in os.environ

    def check(self, config: PretrainConfig) -> None:
        """Raise ConfigError where there cannot be as many."""
        most = config.train.global_batch_size
        if not 1 <= self.count <= most:
            raise ConfigError(f"--workers {self.count}: expected 1 to the global batch size, {most}")
        there = torch.cuda.device_count()
        if self.gpus and self.starts_ray and there < self.count:
            raise ConfigError(
                f"--workers {self.count} --gpus: this machine has {there} GPUs, expected one for each worker; ask for "
                "fewer, leave --gpus out, or set RAY_ADDRESS to a cluster"
            )

    @property
    def cpus(self) -> int:
        """CPUs of a worker, which Ray makes its number of threads: on this machine its even share of all."""
        return max(1, (os.cpu_count() or 1) // self.count) if self.starts_ray else 1


@contextmanager
def _ray(workers: _Workers) -> Iterator[None]:
    """Ray, connected to or started."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # they need the internet
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if workers.starts_ray:
        # Without an address Ray would join any cluster that it finds a trace of on this machine, dead ones too.
        options |= {"address": "local", "num_cpus": workers.count * workers.cpus, "include_dashboard": False}
    ray.init(**options)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _scratch(run: RunFolder) -> Iterator[Path]:
    """A folder in the run's for what lasts no longer than the workers."""
    folder = run.path / ".ray"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fit(arguments: dict[str, Any], workers: _Workers) -> None:
    """Run ``_worker`` on all workers. Raises AnnatacError when Ray gives up."""
    resources = {"CPU": workers.cpus, **({"GPU": 1} if workers.gpus else {})}
    with _ray(workers):
        trainer = TorchTrainer(
            _worker,
            train_loop_config=arguments,
            torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
            scaling_config=ScalingConfig(
                num_workers=workers.count, use_gpu=workers.gpus, resources_per_worker=resources
            ),
            run_config=RunConfig(
                # The same name would make Ray resume its own state; ours is in the run's folder.
                name=uuid.uuid4().hex,
                storage_path=arguments["scratch"],
                failure_config=FailureConfig(max_failures=RESTARTS),
            ),
        )
        try:
            with _interruptible():
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            reason = str(error).strip().splitlines()[-1]
            raise AnnatacError(
                f"{arguments['out']}: the workers failed: {reason}; run the command again to resume"
            ) from error


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt, as ever: Ray takes it over for good and makes it an orderly end of the process."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _worker(arguments: dict[str, Any]) -> None:
    """What each worker runs. An error that a restart would meet again is noted, not raised: Ray would restart it."""
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), get_device())
    scratch = Path(arguments["scratch"])
    progress = _Lines(scratch / _LINES) if ranks.rank == 0 else Silent()
    try:
        config = from_dict(PretrainConfig, arguments["config"])
        store = IslandStore.open(arguments["store"])
        run = pretrain_folder(store, arguments["out"], config, ranks.world_size)
        pretrain_rank(store, run, config, ranks, progress)
    except AnnatacError as error:
        note = json.dumps({"kind": type(error).__name__, "message": str(error)})
        (scratch / _ERROR).write_text(note)


def _raise_what_workers_met(scratch: Path) -> None:
    if (scratch / _ERROR).exists():
        met = json.loads((scratch / _ERROR).read_text())
        raise getattr(errors, met["kind"])(met["message"])


class _Lines(Silent):
    """Writes lines to a file that the driver shows."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def say(self, line: str) -> None:
        """Append the line."""
        with self._path.open("a") as file:
            file.write(f"{line}\n")


@contextmanager
def _shown(lines: Path, progress: Progress) -> Iterator[None]:
    """Show in the meantime what the first worker says."""
    done = threading.Event()
    n_shown = 0

    def show() -> None:
        nonlocal n_shown
        said = lines.read_text().split("\n")[:-1] if lines.exists() else []
        for line in said[n_shown:]:
            progress.say(line)
        n_shown = len(said)

    def watch() -> None:
        while not done.wait(SHOW_EVERY_S):
            show()
        show()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
