"""The tasks that convert one peak matrix: its peaks and cells, its shards, its commit.

As those of fragment files, they are functions of what may be pickled, and find again what an earlier run put down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.ingest.fragment_tasks import (
    Done,
    Said,
    conversion_record,
    no_count,
    tell_peaks,
    with_labels,
)
from annatac_scale.ingest.labels import LabelTable
from annatac_scale.ingest.local_copy import local_copy
from annatac_scale.ingest.matrices import PeakMatrix
from annatac_scale.ingest.open_matrix import open_matrix
from annatac_scale.ingest.peaks import PeakSet
from annatac_scale.ingest.quality import matrix_quality, with_given
from annatac_scale.ingest.samples import Job, Recipe
from annatac_scale.ingest.tables import read_barcodes, some
from annatac_scale.store.draft import Draft, ShardRecord
from annatac_scale.store.schema import SHARD_CELLS


@dataclass(frozen=True, eq=False)
class MatrixPlan:
    """What a matrix holds: its peaks, its cells, and the file's row of each (-1: not there).

    given: the obs of the file for these cells; n_in_file: its cells; note: what to tell of how it is read
    bytes_to_prepare: the part of the file's bytes that stands, in what is told of progress, for putting it in order
    """

    peaks: PeakSet
    barcodes: pd.Index
    rows: NDArray[np.int64]
    given: pd.DataFrame
    n_in_file: int
    note: str
    bytes_to_prepare: int


def plan_matrix(job: Job, recipe: Recipe) -> MatrixPlan:
    """Look at a matrix, and make it readable by rows where it is not stored so."""
    matrix = _open(job, recipe)
    try:
        peaks = PeakSet.of_intervals(matrix.intervals, recipe.assembly, recipe.space, job.sample.path)
        barcodes, rows = _rows_of_cells(job, recipe, matrix)
        given = matrix.obs.reindex(barcodes)
        return MatrixPlan(
            peaks, barcodes, rows, given, len(matrix), matrix.note, _prepare(job, recipe, matrix, rows)
        )
    finally:
        matrix.close()


def _prepare(job: Job, recipe: Recipe, matrix: PeakMatrix, rows: NDArray[np.int64]) -> int:
    """Put a matrix that is not stored by cells in their order; the bytes of its file that were told for that."""
    if matrix.transposition is None:
        return 0
    n_bytes, n_entries = job.n_bytes // 2, max(1, matrix.transposition.n_entries)
    done = told = 0

    def advance(n: int) -> None:
        nonlocal done, told
        done += n
        now = min(n_bytes, n_bytes * done // n_entries)
        recipe.hook.worked(job.name, now - told)
        told = now

    matrix.prepare(rows, advance)
    if done:
        recipe.hook.worked(job.name, n_bytes - told)
    else:
        recipe.hook.found(job.name, n_bytes)
    return n_bytes


def _open(job: Job, recipe: Recipe) -> PeakMatrix:
    scratch = job.scratch(recipe)
    return open_matrix(job.sample.path, job.kind, recipe.layer, recipe.use_raw, scratch)


def _rows_of_cells(job: Job, recipe: Recipe, matrix: PeakMatrix) -> tuple[pd.Index, NDArray[np.int64]]:
    """Barcodes of the cells, and the row of each in the file, -1 for a listed barcode that it does not have."""
    if job.sample.barcodes is None:
        return matrix.obs.index, np.arange(len(matrix))
    with local_copy(job.sample.barcodes) as file:
        listed = read_barcodes(file, recipe.assembly.name)
    barcodes = pd.Index(listed, dtype=object)
    rows = matrix.obs.index.get_indexer(barcodes).astype(np.int64)
    if (rows < 0).all():
        raise InputError(
            f"{job.sample.barcodes}: found barcodes such as {some(list(barcodes))} and none of {job.sample.path}; "
            f"expected barcodes such as {some(list(matrix.obs.index))}; give the list of this sample"
        )
    return barcodes, rows


def finish_matrix(job: Job, recipe: Recipe, plan: MatrixPlan, part: int, n_parts: int) -> list[ShardRecord]:
    """Write every ``n_parts``-th shard from ``part`` on, but for those that are there."""
    n_cells, records = len(plan.rows), []
    matrix = _open(job, recipe)
    try:
        for shard in range(part, -(-n_cells // SHARD_CELLS), n_parts):
            found = job.target.written(shard) if job.target.place.size(_quality_name(shard)) else None
            n_bytes = (job.n_bytes - plan.bytes_to_prepare) * len(plan.rows[_cells_of(shard)]) // n_cells
            if found is not None:
                recipe.hook.found(job.name, n_bytes)
                records.append(found)
            else:
                records.append(_write_shard(job.target, matrix, plan, shard))
                recipe.hook.worked(job.name, n_bytes)
    finally:
        matrix.close()
    return records


def _cells_of(shard: int) -> slice:
    return slice(shard * SHARD_CELLS, (shard + 1) * SHARD_CELLS)


def _quality_name(shard: int) -> str:
    """Where n_counts, n_open and n_inside of a shard's cells are: int64 [3, n_cells]."""
    return f"quality/{shard}"


def _write_shard(draft: Draft, matrix: PeakMatrix, plan: MatrixPlan, shard: int) -> ShardRecord:
    rows = plan.rows[_cells_of(shard)]
    counted = matrix.islands(rows, plan.peaks)
    quality = np.stack([counted.n_counts, counted.open.n_open.astype(np.int64), counted.n_inside])
    draft.place.write(_quality_name(shard), quality.tobytes())
    return draft.write_shard(shard, counted.open)


def commit_matrix(
    job: Job,
    recipe: Recipe,
    plan: MatrixPlan,
    labels: LabelTable | None,
    needed: bool,
    records: Sequence[Sequence[ShardRecord]],
    previous: Any,
) -> Done:
    """Commit a sample; ``previous`` is the commit of the one before it, for the order."""
    shards = [record for part in records for record in part]
    if not sum(record.n_open for record in shards):
        raise no_count(job, recipe)
    found = [np.frombuffer(job.target.place.read(_quality_name(i)), np.int64) for i in range(len(shards))]
    n_counts, n_open, n_inside = np.concatenate([part.reshape(3, -1) for part in found], axis=1)
    said = Said()
    absent = int((plan.rows < 0).sum())
    not_listed = plan.n_in_file - (len(plan.rows) - absent)
    peaks = plan.peaks.accounting()
    if plan.note:
        said.say(f"{job.name}: {plan.note}")
    said.say(f"{job.name}: {len(plan.rows):,} cells")
    tell_peaks(peaks, lambda line: said.say(f"{job.name}: {line}"))
    if job.sample.barcodes is not None:
        said.say(
            f"{job.name}: {not_listed:,} cells are not listed and left out; {absent:,} listed barcodes are not in the "
            "file: their rows are all closed"
        )
    obs = with_given(matrix_quality(plan.barcodes, n_counts, n_open, n_inside), plan.given)
    labelled = labels is not None and bool(obs.index.isin(labels.barcode).any())
    obs = with_labels(obs, job, labels, needed, said)
    conversion = conversion_record(job, recipe, {}) | {
        "peaks": peaks,
        "cells": {"cells": len(plan.rows), "not_listed": not_listed, "not_in_file": absent},
    }
    job.target.commit(shards, obs, plan.peaks.measured, conversion)
    job.scratch(recipe).remove("")
    return Done(job.name, conversion, said.lines, labelled)
