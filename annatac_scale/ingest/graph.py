"""The Dask graph of a conversion, and its two ways to run: threads of this process, or a cluster's workers."""

import asyncio
import itertools
import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import Delayed, delayed

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

_numbers = itertools.count()


class Graph:
    """The tasks of all samples of a conversion.

    at_once: samples that are on the way at the same time, at most: each has to put down what it has counted until its
    commit; None: one more than there are workers
    """

    def __init__(self, recipe: Recipe, at_once: int | None = None) -> None:
        self.recipe = recipe
        self._at_once = at_once or recipe.workers + 1
        self.commits: dict[Hashable, Delayed] = {}
        self.counts: dict[Hashable, tuple[Job, int, Delayed]] = {}
        self._shared = delayed(recipe, traverse=False)
        self._peaks: dict[Location | None, Delayed] = {}
        self._listed: dict[Location, Delayed] = {}
        self._countings: dict[tuple[Location | None, Location | None], Delayed] = {}
        self._labels: dict[int, Delayed] = {}
        self._last: Delayed | None = None

    def add(self, job: Job, labels: LabelTable | None, needed: bool) -> None:
        """Add the tasks of a sample; its commit follows that of the sample before."""
        with_labels = None
        if labels is not None:
            with_labels = self._labels.setdefault(id(labels), delayed(labels, traverse=False))
        task = delayed(job, traverse=False)
        before = list(self.commits.values())[-self._at_once :]
        if len(before) == self._at_once:
            task = _task(_in_turn, task, before[0])
        add = self._fragments if job.kind == FRAGMENTS else self._matrix
        self._last = add(job, task, with_labels, needed)
        self.commits[self._last.key] = self._last

    def _fragments(self, job: Job, task: Delayed, labels: Delayed | None, needed: bool) -> Delayed:
        source, counting = self._counted_over(job.sample.peaks, job.sample.barcodes)
        counted = []
        for number in range(job.text.n_ranges):
            counted.append(_task(count_fragments, task, number, self._shared, counting))
            self.counts[counted[-1].key] = (job, number, counted[-1])
        cells = _task(call_cells, task, self._shared, counting, counted)
        n_parts = self._n_parts(job)
        records = [
            _task(finish_fragments, task, self._shared, source, cells, part, n_parts)
            for part in range(n_parts)
        ]
        return _task(commit_fragments, task, self._shared, source, cells, labels, needed, records, self._last)

    def _counted_over(self, peaks: Location | None, barcodes: Location | None) -> tuple[Delayed, Delayed]:
        """The tasks that read peaks and make them ready for counting: one for all samples that share them."""
        if peaks not in self._peaks:
            self._peaks[peaks] = _task(fragment_peaks, self._shared, peaks)
        source, listed = self._peaks[peaks], None
        if barcodes is not None:
            if barcodes not in self._listed:
                self._listed[barcodes] = _task(listed_barcodes, self._shared, barcodes)
            listed = self._listed[barcodes]
        if (peaks, barcodes) not in self._countings:
            self._countings[peaks, barcodes] = _task(counting_of, self._shared, source, listed)
        return source, self._countings[peaks, barcodes]

    def _matrix(self, job: Job, task: Delayed, labels: Delayed | None, needed: bool) -> Delayed:
        plan = _task(plan_matrix, task, self._shared)
        n_parts = self._n_parts(job)
        records = [_task(finish_matrix, task, self._shared, plan, part, n_parts) for part in range(n_parts)]
        return _task(commit_matrix, task, self._shared, plan, labels, needed, records, self._last)

    def keys(self) -> Iterable[Hashable]:
        """The names of all tasks: each comes before the last commit."""
        return () if self._last is None else self._last.dask.keys()

    def _n_parts(self, job: Job) -> int:
        """Tasks among which the shards of a sample are divided: few for a small file, one for each worker at most."""
        return max(1, min(self.recipe.workers, job.n_bytes // (1 << 20)))


def _task(function: Callable[..., Any], *arguments: Any) -> Delayed:
    # Named by number: hashing arguments would cost more than some of the tasks, and of tasks that are alike Dask takes
    # the one whose name comes first, so that samples are worked on in their order.
    name = f"{function.__name__}-{next(_numbers):09d}-{uuid.uuid4().hex}"
    return delayed(function, pure=False)(*arguments, dask_key_name=name)


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
    def finished(key: Hashable, result: Any, *_: Any) -> None:
        if key in graph.commits:
            note(result)

    with ThreadPoolExecutor(graph.recipe.workers) as pool, Callback(posttask=finished):
        try:
            compute(list(graph.commits.values()), scheduler="threads", pool=pool)
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
        counts = [task for _, _, task in graph.counts.values()]
        futures = client.compute([*counts, *graph.commits.values()])
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
            client.run(_stop, graph.recipe.hook, list(graph.keys()), on_error="ignore")
            raise


async def _stop(hook: Hook, keys: list[Hashable], dask_worker: Any) -> None:
    """Stop the tasks ``keys`` of a worker, in its process."""
    hook.stop()
    ours = set(keys)
    while not ours.isdisjoint(dask_worker.state.tasks):
        await asyncio.sleep(0.05)


def _tell(count: tuple[Job, int, Delayed], summaries: list[Mapping[str, Any]], advance: Advance) -> None:
    job, number, _ = count
    n_bytes = job.text.bytes_of_range(number)
    if all("found" in summary for summary in summaries):
        advance.found(n_bytes, job.name)
    else:
        advance(n_bytes, sum(summary["lines"]["lines"] for summary in summaries), job.name)
