"""What a conversion would do: what is there already, what is to be done, what it costs, and what is wrong."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from annatac_scale.errors import AnnatacError, InputError, StoreError
from annatac_scale.ingest.bgzf import BrokenTextError
from annatac_scale.ingest.estimate import check_disks, estimate, read_head, shown_bytes
from annatac_scale.ingest.fragment_tasks import FragmentPeaks, counting_of, fragment_peaks
from annatac_scale.ingest.fragments import check_lines
from annatac_scale.ingest.local_copy import local_copy
from annatac_scale.ingest.provenance import difference
from annatac_scale.ingest.samples import (
    FRAGMENTS,
    Job,
    Recipe,
    files_of,
    job_of,
    options_of,
    with_strands,
)
from annatac_scale.ingest.sheet import SampleInput
from annatac_scale.ingest.tables import read_barcodes, some
from annatac_scale.store.draft import PLAN
from annatac_scale.store.files import INCOMING
from annatac_scale.store.metadata import committed_samples, read_root, root_attributes
from annatac_scale.store.place import Location, place_of
from annatac_scale.store.store import IslandStore

_MEMORY_OF_PROCESS = 300 << 20
_MEMORY_OF_WORKER = 150 << 20


@dataclass(frozen=True)
class SamplePlan:
    """What would be done with a sample.

    state: "convert", "go on" (an earlier run left work that is used), "skip" (it is in the store) or "refused"
    kind: of the input; form: of a fragment file's compression; size: bytes; ranges: of a fragment file
    lines: about how many; scratch_bytes, store_bytes: at most how much disk
    problems: what is wrong; notes: what to know
    """

    name: str
    path: str
    state: str
    kind: str = ""
    form: str = ""
    size: int = 0
    ranges: int = 0
    lines: int = 0
    scratch_bytes: int = 0
    store_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion would do. memory_bytes: of the process with all its workers, about."""

    store: str
    assembly: str
    islands: int
    workers: int
    memory_bytes: int
    samples: list[SamplePlan]
    problems: list[str]

    @property
    def is_sound(self) -> bool:
        """Whether nothing wrong was found."""
        return not self.problems and not any(sample.problems for sample in self.samples)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return asdict(self)

    def text(self) -> str:
        """All of it for people."""
        rows = [["sample", "state", "kind", "size", "ranges", "lines", "scratch", "store"]]
        rows += [_row(sample) for sample in self.samples]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        todo = [sample for sample in self.samples if sample.state in ("convert", "go on")]
        n_lines, stored = sum(sample.lines for sample in todo), sum(sample.store_bytes for sample in todo)
        lines.append("")
        lines.append(
            f"{len(todo):,} of {len(self.samples):,} samples to convert into {self.store}: about {n_lines:,} lines "
            f"over {self.islands:,} islands of {self.assembly}"
        )
        lines.append(
            f"disk: at most {shown_bytes(stored)} for the store and, on the way, "
            f"{shown_bytes(_on_the_way(todo, self.workers))}; memory: about {shown_bytes(self.memory_bytes)} for "
            f"{self.workers} workers, and 1 kB a barcode of a file"
        )
        for sample in self.samples:
            lines += [f"{sample.name}: {note}" for note in sample.notes]
        lines += [f"problem: {problem}" for problem in self.problems]
        lines += [f"problem: {problem}" for sample in self.samples for problem in sample.problems]
        return "\n".join(lines)


def _row(sample: SamplePlan) -> list[str]:
    return [
        sample.name,
        sample.state,
        f"{sample.kind} ({sample.form})" if sample.form else sample.kind,
        shown_bytes(sample.size),
        f"{sample.ranges:,}" if sample.ranges else "-",
        f"{sample.lines:,}" if sample.lines else "-",
        shown_bytes(sample.scratch_bytes),
        shown_bytes(sample.store_bytes),
    ]


def _on_the_way(samples: list[SamplePlan], workers: int) -> int:
    return sum(sorted((sample.scratch_bytes for sample in samples), reverse=True)[: workers + 1])


def plan_conversion(samples: list[SampleInput], recipe: Recipe) -> ConversionPlan:
    """Look at the inputs of a conversion, at the store, and at the beginning of each fragment file; write nothing."""
    jobs: dict[str, Job] = {}
    problem_of: dict[str, str] = {}
    for sample in samples:
        try:
            jobs[sample.name] = job_of(sample, recipe)
        except AnnatacError as error:
            problem_of[sample.name] = str(error)
    jobs = with_strands(jobs, recipe.workers)
    planner = _Planner(recipe)
    plans = [
        planner.plan(jobs[sample.name])
        if sample.name in jobs
        else SamplePlan(sample.name, str(sample.path), "refused", problems=[problem_of[sample.name]])
        for sample in samples
    ]
    return ConversionPlan(
        str(recipe.store),
        recipe.assembly.name,
        len(recipe.space),
        recipe.workers,
        _MEMORY_OF_PROCESS + recipe.workers * _MEMORY_OF_WORKER,
        plans,
        planner.problems(),
    )


class _Planner:
    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.peaks_of: Callable[[Location | None], FragmentPeaks] = cache(
            lambda path: fragment_peaks(recipe, path)
        )
        self.jobs: list[Job] = []
        self.store_problem = _problem(lambda: _check_store(recipe))
        is_there = not self.store_problem and place_of(recipe.store).size("zarr.json") is not None
        self.there = IslandStore.open(recipe.store).samples if is_there else {}

    def problems(self) -> list[str]:
        """What is wrong with the store or with the disks."""
        disks = _problem(lambda: check_disks(self.jobs, self.recipe))
        return [problem for problem in (self.store_problem, disks) if problem]

    def plan(self, job: Job) -> SamplePlan:
        """What would be done with a sample."""
        found = SamplePlan(
            job.name,
            str(job.sample.path),
            "refused",
            kind=job.kind,
            size=job.n_bytes,
            form=job.text.form if job.kind == FRAGMENTS else "",
            ranges=job.text.n_ranges if job.kind == FRAGMENTS else 0,
        )
        if job.name in self.there:
            return self._plan_known(job, found)
        problems = list(filter(None, [_problem(lambda: self._check(job))]))
        if problems:
            return replace(found, problems=problems)
        self.jobs.append(job)
        needs = estimate(job, self.recipe)
        state, notes = "convert", []
        if self._is_begun(job):
            state, notes = "go on", ["an earlier run left work that is gone on with"]
        return replace(
            found,
            state=state,
            lines=needs.lines,
            scratch_bytes=needs.scratch_bytes,
            store_bytes=needs.store_bytes,
            notes=notes,
        )

    def _is_begun(self, job: Job) -> bool:
        """Whether a stopped run of the same plan left something in the store."""
        draft = place_of(self.recipe.store).below(f"{INCOMING}/{job.name}")
        try:
            return bool(json.loads(draft.read(PLAN)) == json.loads(json.dumps(job.plan)))
        except (FileNotFoundError, ValueError):
            return False

    def _plan_known(self, job: Job, found: SamplePlan) -> SamplePlan:
        differs = difference(
            self.there[job.name].conversion,
            job.kind,
            files_of(job.sample, job.kind, self.recipe),
            options_of(job.sample, job.kind, self.recipe),
        )
        if differs:
            return replace(found, problems=[f"{job.name}: is in the store already, but {differs}"])
        return replace(found, state="skip")

    def _check(self, job: Job) -> None:
        """Raise what the beginning of a file tells that the conversion would raise later."""
        if job.kind != FRAGMENTS:
            return
        source = self.peaks_of(job.sample.peaks)
        listed = None
        if job.sample.barcodes is not None:
            with local_copy(job.sample.barcodes) as file:
                listed = read_barcodes(file, self.recipe.assembly.name)
        try:
            lines = read_head(job.text).lines
        except BrokenTextError as error:
            raise InputError(
                f"{job.text.location}: found {error}; expected a whole file; copy it again"
            ) from error
        check_lines(job.text, b"".join(lines), counting_of(self.recipe, source, None))
        self._check_names(job, lines, listed)

    def _check_names(self, job: Job, lines: list[bytes], listed: tuple[str, ...] | None) -> None:
        fields = [line.rstrip(b"\r\n").split(b"\t") for line in lines if not line.startswith(b"#")]
        fragments = [row for row in fields if len(row) > 3]
        contigs = {row[0].decode(errors="replace") for row in fragments}
        known = {contig for contig in contigs if self.recipe.assembly.code(contig) is not None}
        if contigs and not known:
            raise InputError(
                f"{job.text.location}: found fragments on {some(sorted(contigs))} and none on a chromosome of "
                f"{self.recipe.assembly.name}, in its first {len(lines):,} lines; check the assembly"
            )
        barcodes = {row[3].decode(errors="replace") for row in fragments}
        if listed is not None and barcodes and barcodes.isdisjoint(listed):
            raise InputError(
                f"{job.text.location}: found barcodes such as {some(sorted(barcodes))}, and none of the "
                f"{len(listed):,} listed ones, such as {some(list(listed[:3]))}, in its first {len(lines):,} lines; "
                "give the list of this sample"
            )


def _check_store(recipe: Recipe) -> None:
    """Raise StoreError where the store cannot take these samples."""
    if place_of(recipe.store).size("zarr.json") is None or not committed_samples(recipe.store):
        return
    found, wanted = read_root(recipe.store), root_attributes(recipe.space, recipe.counting)
    for key in ("assembly", "width_bp", "islands_sha256", "counting"):
        if found[key] != wanted[key]:
            raise StoreError(
                f"{recipe.store}: holds {key} {found[key]!r}, but {wanted[key]!r} was asked for; use the store's own, "
                "or another --out"
            )


def _problem(check: Callable[[], Any]) -> str:
    """What a check complains of, "" for nothing."""
    try:
        check()
    except AnnatacError as error:
        return str(error)
    return ""
