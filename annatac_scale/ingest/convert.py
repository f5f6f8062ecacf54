"""Conversion: any number of inputs into an island store, as a Dask graph of small steps.

A graph of matrices has one task a shard of 4,000 cells, one of fragments one task a file. Samples are committed in the
order of the inputs, each as soon as it and those before it are done.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
from dask.base import compute
from dask.delayed import Delayed, delayed

from annatac_scale.errors import InputError, StoreError
from annatac_scale.genome.annotation import read_gtf, read_tss
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import select_islands
from annatac_scale.genome.rows import Path as AnyPath
from annatac_scale.ingest.labels import join_labels, read_labels
from annatac_scale.ingest.provenance import difference, now
from annatac_scale.ingest.samples import (
    FRAGMENTS,
    Target,
    Written,
    begin_matrix,
    bytes_of,
    check_options,
    files_of,
    finish_matrix,
    fragment_peaks,
    ignored_options,
    kind_of,
    n_cells_of_matrix,
    options_of,
    write_fragments,
    write_rows,
)
from annatac_scale.ingest.sheet import SampleInput, check_samples, name_inputs, read_sheet
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.metadata import read_root
from annatac_scale.store.schema import COUNTINGS, SHARD_CELLS
from annatac_scale.store.store import IslandStore, remove_empty
from annatac_scale.store.writer import create_store, replace_obs


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion.

    select: islands, "tss" (bins that hold a TSS), "all" (all bins) or the path of a BED file of windows
    counting: "insertion", "fragment" or "paired-insertion" (fragments.CountingRules says what they are)
    min_fragments: of fragment files without a list of barcodes, how many make a barcode a cell; others ignore it
    layer, use_raw: where an h5ad has its counts, if not in X
    workers: threads that work at the same time
    sample: names of the inputs, in their order; none: after the files
    peaks, barcodes, obs: files as in SampleInput, for every input that the sheet gives none for
    chrom_sizes, tss, gtf: files that describe an assembly which is not built in, or other TSS for one that is
    """

    select: str = "tss"
    counting: str = "insertion"
    min_fragments: int = 1000
    layer: str | None = None
    use_raw: bool = False
    workers: int = 1
    sample: Sequence[str] = ()
    peaks: AnyPath | None = None
    barcodes: AnyPath | None = None
    obs: AnyPath | None = None
    chrom_sizes: AnyPath | None = None
    tss: AnyPath | None = None
    gtf: AnyPath | None = None

    def __post_init__(self) -> None:
        if self.counting not in COUNTINGS:
            raise InputError(f"counting: found {self.counting!r}; expected one of {', '.join(COUNTINGS)}")
        if self.workers < 1 or self.min_fragments < 0:
            raise InputError(
                f"found workers {self.workers}, min_fragments {self.min_fragments}; expected at least 1 "
                "worker and 0 fragments"
            )
        if self.tss is not None and self.gtf is not None:
            raise InputError("found both a TSS table and a GTF file; expected one; leave out --tss or --gtf")


@dataclass
class ConvertReport:
    """What a conversion did.

    store: its path; converted: names of the samples written, with the record of their conversion; skipped: names of
    those that were there already; relabelled: those of them whose obs was joined anew
    """

    store: Path
    converted: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)


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
    labels (``obs``), which are joined anew. A new store that gets no sample is removed again. Raises InputError for
    whatever is wrong with the inputs, and StoreError where the store has other islands, another counting or a sample of
    that name made otherwise, or would lie in another store.
    """
    chosen = ConvertOptions(**options)
    _check_place(Path(out))
    progress = progress or Silent()
    samples = _samples(inputs, sheet, chosen)
    check_samples(samples)
    genome = _assembly(assembly, chosen)
    table = read_tss(chosen.tss) if chosen.tss else read_gtf(chosen.gtf) if chosen.gtf else None
    space = select_islands(genome, chosen.select, table, progress)
    with ExitStack() as open_things:
        target = Target(
            Path(out),
            genome,
            space,
            chosen.counting,
            chosen.min_fragments,
            chosen.layer,
            chosen.use_raw,
            progress,
            open_things,
            lru_cache(4)(partial(fragment_peaks, assembly=genome, space=space)),
        )
        return _Conversion(samples, target, chosen.workers).run()


def _check_place(out: Path) -> None:
    """Raise StoreError where a folder above ``out`` is an island store."""
    for folder in out.resolve().parents:
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
    found = name_inputs(paths, options.sample) if sheet is None else read_sheet(sheet)
    return [
        replace(
            sample,
            peaks=sample.peaks or _path(options.peaks),
            barcodes=sample.barcodes or _path(options.barcodes),
            obs=sample.obs or _path(options.obs),
        )
        for sample in found
    ]


def _path(path: AnyPath | None) -> Path | None:
    return None if path is None else Path(path)


def _assembly(assembly: str | Assembly, options: ConvertOptions) -> Assembly:
    if isinstance(assembly, Assembly):
        return assembly
    if options.chrom_sizes is not None:
        return Assembly.from_chrom_sizes(options.chrom_sizes, assembly)
    return Assembly.builtin(assembly)


class _Conversion:
    """One run: which samples are to be done, the graph that does them, and the report."""

    def __init__(self, samples: list[SampleInput], target: Target, workers: int) -> None:
        self.samples = samples
        self.target = target
        self.workers = workers
        self.report = ConvertReport(target.store)
        self.kinds = {sample.name: kind_of(sample.path) for sample in samples}
        for sample in samples:
            check_options(sample, self.kinds[sample.name], target)
        for sample in samples:
            for line in ignored_options(sample, self.kinds[sample.name], target):
                target.progress.say(line)
        paths = dict.fromkeys(sample.obs for sample in samples if sample.obs is not None)
        self.labels = {path: read_labels(path) for path in paths}
        self.matched: set[Path] = set()

    def run(self) -> ConvertReport:
        """Convert what is not there yet."""
        is_new = not (self.target.store / "zarr.json").exists()
        if not is_new:
            create_store(self.target.store, self.target.space, self.target.counting)
            self._look_at_store()
        todo = [sample for sample in self.samples if sample.name not in self.report.skipped]
        n_shards = {sample.name: self._n_shards(sample) for sample in todo}
        if todo:
            if is_new:  # runs after the samples that were begun are left, and where an interrupt comes early
                self.target.open_things.callback(remove_empty, self.target.store)
            create_store(self.target.store, self.target.space, self.target.counting)
            self._compute(todo, n_shards)
        self._check_labels()
        return self.report

    def _check_labels(self) -> None:
        """Raise InputError for a table of labels that fits no cell of any sample."""
        for path in self.labels.keys() - self.matched:
            raise InputError(
                f"{path}: found {self.labels[path].described()}, none of a cell of {self.target.store}; expected "
                "barcodes as there; the cells are converted: mend the table and run the same command again"
            )

    def _look_at_store(self) -> None:
        """Skip samples that were converted before, and join their labels anew."""
        there = IslandStore.open(self.target.store).samples
        for sample in self.samples:
            if sample.name not in there:
                continue
            kind = self.kinds[sample.name]
            differs = difference(
                there[sample.name].conversion,
                kind,
                files_of(sample, kind),
                options_of(sample, kind, self.target),
            )
            if differs:
                raise StoreError(
                    f"{self.target.store}: sample {sample.name!r} is there already, but {differs}; "
                    "choose another --sample or another --out"
                )
            self.report.skipped.append(sample.name)
            self.target.progress.say(f"{sample.name}: is in {self.target.store} already, from the same files")
        for name in self.report.skipped:
            sample = next(sample for sample in self.samples if sample.name == name)
            if sample.obs is not None or sample.columns:
                replace_obs(self.target.store, name, self._labelled(there[name].obs(), sample))
                self.report.relabelled.append(name)

    def _n_shards(self, sample: SampleInput) -> int:
        kind = self.kinds[sample.name]
        return 0 if kind == FRAGMENTS else -(-n_cells_of_matrix(sample, kind) // SHARD_CELLS)

    def _compute(self, todo: list[SampleInput], n_shards: dict[str, int]) -> None:
        """Let Dask's threads work through the graph; whatever goes wrong stops all of them."""
        n_bytes = sum(bytes_of(sample, self.kinds[sample.name]) for sample in todo)
        with (
            self.target.progress.task("convert", n_bytes, "B") as advance,
            ThreadPoolExecutor(self.workers) as pool,
        ):
            target = replace(self.target, advance=advance)
            last = None
            for sample in todo:
                last = _task(self._commit, sample, self._written(sample, n_shards[sample.name], target), last)
            try:
                compute(last, scheduler="threads", pool=pool)
            except BaseException:
                target.stopping.set()
                raise

    def _written(self, sample: SampleInput, n_shards: int, target: Target) -> Delayed:
        """The part of the graph that writes a sample's shards."""
        kind = self.kinds[sample.name]
        if kind == FRAGMENTS:
            return _task(partial(write_fragments, sample, target))
        opened = _task(partial(begin_matrix, sample, kind, target))
        quality = [
            _task(partial(write_rows, shard=shard, target=target), opened) for shard in range(n_shards)
        ]
        return _task(partial(finish_matrix, target=target), opened, quality)

    def _commit(self, sample: SampleInput, written: Written, previous: None) -> None:
        """Commit a sample; ``previous`` is the commit of the one before it, for the order."""
        obs = self._labelled(written.obs, sample)
        conversion = written.conversion | {"finished": now()}
        written.begun.writer.commit(obs, written.measured, conversion)
        self.target.end(written.begun)
        self.report.converted[sample.name] = conversion

    def _labelled(self, obs: pd.DataFrame, sample: SampleInput) -> pd.DataFrame:
        """``obs`` with the sheet's columns and the labels of a sample."""
        obs = obs.assign(**dict(sample.columns))
        if sample.obs is None:
            return obs
        labels = self.labels[sample.obs]
        if obs.index.isin(labels.barcode).any():
            self.matched.add(sample.obs)
        # A table without samples may be meant for some of them only.
        needed = labels.sample is not None or len(self.samples) == 1
        return join_labels(obs, labels, sample.name, self.target.progress, needed)


def _task(function: Callable[..., Any], *arguments: Any) -> Delayed:
    # pure=False: names tasks by number, where hashing their arguments would cost more than some of the tasks.
    return delayed(function, pure=False)(*arguments)
