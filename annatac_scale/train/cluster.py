"""Pretraining on Ray Train: the same loop, one process a worker, gradients averaged by DDP.

Every worker opens the store itself and reads its own lanes. The run's folder holds all state, so that a worker group
which Ray starts again after a failure goes on from the last checkpoint. ``out`` must be on a file system that all
workers share.
"""

import logging
import os
import uuid
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from annatac_scale.config import from_dict, to_dict
from annatac_scale.errors import AnnatacError, ConfigError
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.store import IslandStore
from annatac_scale.train.loop import Ranks
from annatac_scale.train.presets import PretrainConfig
from annatac_scale.train.pretrain import PretrainReport, pretrain

RESTARTS = 3
"""Times that Ray starts the workers again after a failure before it gives up."""


def pretrain_on_ray(
    store: Path,
    out: Path,
    config: PretrainConfig,
    workers: int,
    gpus: bool = False,
    progress: Progress | None = None,
) -> PretrainReport:
    """Pretrain with ``workers`` processes on the Ray cluster at hand, or on one started on this machine.

    Raises AnnatacError when the workers failed more often than Ray restarts them.
    """
    progress = progress or Silent()
    if workers < 1 or workers > config.train.global_batch_size:
        raise ConfigError(
            f"--workers {workers}: expected 1 to the global batch size, {config.train.global_batch_size}"
        )
    store, out = store.resolve(), out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    started = not ray.is_initialized()
    if started:
        # Usage reports need the internet; the dashboard is Ray's own business when a cluster is at hand.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(logging_level=logging.ERROR, include_dashboard=False, log_to_driver=True)
    try:
        resources = {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"store": str(store), "out": str(out), "config": to_dict(config)},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus, resources_per_worker=resources),
            run_config=RunConfig(
                # The same name would make Ray resume its own state; ours is in the run's folder.
                name=f"{out.name}-{uuid.uuid4().hex[:8]}",
                storage_path=str(out.parent / f".{out.name}.ray"),
                failure_config=FailureConfig(max_failures=RESTARTS),
            ),
        )
        progress.say(f"Ray Train: {workers} workers, {'one GPU each' if gpus else 'CPU'}")
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise AnnatacError(
                f"{out}: the workers failed: {_last_line(error)}; run the command again to resume"
            ) from error
    finally:
        if started:
            ray.shutdown()
    return _report(result.metrics or {})


def _worker(arguments: dict[str, Any]) -> None:
    """What each worker runs."""
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), get_device())
    config = from_dict(PretrainConfig, arguments["config"])
    report = pretrain(IslandStore.open(arguments["store"]), arguments["out"], config, ranks, _Lines())
    ray.train.report({"report": {**vars(report), "model": str(report.model)}})


class _Lines(Silent):
    """Prints lines; Ray carries a worker's output to the driver."""

    def say(self, line: str) -> None:
        print(line, flush=True)


def _report(metrics: dict[str, Any]) -> PretrainReport:
    values = metrics["report"]
    return PretrainReport(
        **{**values, "model": Path(values["model"]), "level_shares": tuple(values["level_shares"])}
    )


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
