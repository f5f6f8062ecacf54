"""The tasks that convert one fragment file: its peaks, its ranges, its cells, its shards, its commit.

Tasks are functions of what may be pickled, for they run in threads here or on other machines. What they put down is
found again by the next run; what they tell the user they return.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from annatac_scale.errors import InputError
from annatac_scale.ingest import kernel
from annatac_scale.ingest.cells import Cells, choose_cells
from annatac_scale.ingest.finish import finish_shard, n_open_name
from annatac_scale.ingest.fragments import Counting, count_range, count_stream, spill_names
from annatac_scale.ingest.key_table import KeyTable, table_of
from annatac_scale.ingest.labels import LabelTable, join_labels
from annatac_scale.ingest.local_copy import local_copy
from annatac_scale.ingest.peaks import PeakSet, read_bed
from annatac_scale.ingest.provenance import digested, now, versions
from annatac_scale.ingest.quality import fragment_quality
from annatac_scale.ingest.samples import Job, Recipe, options_of
from annatac_scale.ingest.segments import Segments, cut_genome
from annatac_scale.ingest.tables import read_barcodes, some
from annatac_scale.progress import Silent
from annatac_scale.store.draft import Draft, ShardRecord
from annatac_scale.store.place import Location
from annatac_scale.store.schema import SHARD_CELLS

_CHOSEN = "cells.json"


@dataclass(frozen=True, eq=False)
class FragmentPeaks:
    """A peak set, or the islands themselves, ready to count fragments over, and what became of its lines."""

    peaks: PeakSet
    segments: Segments
    record: dict[str, int]


@dataclass(frozen=True, eq=False)
class Done:
    """A sample that was committed: the record of its conversion, what to tell of it, and whether labels fitted it."""

    name: str
    conversion: dict[str, Any]
    says: list[str] = field(default_factory=list)
    labelled: bool = False


def fragment_peaks(recipe: Recipe, path: Location | None) -> FragmentPeaks:
    """The peaks of a BED file, or the islands where there is none."""
    tss = recipe.tss if recipe.quality else None
    if path is None:
        peaks, repeated = PeakSet.of_space(recipe.space), {}
    else:
        with local_copy(path) as file:
            intervals, n_repeated = read_bed(file)
        peaks = PeakSet.of_intervals(intervals, recipe.assembly, recipe.space, path)
        repeated = {"repeated": n_repeated}
    return FragmentPeaks(peaks, cut_genome(peaks, recipe.assembly, tss), peaks.accounting() | repeated)


def listed_barcodes(recipe: Recipe, path: Location) -> KeyTable:
    """The cells of a list, numbered by their rows."""
    with local_copy(path) as file:
        return table_of([barcode.encode() for barcode in read_barcodes(file, recipe.assembly.name)])


def counting_of(recipe: Recipe, source: FragmentPeaks, barcodes: KeyTable | None) -> Counting:
    """How the fragments of a sample are counted."""
    return Counting(
        recipe.assembly,
        source.segments,
        len(recipe.space),
        recipe.counting,
        barcodes,
        recipe.quality,
        recipe.count_invalid,
    )


def count_fragments(job: Job, number: int, recipe: Recipe, counting: Counting) -> list[dict[str, Any]]:
    """Count a range of the file, or all of it where it is a stream; returns the summaries of the spills."""

    def worked(n_bytes: int, n_lines: int) -> None:
        recipe.hook.worked(job.name, n_bytes, n_lines)

    place = job.scratch(recipe)
    if job.text.n_ranges > 1:
        summaries = [count_range(job.text, number, counting, place, worked)]
    else:
        summaries = count_stream(job.text, job.n_strands, counting, place, worked)
    if all("found" in summary for summary in summaries):
        recipe.hook.found(job.name, job.text.bytes_of_range(number))
    return summaries


def call_cells(job: Job, recipe: Recipe, counting: Counting, counted: Sequence[Any]) -> Cells:
    """Choose the cells once all ranges are ``counted``, and forget shards of an earlier choice."""
    place = job.scratch(recipe)
    options = repr((recipe.min_fragments, recipe.min_tsse, recipe.count_invalid)).encode()
    if place.size(_CHOSEN) is None or place.read(_CHOSEN) != options:
        for name in ("rows", "open", _CHOSEN):
            place.remove(name)
        forget_shards(job.target)
        place.write(_CHOSEN, options)
    names = spill_names(job.text, place)
    return choose_cells(job.text, place, names, counting, recipe.min_fragments, recipe.min_tsse)


def finish_fragments(
    job: Job, recipe: Recipe, source: FragmentPeaks, cells: Cells, part: int, n_parts: int
) -> list[ShardRecord]:
    """Write every ``n_parts``-th shard from ``part`` on."""
    if not cells.lines["counted"]:
        raise no_count(job, recipe)
    n_cells, records, place = len(cells.barcodes), [], job.scratch(recipe)
    for shard in range(part, -(-n_cells // SHARD_CELLS), n_parts):
        recipe.hook.worked(job.name, 0)
        records.append(
            finish_shard(job.target, place, spill_names(job.text, place), n_cells, shard, source.peaks.n)
        )
    return records


def no_count(job: Job, recipe: Recipe) -> InputError:
    """What to tell of a sample in which nothing at all was counted: it could only be a mistake."""
    return InputError(
        f"{job.sample.path}: found no count of any cell in the {len(recipe.space):,} islands; expected some; "
        "check the assembly, or --select all"
    )


def commit_fragments(
    job: Job,
    recipe: Recipe,
    source: FragmentPeaks,
    cells: Cells,
    labels: LabelTable | None,
    needed: bool,
    records: Sequence[Sequence[ShardRecord]],
    previous: Any,
) -> Done:
    """Commit a sample; ``previous`` is the commit of the one before it, for the order."""
    place = job.scratch(recipe)
    shards = [record for part in records for record in part]
    n_open = np.concatenate([np.frombuffer(place.read(n_open_name(i)), np.int32) for i in range(len(shards))])
    said = Said()
    _tell_fragments(job, recipe, source, cells, said)
    obs = fragment_quality(
        cells.barcodes,
        cells.quality,
        n_open.astype(np.int64),
        recipe.quality,
        job.sample.peaks is not None,
        recipe.tss is not None,
        _follows_all(job, recipe),
    )
    labelled = labels is not None and bool(obs.index.isin(labels.barcode).any())
    obs = with_labels(obs, job, labels, needed, said)
    conversion = conversion_record(job, recipe, {"data": cells.digest}) | {
        "peaks": source.record,
        "lines": cells.lines,
        "invalid": cells.invalid,
        "contigs": cells.contigs,
        "cells": {"cells": len(cells.barcodes), "without_counts": int((n_open == 0).sum())},
    }
    if cells.barcode_rank is not None:
        conversion["barcode_rank"] = cells.barcode_rank
    job.target.commit(shards, obs, source.peaks.measured, conversion)
    place.remove("")
    return Done(job.name, conversion, said.lines, labelled)


class Said(Silent):
    """Keeps what is said, for a task's result."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """Keep a line."""
        self.lines.append(line)


def forget_shards(draft: Draft) -> None:
    """Remove the shards of a draft, their records first."""
    draft.place.remove("shards")
    draft.sample.remove("X")


def with_labels(
    obs: pd.DataFrame, job: Job, labels: LabelTable | None, needed: bool, said: Said
) -> pd.DataFrame:
    """``obs`` with the sheet's columns and the labels of a sample."""
    obs = obs.assign(**dict(job.sample.columns))
    return obs if labels is None else join_labels(obs, labels, job.name, said, needed)


def conversion_record(job: Job, recipe: Recipe, digests: Mapping[str, str]) -> dict[str, Any]:
    """Where a sample came from and how it was made; ``digests`` has those of its files that are known, by role."""
    return {
        "kind": job.kind,
        "inputs": digested(job.plan["inputs"], digests, recipe.range_bytes),
        "options": options_of(job.sample, job.kind, recipe),
        "counting": recipe.counting,
        "assembly": recipe.assembly.name,
        "versions": versions(),
        "finished": now(),
    }


def _follows_all(job: Job, recipe: Recipe) -> bool:
    """Whether all fragments of a cell were followed, and not only those in islands."""
    return recipe.quality or job.sample.barcodes is None


def _tell_fragments(job: Job, recipe: Recipe, source: FragmentPeaks, cells: Cells, said: Said) -> None:
    def say(line: str) -> None:
        said.say(f"{job.name}: {line}")

    lines, contigs, assembly = cells.lines, cells.contigs, recipe.assembly
    invalid = f", {lines['invalid']:,} invalid" if lines["invalid"] else ""
    say(
        f"{len(cells.barcodes):,} cells; {lines['lines']:,} lines: {lines['counted']:,} counted, "
        f"{lines['outside_islands']:,} outside islands, {lines['not_a_cell']:,} of no cell, "
        f"{lines['other_contig']:,} on other contigs{invalid}, {lines['comment']:,} comments"
    )
    if cells.invalid:
        say(f"invalid lines: {', '.join(f'{n:,} {kind}' for kind, n in cells.invalid.items())}")
    if contigs["renamed"]:
        say(f"contigs read as the assembly's: {_pairs(contigs['renamed'])}")
    if contigs["other"]:
        say(f"{contigs['n_other']} contigs are not in {assembly.name}: {some(list(contigs['other']))}")
    if recipe.quality and recipe.tss is None:
        say(
            f"no TSS of {assembly.name} is known: no fraction_in_tss and tss_enrichment; --tss or --gtf would tell"
        )
    if job.sample.peaks is None:
        cost = (
            "" if recipe.space.selection == "tss" else "; --peaks would keep the store and the models smaller"
        )
        say(f"no peak set: each of the {len(recipe.space):,} islands counts as one peak{cost}")
    else:
        tell_peaks(source.record, say)
        chroms = np.unique(source.peaks.chrom[source.peaks.island >= 0]).tolist()
        silent = [name for name in (assembly.chromosomes[i] for i in chroms) if name not in cells.chromosomes]
        if silent:
            say(f"no fragment lies on {some(silent)}, where {job.sample.peaks} has peaks")
    n_empty = int((cells.quality[:, kernel.FRAGMENTS] == 0).sum())
    if n_empty:
        where = "" if _follows_all(job, recipe) else " in the islands"
        say(f"{n_empty:,} listed barcodes have no fragment{where}: their rows are all closed")


def _pairs(names: Mapping[str, str]) -> str:
    shown = [f"{name} as {meant}" for name, meant in names.items()]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")


def tell_peaks(record: Mapping[str, int], say: Callable[[str], None]) -> None:
    """Say what became of a peak set."""
    repeated = f", {record['repeated']:,} repeat another" if record.get("repeated") else ""
    say(
        f"{record['peaks']:,} peaks: {record['in_islands']:,} in {record['measured_islands']:,} islands, "
        f"{record['outside_islands']:,} outside islands, {record['other_contig']:,} on other contigs{repeated}"
    )
