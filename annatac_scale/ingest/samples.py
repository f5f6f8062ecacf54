"""What is to be done for each sample: what its files are, which options go with them, and how the work is divided."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest.h5ad import open_hdf5
from annatac_scale.ingest.hook import Hook
from annatac_scale.ingest.local_copy import local_copy
from annatac_scale.ingest.provenance import stamps
from annatac_scale.ingest.sheet import SampleInput
from annatac_scale.ingest.tables import read_barcodes
from annatac_scale.ingest.tenx import is_10x_folder, mtx_files
from annatac_scale.ingest.text import TextFile, look_at
from annatac_scale.store.draft import Draft
from annatac_scale.store.place import Location, Place, blob_of, is_url, place_of

FRAGMENTS, H5AD, TENX_H5, TENX_MTX = "fragments", "h5ad", "10x h5", "10x mtx"

INSERTION = "insertion"
MIN_FRAGMENTS = 1000

_BESIDES = ("peaks", "barcodes", "tss")
"""Roles of files that go with the data."""

_HDF5 = b"\x89HDF\r\n\x1a\n"
_HDF5_NAMES = (".h5ad", ".h5", ".hdf5")
_MOST_STRANDS = 3
"""Threads that one stream can feed: it is decompressed about three times as fast as a thread counts."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """What all samples of a conversion share; may be pickled.

    counting: "insertion", "fragment" or "paired-insertion"; quality: whether QC is made
    tss: a placed table of TSS for it, None where the assembly has none; tss_file: where the user gave it
    min_fragments, min_tsse: what makes a barcode a cell; count_invalid: whether invalid lines are passed over
    layer, use_raw: where an h5ad has its counts
    scratch: folder for what is put down on the way, None: in the store
    range_bytes: size of the ranges that files are cut into; workers: tasks at the same time
    """

    store: Location
    assembly: Assembly
    space: IslandSpace
    counting: str
    quality: bool
    tss: pd.DataFrame | None
    tss_file: Location | None
    min_fragments: int
    min_tsse: float
    count_invalid: bool
    layer: str | None
    use_raw: bool
    scratch: Location | None
    range_bytes: int
    workers: int
    hook: Hook


@dataclass(frozen=True)
class Job:
    """The work of one sample; may be pickled.

    file, n_strands: of fragments, how the file is read; plan: what decides what is put down on the way
    draft: the sample being written; there once the store is
    """

    sample: SampleInput
    kind: str
    n_bytes: int
    plan: Mapping[str, Any]
    file: TextFile | None = None
    n_strands: int = 0
    draft: Draft | None = None

    @property
    def name(self) -> str:
        """The sample's name."""
        return self.sample.name

    def begun(self, draft: Draft) -> "Job":
        """The same job, its draft opened."""
        return replace(self, draft=draft)

    @property
    def text(self) -> TextFile:
        """The fragment file."""
        if self.file is None:
            raise TypeError(f"{self.name} is no fragment file")
        return self.file

    @property
    def target(self) -> Draft:
        """The draft that the sample is written to."""
        if self.draft is None:
            raise TypeError(f"{self.name} is not begun")
        return self.draft

    def scratch(self, recipe: Recipe) -> Place:
        """Where to put down what a stopped run finds again: never what another plan did.

        Not even then, when a worker of a cluster still works by the other plan.
        """
        plan = json.dumps(self.plan, sort_keys=True)
        if recipe.scratch is None:
            return self.target.place.below(_sha256(plan)[:16])
        store = recipe.store if is_url(recipe.store) else Path(recipe.store).absolute()
        # One store's samples never meet another's.
        key = _sha256(f"{store}\n{plan}")[:16]
        return place_of(recipe.scratch).below(f"annatac-{self.name}-{key}")


def jobs_of(samples: Sequence[SampleInput], recipe: Recipe) -> dict[str, Job]:
    """The jobs of samples by their names. Raises InputError as ``job_of``."""
    return with_strands({sample.name: job_of(sample, recipe) for sample in samples}, recipe.workers)


def with_strands(jobs: Mapping[str, Job], workers: int) -> dict[str, Job]:
    """The same jobs; the files that can only be read from their beginning share the workers as strands."""
    streams = [name for name, job in jobs.items() if job.file is not None and job.file.is_stream]
    n_strands = min(_MOST_STRANDS, workers // max(1, len(streams)))
    divided = {
        name: replace(jobs[name], n_strands=n_strands, plan={**jobs[name].plan, "strands": n_strands})
        for name in streams
    }
    return {**jobs, **divided}


def job_of(sample: SampleInput, recipe: Recipe) -> Job:
    """The job of a sample. Raises InputError for files that cannot be read and options that do not go with them."""
    kind = kind_of(sample.path)
    check_options(sample, kind, recipe)
    entries = stamps(files_of(sample, kind, recipe))
    n_bytes = sum(entry["size"] for entry in entries if entry["role"] not in _BESIDES)
    if kind != FRAGMENTS:
        return Job(
            sample, kind, n_bytes, {"kind": kind, "inputs": entries, **options_of(sample, kind, recipe)}
        )
    file = look_at(sample.path, recipe.range_bytes)
    plan = {
        "kind": kind,
        "inputs": entries,
        "spill": 1,
        "assembly": [
            recipe.assembly.name,
            _sha256(repr((recipe.assembly.chromosomes, recipe.assembly.sizes))),
        ],
        "islands_sha256": recipe.space.sha256,
        "counting": recipe.counting,
        "quality": recipe.quality,
        "range_bytes": recipe.range_bytes,
    }
    return Job(sample, kind, n_bytes, plan, file)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def kind_of(location: Location) -> str:
    """What an input is, told by its content. Raises InputError for a folder or HDF5 file of no known layout."""
    if _is_folder(location):
        if is_10x_folder(location):
            return TENX_MTX
        raise InputError(
            f"{location}: found a folder without matrix.mtx or matrix.mtx.gz; expected a 10x mtx folder, or "
            "a file; give the folder that holds the matrix"
        )
    is_hdf5 = blob_of(location).read(0, len(_HDF5)) == _HDF5
    if not is_hdf5 and not str(location).lower().endswith(_HDF5_NAMES):
        return FRAGMENTS
    with open_hdf5(location) as file:
        if "matrix" in file:
            return TENX_H5
        if "obs" in file and "var" in file:
            return H5AD
    raise InputError(
        f"{location}: found an HDF5 file without obs and var and without matrix; expected h5ad or 10x h5; "
        "give one of these"
    )


def _is_folder(location: Location) -> bool:
    """Whether a location is a folder on disk, or a prefix in object storage that holds a 10x matrix."""
    if not is_url(location):
        return Path(location).is_dir()
    folder, _, name = str(location).rstrip("/").rpartition("/")
    return place_of(folder).size(name) is None and is_10x_folder(location)


def files_of(sample: SampleInput, kind: str, recipe: Recipe) -> dict[str, Location]:
    """The files that decide a sample's X and quality, by role."""
    files: dict[str, Location] = {"data": sample.path}
    if kind == TENX_MTX:
        files = dict(mtx_files(sample.path))
    tss = recipe.tss_file if kind == FRAGMENTS and recipe.quality else None
    named = {"peaks": sample.peaks, "barcodes": sample.barcodes, "tss": tss}
    return files | {role: path for role, path in named.items() if path is not None}


def options_of(sample: SampleInput, kind: str, recipe: Recipe) -> dict[str, Any]:
    """The options that decide a sample's X and obs, beside its files and the store's own."""
    if kind == H5AD:
        return {"layer": recipe.layer, "use_raw": recipe.use_raw}
    if kind == FRAGMENTS:
        called = {"min_fragments": recipe.min_fragments, "min_tsse": recipe.min_tsse}
        return {"qc": recipe.quality} | (called if sample.barcodes is None else {})
    return {}


def check_options(sample: SampleInput, kind: str, recipe: Recipe) -> None:
    """Raise InputError for options that do not go with a sample's kind, and for a list of barcodes that is none."""
    if kind != FRAGMENTS and sample.peaks is not None:
        raise InputError(
            f"{sample.path}: found a peak file for {kind}, which has peaks of its own; expected one for "
            "fragments only; leave out --peaks"
        )
    if kind != H5AD and (recipe.layer is not None or recipe.use_raw):
        raise InputError(
            f"{sample.path}: found --layer or --use-raw for {kind}; expected an h5ad; leave them out"
        )
    if kind != FRAGMENTS and recipe.counting != INSERTION:
        raise InputError(
            f"{sample.path}: found --counting {recipe.counting} for {kind}, which is counted already; expected it for "
            "fragments only; leave it out, and convert fragments counted so into another --out"
        )
    if kind == FRAGMENTS and sample.barcodes is None and recipe.min_tsse > 0 and not recipe.quality:
        raise InputError(
            f"{sample.path}: found --min-tsse together with --no-qc; expected QC, which makes the TSS enrichment; "
            "leave one out"
        )
    if kind == FRAGMENTS and sample.barcodes is None and recipe.min_tsse > 0 and recipe.tss is None:
        raise InputError(
            f"{sample.path}: found --min-tsse for assembly {recipe.assembly.name}, of which no TSS is known; expected "
            "a table of them; give --tss or --gtf"
        )
    if sample.barcodes is not None:
        _check_barcodes(sample.barcodes, recipe.assembly.name, blob_of(sample.barcodes).stamp)


@lru_cache(maxsize=16)
def _check_barcodes(location: Location, assembly: str, stamp: int | str) -> None:
    """Read a list once, which hundreds of samples may share; ``stamp`` tells one that was changed."""
    with local_copy(location) as file:
        read_barcodes(file, assembly)


def ignored_options(sample: SampleInput, kind: str, recipe: Recipe) -> list[str]:
    """Lines that tell which options that were given do not apply to a sample."""
    given = [
        name
        for name, is_given in (
            ("--min-fragments", recipe.min_fragments != MIN_FRAGMENTS),
            ("--min-tsse", recipe.min_tsse > 0),
        )
        if is_given
    ]
    if not given or (kind == FRAGMENTS and sample.barcodes is None):
        return []
    why = "a peak matrix" if kind != FRAGMENTS else "--barcodes lists the cells"
    return [f"{sample.name}: {why}: {' and '.join(given)} {'do' if len(given) > 1 else 'does'} not apply"]
