"""Parts of a prediction on a Ray cluster: plain actors, each with its own copy of the model, and a queue here.

For an actor that is lost another one is started, wherever there is place, and its parts are done again; they are
written whole or not at all, so that each cell comes once. Store, model and labels must be where every machine reaches
them.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from annatac_scale.annotate.labels import Part
from annatac_scale.annotate.predictor import IN_FLIGHT, PredictTask
from annatac_scale.errors import AnnatacError
from annatac_scale.progress import Progress
from annatac_scale.progress_lines import LineProgress
from annatac_scale.train.cluster import Cluster

MOST_DEATHS = 4
"""Actors that may be lost with the same part at work, or in a row before they began."""

WAIT_SAID_S = 60.0
"""Seconds without an actor after which the user is told that the cluster has no place."""

_LOOK_EVERY_S = 1.0
_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ActorUnschedulableError,
)
"""What says that an actor is no more."""


class _PartActor:
    """One copy of the model. Its calls come on IN_FLIGHT threads."""

    def __init__(self, task: dict[str, Any]) -> None:
        self._said: list[str] = []
        self._task = PredictTask.from_dict(task)

    def open(self) -> None:
        """Open store and model: a call of its own, as what a constructor raises is not told."""
        torch.set_num_threads(1)  # as in one_thread_an_operation, for the life of this process
        self._predictor, self._folder = self._task.open(LineProgress(self._said.append))

    def run(self, part: list[Any]) -> list[str]:
        """Do a part; returns what there is to say."""
        self._predictor.run(Part(*part), self._folder)
        said, self._said[:] = list(self._said), []
        return said


def run_on_ray(
    task: PredictTask,
    cluster: Cluster,
    parts: Sequence[Part],
    progress: Progress,
    done: Callable[[Part], None],
) -> None:
    """Do all parts on the actors of a cluster, as many as there are places for. done: is told each that is written

    Raises what an actor met, and AnnatacError where actors are lost again and again.
    """
    with cluster.connected():
        _Crew(task, cluster, parts, progress, done).run()


class _Crew:
    """The actors, the parts that each has at work, and those that are left."""

    def __init__(
        self,
        task: PredictTask,
        cluster: Cluster,
        parts: Sequence[Part],
        progress: Progress,
        done: Callable[[Part], None],
    ) -> None:
        self._left, self._progress, self._done = deque(parts), progress, done
        self._cluster = cluster
        actor: Any = ray.remote(_PartActor)
        resources = {"num_cpus": cluster.cpus, "num_gpus": 1 if cluster.gpus else 0}
        self._actor = actor.options(**resources, max_concurrency=IN_FLIGHT)
        self._task = task.to_dict()
        self._actors: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._at_work: dict[Any, tuple[Any, Part]] = {}
        self._lost_with: Counter[Part] = Counter()
        self._deaths = 0
        for _ in range(min(cluster.most, len(parts))):
            self._start()

    def _start(self) -> None:
        """Start an actor. While it waits for its place it gets no parts: others would have done them long before."""
        actor = self._actor.remote(self._task)
        self._actors.append(actor)
        self._starting[actor.open.remote()] = actor

    def run(self) -> None:
        """Do all parts."""
        began, said = time.monotonic(), False
        try:
            while self._left or self._at_work:
                ready, _ = ray.wait([*self._at_work, *self._starting], timeout=_LOOK_EVERY_S)
                for one in ready:
                    self._take(one)
                nobody = not self._at_work
                if nobody and not said and time.monotonic() - began > WAIT_SAID_S:
                    said = True
                    has = {name: n for name, n in ray.cluster_resources().items() if name in ("CPU", "GPU")}
                    self._progress.say(
                        f"no worker has begun yet: asked for {self._cluster.said}, the cluster has {has}"
                    )
        finally:
            for actor in self._actors:
                ray.kill(actor)

    def _take(self, answer: Any) -> None:
        """Take an answer: of an actor that is ready, or of a part."""
        actor, part = self._at_work.pop(answer, (self._starting.pop(answer, None), None))
        try:
            said = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, AnnatacError) else error) from None
        except _LOST as error:
            self._lost(actor, part, error)
            return
        if part is None:
            self._deaths = 0
        else:
            for line in said:
                self._progress.say(line)
            self._done(part)
        self._give(actor)

    def _lost(self, actor: Any, part: Part | None, error: Exception) -> None:
        """Note that an actor was lost, give its part to another one, and start a new one."""
        reason = str(error).strip().splitlines()[0]
        if part is not None:
            self._left.appendleft(part)
            self._lost_with[part] += 1
            if self._lost_with[part] >= MOST_DEATHS:
                raise _given_up(
                    f"sample {part.sample}, cells from {part.first:,}: {MOST_DEATHS} workers", reason
                )
        if actor in self._actors:  # else another part of it said so already
            self._actors.remove(actor)
            self._deaths += part is None  # while it opened store and model
            if self._deaths >= MOST_DEATHS:
                raise _given_up(f"{self._deaths} workers in a row, each when it began,", reason)
            self._progress.say(f"a worker was lost ({reason}); its parts are done again")
            self._start()
        for one in self._actors:
            if one not in self._starting.values():
                self._give(one)

    def _give(self, actor: Any) -> None:
        """Give an actor parts of those that are left, so many that it always has the next one."""
        n_own = sum(of is actor for of, _ in self._at_work.values())
        while self._left and n_own < IN_FLIGHT:
            part = self._left.popleft()
            call = actor.run.remote([part.sample, part.unit, part.n_cells])
            self._at_work[call] = actor, part
            n_own += 1


def _given_up(who: str, reason: str) -> AnnatacError:
    return AnnatacError(
        f"{who} were lost ({reason}); expected them to live, as they do where there is memory for each; ask for fewer "
        "--workers and run the same command again"
    )
