"""Conversion: any number of inputs into an island store, as a Dask graph of small tasks.

A fragment file has a task a range, then one that chooses its cells, some that finish its shards, and its commit; a
matrix has no ranges. Samples are committed in the order of the inputs, each as soon as it and those before it are done.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from annatac_scale.errors import InputError, NoRoomError, StoreError
from annatac_scale.genome.annotation import builtin_tss, place_tss, read_gtf, read_tss
from annatac_scale.genome.assembly import BUILTIN_ASSEMBLIES, Assembly
from annatac_scale.genome.islands import select_islands
from annatac_scale.genome.rows import Path as AnyPath
from annatac_scale.ingest.dry_run import ConversionPlan, plan_conversion
from annatac_scale.ingest.estimate import check_disks, still_needed
from annatac_scale.ingest.fragment_tasks import Done, Said, with_labels
from annatac_scale.ingest.graph import SAMPLES_ON_CLUSTER, Graph, run_graph
from annatac_scale.ingest.hook import Hook
from annatac_scale.ingest.labels import LabelTable, read_labels
from annatac_scale.ingest.local_copy import local_copy
from annatac_scale.ingest.provenance import difference
from annatac_scale.ingest.samples import (
    INSERTION,
    MIN_FRAGMENTS,
    Job,
    Recipe,
    files_of,
    ignored_options,
    jobs_of,
    options_of,
)
from annatac_scale.ingest.sheet import SampleInput, check_samples, located, name_inputs, read_sheet
from annatac_scale.ingest.text import RANGE_BYTES
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.create import remove_empty
from annatac_scale.store.draft import Draft, open_draft
from annatac_scale.store.metadata import committed_samples, read_root
from annatac_scale.store.place import Location, is_url, place_of
from annatac_scale.store.schema import COUNTINGS
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import create_store, replace_obs


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion.

    select: islands, "tss" (bins that hold a TSS), "all" (all bins) or the path of a BED file of windows
    counting: "insertion", "fragment" or "paired-insertion" (fragments.Counting says what they are)
    min_fragments, min_tsse: of fragment files without a list of barcodes, how many fragments and which TSS enrichment
    make a barcode a cell; others ignore them
    qc: whether the quality of cells is made from fragments; it takes about 1.2 times as long
    on_invalid: "stop" at an invalid line of a fragment file, or "count" such lines and go on
    layer, use_raw: where an h5ad has its counts, if not in X
    workers: threads that work at the same time; dask: address of a Dask scheduler, whose workers work in their place
    scratch: folder for what is put down on the way, in place of the store
    sample: names of the inputs, in their order; none: after the files
    peaks, barcodes, obs: files as in SampleInput, for every input that the sheet gives none for
    chrom_sizes, tss, gtf: files that describe an assembly which is not built in, or other TSS for one that is
    range_bytes: size of the ranges that fragment files are cut into: a stopped run loses at most one a worker
    """

    select: str = "tss"
    counting: str = INSERTION
    min_fragments: int = MIN_FRAGMENTS
    min_tsse: float = 0.0
    qc: bool = True
    on_invalid: str = "stop"
    layer: str | None = None
    use_raw: bool = False
    workers: int = 1
    dask: str | None = None
    scratch: Location | None = None
    sample: Sequence[str] = ()
    peaks: AnyPath | None = None
    barcodes: AnyPath | None = None
    obs: AnyPath | None = None
    chrom_sizes: AnyPath | None = None
    tss: AnyPath | None = None
    gtf: AnyPath | None = None
    range_bytes: int = RANGE_BYTES

    def __post_init__(self) -> None:
        for name, found, expected in (
            ("counting", self.counting, COUNTINGS),
            ("on_invalid", self.on_invalid, ("stop", "count")),
        ):
            if found not in expected:
                raise InputError(f"{name}: found {found!r}; expected one of {', '.join(expected)}")
        if self.workers < 1 or self.min_fragments < 0 or self.min_tsse < 0 or self.range_bytes < 1:
            raise InputError(
                f"found workers {self.workers}, min_fragments {self.min_fragments}, min_tsse {self.min_tsse}; expected "
                "at least 1 worker, 0 fragments and a TSS enrichment of 0"
            )
        if self.tss is not None and self.gtf is not None:
            raise InputError("found both a TSS table and a GTF file; expected one; leave out --tss or --gtf")


@dataclass
class ConvertReport:
    """What a conversion did.

    store: its path; converted: names of the samples written, with the record of their conversion; skipped: names of
    those that were there already; relabelled: those of them whose obs was joined anew
    """

    store: Location
    converted: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)

    is_sound = True
    """As in ConversionPlan: whatever is wrong is raised."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return asdict(self) | {"store": str(self.store)}

    def text(self) -> str:
        """Which samples were converted, skipped or relabelled, and where the store is."""
        states = {"converted": self.converted, "skipped": self.skipped, "relabelled": self.relabelled}
        return "\n".join(
            [f"{state}: {', '.join(names)}" for state, names in states.items() if names] + [str(self.store)]
        )


def convert(
    inputs: AnyPath | Sequence[AnyPath] = (),
    *,
    assembly: str | Assembly,
    out: AnyPath,
    sheet: AnyPath | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ConvertReport:
    """Convert h5ad, 10x h5, 10x mtx and fragment files into the island store ``out``, each a sample.

    inputs: one path or several; sheet: in their place, a table of them (sheet.read_sheet says what it holds)
    assembly: a built-in name, any name together with ``chrom_sizes``, or an Assembly
    options: the fields of ConvertOptions by name

    An existing store gets the samples added; those that it has from the same files and options are left alone, but for
    labels (``obs``), which are joined anew. A conversion that was stopped goes on from the ranges and shards that are
    done. Raises InputError for whatever is wrong with the inputs, and StoreError where the store has other islands,
    another counting or a sample of that name made otherwise, or would lie in another store.
    """
    chosen = ConvertOptions(**options)
    progress = progress or Silent()
    samples, recipe = _begin(inputs, assembly, out, sheet, chosen, progress)
    return _Conversion(samples, recipe, chosen.dask, progress).run()


def dry_run(
    inputs: AnyPath | Sequence[AnyPath] = (),
    *,
    assembly: str | Assembly,
    out: AnyPath,
    sheet: AnyPath | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ConversionPlan:
    """What ``convert`` would do with the same arguments, what it would cost, and what is wrong; nothing is written.

    Raises as ``convert`` for what is wrong with the options, the sheet or the assembly; what is wrong with single
    inputs, the store or the disks is in the plan.
    """
    chosen = ConvertOptions(**options)
    samples, recipe = _begin(inputs, assembly, out, sheet, chosen, progress or Silent())
    return plan_conversion(samples, recipe)


def _begin(
    inputs: AnyPath | Sequence[AnyPath],
    assembly: str | Assembly,
    out: AnyPath,
    sheet: AnyPath | None,
    options: ConvertOptions,
    progress: Progress,
) -> tuple[list[SampleInput], Recipe]:
    """The samples, checked, and what they share."""
    store = located(out)
    _check_place(store)
    samples = _samples(inputs, sheet, options)
    check_samples(samples)
    return samples, _recipe(store, assembly, options, progress)


def _recipe(store: Location, assembly: str | Assembly, options: ConvertOptions, progress: Progress) -> Recipe:
    genome = _assembly(assembly, options)
    table = read_tss(options.tss) if options.tss else read_gtf(options.gtf) if options.gtf else None
    space = select_islands(genome, options.select, table, progress)
    if table is None and genome.name in BUILTIN_ASSEMBLIES:
        table = builtin_tss(genome.name)
    tss = place_tss(genome, table) if table is not None and options.qc else None
    return Recipe(
        store=store,
        assembly=genome,
        space=space,
        counting=options.counting,
        quality=options.qc,
        tss=tss,
        tss_file=_located(options.tss or options.gtf),
        min_fragments=options.min_fragments,
        min_tsse=options.min_tsse,
        count_invalid=options.on_invalid == "count",
        layer=options.layer,
        use_raw=options.use_raw,
        scratch=options.scratch,
        range_bytes=options.range_bytes,
        workers=options.workers,
        hook=Hook(),
    )


def _check_place(out: Location) -> None:
    """Raise StoreError where a folder above ``out`` is an island store."""
    if is_url(out):
        return
    for folder in Path(out).resolve().parents:
        with suppress(StoreError):
            read_root(folder)
            break
    else:
        return
    raise StoreError(
        f"{out}: lies in {folder}, which is an island store; expected a place outside of it; choose another --out, or "
        "give that store to add samples to it"
    )


def _samples(
    inputs: AnyPath | Sequence[AnyPath], sheet: AnyPath | None, options: ConvertOptions
) -> list[SampleInput]:
    paths = list(inputs) if isinstance(inputs, Sequence) and not isinstance(inputs, str) else [inputs]
    if sheet is not None and (paths or options.sample):
        raise InputError(
            f"{sheet}: found a sheet together with inputs or --sample; expected one of both; put all into the sheet"
        )
    found = name_inputs(paths, options.sample) if sheet is None else _read_sheet(located(sheet))
    return [
        replace(
            sample,
            peaks=sample.peaks or _located(options.peaks),
            barcodes=sample.barcodes or _located(options.barcodes),
            obs=sample.obs or _located(options.obs),
        )
        for sample in found
    ]


def _read_sheet(sheet: Location) -> list[SampleInput]:
    folder = str(sheet).rsplit("/", 1)[0] if is_url(sheet) else Path(sheet).parent
    with local_copy(sheet) as file:
        return read_sheet(file, folder)


def _labels(path: Location) -> LabelTable:
    with local_copy(path) as file:
        return read_labels(file)


def _located(path: AnyPath | None) -> Location | None:
    return None if path is None else located(path)


def _assembly(assembly: str | Assembly, options: ConvertOptions) -> Assembly:
    if isinstance(assembly, Assembly):
        return assembly
    if options.chrom_sizes is not None:
        return Assembly.from_chrom_sizes(options.chrom_sizes, assembly)
    return Assembly.builtin(assembly)


class _Conversion:
    """One run: which samples are to be done, the graph that does them, and the report."""

    def __init__(
        self, samples: list[SampleInput], recipe: Recipe, dask: str | None, progress: Progress
    ) -> None:
        self.samples = samples
        self.recipe = recipe
        self.dask = dask
        self.progress = progress
        self.report = ConvertReport(recipe.store)
        self.jobs = jobs_of(samples, recipe)
        for sample in samples:
            for line in ignored_options(sample, self.jobs[sample.name].kind, recipe):
                progress.say(line)
        paths = dict.fromkeys(sample.obs for sample in samples if sample.obs is not None)
        self.labels = {path: _labels(path) for path in paths}
        self.matched: set[Location] = set()

    def run(self) -> ConvertReport:
        """Convert what is not there yet."""
        store = self.recipe.store
        is_new = place_of(store).size("zarr.json") is None
        if not is_new:
            create_store(store, self.recipe.space, self.recipe.counting)
            self._look_at_store()
        todo = [self.jobs[sample.name] for sample in self.samples if sample.name not in self.report.skipped]
        if todo:
            check_disks(todo, self.recipe)
            with ExitStack() as left_behind:
                if is_new:  # runs after the drafts are left, and where an interrupt comes early
                    left_behind.callback(remove_empty, store)
                create_store(store, self.recipe.space, self.recipe.counting)
                self._convert(todo)
        self._check_labels()
        return self.report

    def _convert(self, todo: list[Job]) -> None:
        """Let Dask work through the graph; whatever goes wrong stops all of it, and what is done is kept."""
        sizes = {job.name: job.n_bytes for job in todo}
        with ExitStack() as stack:
            advance = stack.enter_context(
                self.progress.task("convert", sum(sizes.values()), "B", samples=sizes)
            )
            drafts = {job.name: stack.enter_context(self._draft(job)) for job in todo}
            recipe = replace(self.recipe, hook=Hook(advance))
            graph = Graph(recipe, SAMPLES_ON_CLUSTER if self.dask else None)
            for job in todo:
                labels = None if job.sample.obs is None else self.labels[job.sample.obs]
                graph.add(job.begun(drafts[job.name]), labels, self._needed(labels))

            def note(done: Done) -> None:
                for line in done.says:
                    self.progress.say(line)
                advance.finished(done.name)
                self.report.converted[done.name] = done.conversion
                obs = self.jobs[done.name].sample.obs
                if done.labelled and obs is not None:
                    self.matched.add(obs)

            try:
                run_graph(graph, self.dask, note, advance)
            except NoRoomError as error:
                raise NoRoomError(f"{error}; {still_needed(todo, self.recipe)}") from error

    def _draft(self, job: Job) -> "_KeptDraft":
        return _KeptDraft(self.recipe.store, job)

    def _needed(self, labels: LabelTable | None) -> bool:
        """Whether a sample has to have labels: a table without samples may be meant for some of them only."""
        return labels is not None and (labels.sample is not None or len(self.samples) == 1)

    def _check_labels(self) -> None:
        """Raise InputError for a table of labels that fits no cell of any sample."""
        for path in self.labels.keys() - self.matched:
            raise InputError(
                f"{path}: found {self.labels[path].described()}, none of a cell of {self.recipe.store}; expected "
                "barcodes as there; the cells are converted: mend the table and run the same command again"
            )

    def _look_at_store(self) -> None:
        """Skip samples that were converted before, and join their labels anew."""
        there = IslandStore.open(self.recipe.store).samples
        for sample in self.samples:
            if sample.name not in there:
                continue
            kind = self.jobs[sample.name].kind
            differs = difference(
                there[sample.name].conversion,
                kind,
                files_of(sample, kind, self.recipe),
                options_of(sample, kind, self.recipe),
            )
            if differs:
                raise StoreError(
                    f"{self.recipe.store}: sample {sample.name!r} is there already, but {differs}; "
                    "choose another --sample or another --out"
                )
            self.report.skipped.append(sample.name)
            self.progress.say(f"{sample.name}: is in {self.recipe.store} already, from the same files")
        for name in self.report.skipped:
            job = self.jobs[name]
            if self.recipe.scratch is not None:
                job.scratch(self.recipe).remove("")
            if job.sample.obs is not None or job.sample.columns:
                replace_obs(self.recipe.store, name, self._relabelled(there[name].obs(), job))
                self.report.relabelled.append(name)

    def _relabelled(self, obs: pd.DataFrame, job: Job) -> pd.DataFrame:
        labels = None if job.sample.obs is None else self.labels[job.sample.obs]
        if labels is not None and job.sample.obs is not None and obs.index.isin(labels.barcode).any():
            self.matched.add(job.sample.obs)
        said = Said()
        joined = with_labels(obs, job, labels, self._needed(labels), said)
        for line in said.lines:
            self.progress.say(line)
        return joined


class _KeptDraft:
    """Opens the draft of a job; leaving it removes one in which nothing was done that could be gone on with."""

    def __init__(self, store: Location, job: Job) -> None:
        self.store = store
        self.job = job
        self._context = open_draft(store, job.name, job.plan)

    def __enter__(self) -> Draft:
        self.draft = self._context.__enter__()
        return self.draft

    def __exit__(self, *error: Any) -> None:
        try:
            with suppress(StoreError):  # the store was removed meanwhile: the work's own error tells more
                if self.job.name not in committed_samples(self.store):
                    done = [name for name in self.draft.place.names() if "/" in name]
                    if not done:
                        self.draft.discard()
        finally:
            self._context.__exit__(*error)
