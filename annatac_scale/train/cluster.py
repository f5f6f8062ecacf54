"""Pretraining on Ray Train: the same loop, one process a worker, on one machine or many.

Every worker opens the store itself and reads its own lanes. The run's folder holds all state: when Ray starts the
workers again, as many as there are places for, they go on from the newest checkpoint. Store and folder must be on a
file system that all machines share, or in object storage.
"""

import logging
import math
import os
import socket
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from annatac_scale import errors
from annatac_scale.config import from_dict, to_dict
from annatac_scale.errors import AnnatacError, ConfigError, InputError, RunInterruptedError
from annatac_scale.progress import Progress, Silent
from annatac_scale.progress_lines import LineProgress
from annatac_scale.store.place import Location, is_url
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.order import default_lanes
from annatac_scale.train.board import Board
from annatac_scale.train.checkpoint import CHECKPOINTS, checkpoint_steps
from annatac_scale.train.interruption import Interruption, interruption
from annatac_scale.train.presets import PretrainConfig
from annatac_scale.train.pretrain import PretrainReport, pretrain_folder, pretrain_rank, report_of
from annatac_scale.train.ranks import COLLECTIVE_TIMEOUT_S, Ranks
from annatac_scale.train.run_options import RunOptions

LOOK_EVERY_S = 0.5
"""Seconds between two looks at the board, by the driver and by the first worker."""

REACH_S = 10.0
"""Seconds in which a cluster's address has to answer."""

LEAVE_S = 300.0
"""Seconds in which workers that were asked to end keep their state; after that they are taken to hang."""

WAIT_SAID_S = 60.0
"""Seconds without an attempt after which the user is told that the cluster has no place for the workers."""

_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # they need the internet
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # After a lost machine Ray waits that long for its workers, which never come, before it goes on with others.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}
"""Unless the user's environment says otherwise."""


@dataclass(frozen=True)
class Cluster:
    """The workers of a run, and the Ray cluster that they are on.

    fewest, most: workers; where these differ, as many as there are places for: at each start of the workers, which are
        started again when a place was lost, and for more places at most once in twice the time between checkpoints
    gpus: one GPU a worker
    address: of a cluster; "auto": the one that RAY_ADDRESS names or that runs on this machine; None: the one that this
        process is connected to or that RAY_ADDRESS names, else one that is started here for the time of the run
    """

    fewest: int
    most: int
    gpus: bool = False
    address: str | None = None

    @classmethod
    def of(cls, workers: str | int, gpus: bool = False, address: str | None = None) -> "Cluster":
        """From "N" or "MIN:MAX". Raises ConfigError for anything else, and for addresses of Ray's client."""
        fewest, colon, most = str(workers).partition(":")
        try:
            found = cls(int(fewest), int(most if colon else fewest), gpus, address)
        except ValueError:
            found = cls(0, 0)
        if not 1 <= found.fewest <= found.most:
            raise ConfigError(f"--workers {workers}: expected N or MIN:MAX, as 4 or 4:16, from 1 on")
        if address is not None and address.startswith("ray://"):
            raise ConfigError(
                f"--ray {address}: expected auto or HOST:PORT of a cluster that this machine belongs to; from outside, "
                "use `ray job submit -- annatac pretrain ... --ray auto`"
            )
        return found

    @property
    def starts_ray(self) -> bool:
        """Whether there is no cluster at hand."""
        return self.address is None and not ray.is_initialized() and "RAY_ADDRESS" not in os.environ

    def check(self, config: PretrainConfig) -> None:
        """Raise ConfigError where there cannot be as many."""
        batch = config.train.global_batch_size
        lanes = config.train.lanes or default_lanes(batch)
        if self.most > lanes:
            raise ConfigError(
                f"--workers {self.most}: expected 1 to {lanes}, the lanes of a global batch of {batch} cells; for a "
                f"new run, --set train.lanes={batch} allows {batch}"
            )
        there = torch.cuda.device_count()
        if self.gpus and self.starts_ray and there < self.fewest:
            raise ConfigError(
                f"--workers {self.fewest} --gpus: this machine has {there} GPUs, expected one for each worker; ask for "
                "fewer, leave --gpus out, or name a cluster with --ray"
            )

    @property
    def said(self) -> str:
        """How many workers of what kind, in words."""
        count = str(self.most) if self.fewest == self.most else f"{self.fewest} to {self.most}"
        return f"{count} workers, {'one GPU each' if self.gpus else 'on CPUs'}"

    @property
    def cpus(self) -> int:
        """CPUs of a worker, which Ray makes its number of threads: on this machine its even share of all."""
        return max(1, (os.cpu_count() or 1) // self.most) if self.starts_ray else 1

    def scaling(self, resize_s: float) -> ScalingConfig:
        """The same for Ray Train. resize_s: between two looks whether there are places for more workers"""
        elastic: dict[str, Any] = {"num_workers": self.most}
        if self.fewest != self.most:
            elastic = {"num_workers": (self.fewest, self.most), "elastic_resize_monitor_interval_s": resize_s}
        return ScalingConfig(
            use_gpu=self.gpus,
            resources_per_worker={"CPU": self.cpus, **({"GPU": 1} if self.gpus else {})},
            **elastic,
        )

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Ray, connected to or started, for the time of the context."""
        if ray.is_initialized():
            yield
            return
        for name, value in _RAY_SETTINGS.items():
            os.environ.setdefault(name, value)
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self.starts_ray:
            # Without an address Ray would join any cluster that it finds a trace of on this machine, dead ones too.
            cpus = self.most * self.cpus
            options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        else:
            options["address"] = self.address or os.environ["RAY_ADDRESS"]
            _check_reachable(options["address"])
        try:
            ray.init(**options)
        except ConnectionError as error:
            where = options["address"]
            if "AuthenticationError" in str(error.__cause__):
                raise InputError(
                    f"--ray {where}: the cluster asks for its token; export RAY_AUTH_MODE=token here as there, and "
                    "RAY_AUTH_TOKEN where the token is not in ~/.ray/auth_token"
                ) from error
            raise InputError(_no_cluster(where)) from error
        try:
            yield
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise InputError where nobody listens at HOST:PORT: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise InputError(_no_cluster(address)) from error


def _no_cluster(address: str) -> str:
    return (
        f"--ray {address}: found no Ray cluster there; start one with `ray start --head`, or leave --ray out and Ray "
        "is started here for the run"
    )


def pretrain_on_ray(
    store: Location,
    out: Location,
    config: PretrainConfig,
    cluster: Cluster,
    progress: Progress | None = None,
    options: RunOptions | None = None,
) -> PretrainReport:
    """Pretrain on the workers of a Ray cluster; errors and the result are those of ``pretrain``.

    A worker or machine that is lost is made up for: the workers start again, at least ``cluster.fewest``, and go on
    from the newest checkpoint. Raises ConfigError when there are too few cells in a batch or GPUs for the workers,
    AnnatacError when the workers end again and again at the same step, RunInterruptedError when a signal asked this
    process to end.
    """
    options, progress = options or RunOptions(), progress or Silent()
    cluster.check(config)
    # Workers have working folders of their own.
    store, out = (place if is_url(place) else Path(place).resolve() for place in (store, out))
    run = pretrain_folder(IslandStore.open(store), out, config)
    with run.use(progress.say):
        if run.complete:
            progress.say(f"{run.location}: complete already; its model stays as it is")
        else:
            progress.say(f"Ray Train: starting {cluster.said}")
            task = {
                "store": str(store),
                "out": str(run.location),
                "config": to_dict(config),
                "options": to_dict(options),
            }
            _fit(task, cluster, progress)
    return report_of(run)


class _Board:
    """The board as workers and driver call it, over Ray."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            return ray.get(getattr(self._actor, name).remote(*arguments))

        return call


def _fit(task: dict[str, Any], cluster: Cluster, progress: Progress) -> None:
    """Run ``_worker`` on all workers; raise what they met."""
    with cluster.connected(), tempfile.TemporaryDirectory(prefix="annatac-ray-") as scratch:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
        board = _Board(actor)
        trainer = TorchTrainer(
            _worker,
            train_loop_config={**task, "board": actor},
            torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
            # More workers begin at the newest checkpoint: there has to be one since the last time there were more.
            scaling_config=cluster.scaling(2 * 60 * task["options"]["checkpoint_minutes"]),
            run_config=RunConfig(
                # The same name would make Ray resume its own state, which is none; ours is in the run's folder.
                name=uuid.uuid4().hex,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=-1),  # the board ends what gets nowhere
            ),
        )
        with interruption() as asked, asked.heeded():
            try:
                failure = _watched(trainer.fit, board, cluster, progress, asked)
                met, number = board.state()
            except ray.exceptions.RayError as error:
                # The cluster ended before us, as where all get a signal at once.
                reason = str(error).strip().splitlines()[-1]
                lost = f"{task['out']}: the Ray cluster was lost ({reason}); the same command goes on where it can"
                if asked.signal:
                    raise RunInterruptedError(lost, asked.signal) from error
                raise AnnatacError(lost) from error
        if met is not None:
            kind, message = met
            if kind == RunInterruptedError.__name__:
                raise RunInterruptedError(message, number)
            raise getattr(errors, kind)(message)
        if failure is not None:
            reason = str(failure).strip().splitlines()[-1]
            raise AnnatacError(
                f"{task['out']}: the workers failed: {reason}; run the command again to resume"
            ) from failure


def _watched(
    fit: Callable[[], Any], board: _Board, cluster: Cluster, progress: Progress, asked: Interruption
) -> BaseException | None:
    """Run ``fit``, show in the meantime what the first worker says, and tell it when this process is asked to end.

    Returns what ``fit`` raised. It has a thread of its own, where Ray leaves the handlers of signals alone.
    """
    begin, n_shown, waiting_said, asked_at = time.monotonic(), 0, False, math.inf
    pool = ThreadPoolExecutor(1, "ray-train")
    try:
        fitting = pool.submit(fit)
        while True:
            ended = fitting.done()
            lines, attempts = board.said(n_shown)
            for line in lines:
                progress.say(line)
            n_shown += len(lines)
            if ended:
                return fitting.exception()
            if asked.signal:
                asked_at = min(asked_at, time.monotonic())
                heeded = board.ask(asked.signal)
                if not heeded or time.monotonic() - asked_at > LEAVE_S:
                    raise RunInterruptedError(_left_at_once(heeded), asked.signal)
            if not attempts and not waiting_said and time.monotonic() - begin > WAIT_SAID_S:
                waiting_said = True
                has = {name: n for name, n in ray.cluster_resources().items() if name in ("CPU", "GPU")}
                progress.say(
                    f"the workers have not begun yet: asked for {cluster.said}, the cluster has {has}"
                )
            wait([fitting], timeout=LOOK_EVERY_S)
    finally:
        pool.shutdown(wait=False)


def _left_at_once(heeded: bool) -> str:
    if heeded:
        return f"asked to end, and the workers did not in {LEAVE_S:.0f} s; the same command goes on after what is kept"
    return "asked to end while no steps were taken; the same command goes on after what is kept"


def _worker(task: dict[str, Any]) -> None:
    """What each worker runs. An error of ours is noted on the board, so that Ray's next attempt ends at once."""
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), get_device())
    board = _Board(task["board"])
    if board.state()[0] is not None:
        return
    progress = LineProgress(board.say) if ranks.rank == 0 else Silent()
    try:
        config = from_dict(PretrainConfig, task["config"])
        options = from_dict(RunOptions, task["options"])
        store = IslandStore.open(task["store"])
        run = pretrain_folder(store, task["out"], config)
        if ranks.rank == 0:
            board.begin(max(checkpoint_steps(run.place.below(CHECKPOINTS)), default=0))
            if board.state()[0] is not None:
                raise AnnatacError("the workers end again and again at the same step")
        with _asked(board, ranks) as asked:
            pretrain_rank(store, run, config, options, ranks, progress, asked)
    except RunInterruptedError as error:  # on every rank
        board.fail(type(error).__name__, str(error))
    except AnnatacError as error:  # others may wait for this rank: Ray has to end them
        board.fail(type(error).__name__, str(error))
        raise
    except Exception:
        board.met(traceback.format_exc().strip().splitlines()[-1])
        raise


@contextmanager
def _asked(board: _Board, ranks: Ranks) -> Iterator[Interruption]:
    """Whether the driver asks to end; one rank that knows is enough."""
    done = threading.Event()
    asked = _AskedByDriver(board) if ranks.rank == 0 else Interruption()

    def watch() -> None:
        while not done.wait(LOOK_EVERY_S):
            with suppress(ray.exceptions.RayError):
                asked.ask(board.state()[1])

    thread = threading.Thread(target=watch, daemon=True)
    if ranks.rank == 0:
        thread.start()
    try:
        yield asked
    finally:
        done.set()
        if ranks.rank == 0:
            thread.join()


class _AskedByDriver(Interruption):
    """Tells the driver whether it may wait for the workers to end."""

    def __init__(self, board: _Board) -> None:
        super().__init__()
        self._board = board

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """As in Interruption; the driver waits until the attempt is over."""
        self._board.heed()
        with super().heeded():
            yield
