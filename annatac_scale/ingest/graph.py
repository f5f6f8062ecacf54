"""The Dask graph of a conversion, and its two ways to run: threads of this process, or a cluster's workers."""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dask import threaded
from dask.callbacks import Callback

from annatac_scale.errors import InputError
from annatac_scale.ingest.fragment_tasks import (
    Done,
    call_cells,
    commit_fragments,
    count_fragments,
    counting_of,
    finish_fragments,
    fragment_peaks,
    listed_barcodes,
)
from annatac_scale.ingest.hook import Hook
from annatac_scale.ingest.labels import LabelTable
from annatac_scale.ingest.matrix_tasks import commit_matrix, finish_matrix, plan_matrix
from annatac_scale.ingest.samples import FRAGMENTS, Job, Recipe
from annatac_scale.progress import Advance
from annatac_scale.store.place import Location

SAMPLES_ON_CLUSTER = 64
"""Samples at once on a cluster, whatever its workers."""

_SECONDS_TO_CONNECT = 30


class Graph:
    """The tasks of all samples of a conversion, by names, in the form that all of Dask's schedulers take.

    at_once: samples that are on the way at the same time, at most: each has to put down what it has counted until its
    commit; None: one more than there are workers
    tasks: a function and its arguments, of which names stand for the results of the tasks so named, or a value
    commits: names of the samples' last tasks, in their order; counts: the file and range that a task counts
    """

    def __init__(self, recipe: Recipe, at_once: int | None = None) -> None:
        self.recipe = recipe
        self.tasks: dict[str, Any] = {}
        self.commits: list[str] = []
        self.counts: dict[str, tuple[Job, int]] = {}
        self._at_once = at_once or recipe.workers + 1
        self._run = uuid.uuid4().hex
        self._shared = self._put("recipe", recipe)
        self._peaks: dict[Location | None, str] = {}
        self._listed: dict[Location, str] = {}
        self._countings: dict[tuple[Location | None, Location | None], str] = {}
        self._labels: dict[int, str] = {}

    def add(self, job: Job, labels: LabelTable | None, needed: bool) -> None:
        """Add the tasks of a sample; its commit follows that of the sample before."""
        given = None
        if labels is not None:
            if id(labels) not in self._labels:
                self._labels[id(labels)] = self._put("labels", labels)
            given = self._labels[id(labels)]
        name = self._put("job", job)
        if len(self.commits) >= self._at_once:
            name = self._task(_in_turn, name, self.commits[-self._at_once])
        add = self._fragments if job.kind == FRAGMENTS else self._matrix
        self.commits.append(add(job, name, given, needed))

    def _fragments(self, job: Job, name: str, labels: str | None, needed: bool) -> str:
        source, counting = self._counted_over(job.sample.peaks, job.sample.barcodes)
        counted = []
        for number in range(job.text.n_ranges):
            counted.append(self._task(count_fragments, name, number, self._shared, counting))
            self.counts[counted[-1]] = (job, number)
        cells = self._task(call_cells, name, self._shared, counting, counted)
        n_parts = self._n_parts(job)
        records = [
            self._task(finish_fragments, name, self._shared, source, cells, part, n_parts)
            for part in range(n_parts)
        ]
        done = (name, self._shared, source, cells, labels, needed, records, self._last())
        return self._task(commit_fragments, *done)

    def _counted_over(self, peaks: Location | None, barcodes: Location | None) -> tuple[str, str]:
        """The tasks that read peaks and make them ready for counting: one for all samples that share them."""
        if peaks not in self._peaks:
            self._peaks[peaks] = self._task(fragment_peaks, self._shared, peaks)
        source, listed = self._peaks[peaks], None
        if barcodes is not None:
            if barcodes not in self._listed:
                self._listed[barcodes] = self._task(listed_barcodes, self._shared, barcodes)
            listed = self._listed[barcodes]
        if (peaks, barcodes) not in self._countings:
            self._countings[peaks, barcodes] = self._task(counting_of, self._shared, source, listed)
        return source, self._countings[peaks, barcodes]

    def _matrix(self, job: Job, name: str, labels: str | None, needed: bool) -> str:
        plan = self._task(plan_matrix, name, self._shared)
        n_parts = self._n_parts(job)
        records = [
            self._task(finish_matrix, name, self._shared, plan, part, n_parts) for part in range(n_parts)
        ]
        return self._task(commit_matrix, name, self._shared, plan, labels, needed, records, self._last())

    def _last(self) -> str | None:
        return self.commits[-1] if self.commits else None

    def _n_parts(self, job: Job) -> int:
        """Tasks among which the shards of a sample are divided: few for a small file, one for each worker at most."""
        return max(1, min(self.recipe.workers, job.n_bytes // (1 << 20)))

    def _task(self, function: Callable[..., Any], *arguments: Any) -> str:
        return self._put(function.__name__, (function, *arguments))

    def _put(self, what: str, task: Any) -> str:
        # Numbered, for of tasks that are alike Dask takes the one whose name comes first.
        name = f"{what}-{self._run}-{len(self.tasks):09d}"
        self.tasks[name] = task
        return name


def _in_turn(job: Job, previous: Done) -> Job:
    """The job of a sample that waits for the commit of an earlier one."""
    return job


def run_graph(graph: Graph, address: str | None, note: Callable[[Done], None], advance: Advance) -> None:
    """Work through a graph, in threads or on the cluster at ``address``; ``note`` is told of each commit."""
    if address is None:
        _run_here(graph, note)
    else:
        _run_on_cluster(graph, address, note, advance)


def _run_here(graph: Graph, note: Callable[[Done], None]) -> None:
    def finished(name: str, result: Any, *_: Any) -> None:
        if isinstance(result, Done) and name in graph.tasks:
            note(result)

    with ThreadPoolExecutor(graph.recipe.workers) as pool, Callback(posttask=finished):
        try:
            threaded.get(graph.tasks, graph.commits, pool=pool)
        except BaseException:
            graph.recipe.hook.stop()
            raise


def _run_on_cluster(graph: Graph, address: str, note: Callable[[Done], None], advance: Advance) -> None:
    """Tasks tell of their progress when they are done: the workers are other processes."""
    from distributed import Client, as_completed

    try:
        client = Client(address, timeout=_SECONDS_TO_CONNECT)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{address}: found no Dask scheduler ({error}); expected one there; start it, or leave out --dask"
        ) from error
    with client:
        futures = client.get(graph.tasks, [*graph.counts, *graph.commits], sync=False)
        try:
            for future in as_completed(futures):
                result = future.result()
                if isinstance(result, Done):
                    note(result)
                else:
                    _tell(graph.counts[future.key], result, advance)
        except BaseException:
            for future in futures:
                future.release()
            # What workers have begun they go on with: they are told, and nothing is removed while they still write.
            client.run(_stop, graph.recipe.hook, list(graph.tasks), on_error="ignore")
            raise


async def _stop(hook: Hook, names: list[str], dask_worker: Any) -> None:
    """Stop the tasks ``names`` of a worker, in its process."""
    hook.stop()
    ours = set(names)
    while not ours.isdisjoint(dask_worker.state.tasks):
        await asyncio.sleep(0.05)


def _tell(count: tuple[Job, int], summaries: list[Mapping[str, Any]], advance: Advance) -> None:
    job, number = count
    n_bytes = job.text.bytes_of_range(number)
    if all("found" in summary for summary in summaries):
        advance.found(n_bytes, job.name)
    else:
        advance(n_bytes, sum(summary["lines"]["lines"] for summary in summaries), job.name)
