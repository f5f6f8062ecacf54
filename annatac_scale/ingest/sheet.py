"""Which files make which samples: from paths on a command line, or from a sample sheet."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import Path as AnyPath
from annatac_scale.genome.rows import shown
from annatac_scale.ingest.quality import unusable
from annatac_scale.ingest.tables import read_table, typed
from annatac_scale.store.place import Location, is_url
from annatac_scale.store.schema import SAMPLE_NAME

_SHEET_COLUMNS = ("sample", "path", "peaks", "barcodes", "obs")
_EXTENSIONS = re.compile(r"(\.(gz|bgz|zst|tsv|bed|txt|csv|h5ad|h5|hdf5|fragments))+$", re.IGNORECASE)


@dataclass(frozen=True)
class SampleInput:
    """One sample: where its data are, and what goes with them.

    path: an h5ad, 10x h5 or fragment file, or a 10x mtx folder; like the others a path or a URL
    peaks: BED file of a peak set, for fragments; barcodes: list of the cells; obs: table of labels
    columns: obs columns with one value for the whole sample
    """

    name: str
    path: Location
    peaks: Location | None = None
    barcodes: Location | None = None
    obs: Location | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def located(path: AnyPath, folder: AnyPath = ".") -> Location:
    """A path as users write it, or a URL; relative ones begin at ``folder``."""
    if isinstance(path, str) and is_url(path):
        return path
    if isinstance(folder, str) and is_url(folder) and not os.path.isabs(path):
        return f"{folder.rstrip('/')}/{path}"
    return Path(folder, path)


def default_name(path: Location) -> str:
    """The file's name without extensions, other characters than letters, digits, ``_ . -`` replaced by ``_``."""
    name = str(path).rstrip("/").rsplit("/", 1)[-1] if is_url(path) else Path(os.path.abspath(path)).name
    stem = _EXTENSIONS.sub("", name)
    return re.sub(r"[^A-Za-z0-9_.-]", "_", stem).lstrip("._-") or "sample"


def name_inputs(paths: Sequence[AnyPath], names: Sequence[str] = ()) -> list[SampleInput]:
    """Samples of paths, named in their order by ``names`` or, where there are none, after the files."""
    if names and len(names) != len(paths):
        raise InputError(
            f"--sample: found {len(names)} names for {len(paths)} inputs; expected one for each input; "
            "give all or none"
        )
    locations = [located(path) for path in paths]
    given = list(names) or [default_name(path) for path in locations]
    return [SampleInput(name, path) for name, path in zip(given, locations, strict=True)]


def read_sheet(path: AnyPath, folder: Location | None = None) -> list[SampleInput]:
    """The samples of a sheet: tab-separated, with a header.

    The columns sample, path, peaks, barcodes and obs are reserved, and path is needed; relative paths start at
    ``folder``, by default the sheet's own; an empty field is as good as none. Every other column becomes an obs column.
    """
    table = read_table(path, ("path",))
    folder = Path(path).parent if folder is None else folder
    wrong = [name for name in map(str, table) if unusable(name) and name not in _SHEET_COLUMNS]
    if wrong:
        raise InputError(
            f"{path}: found the column {shown(wrong[0])}, which is reserved or has a slash; expected other names; "
            "rename the column"
        )
    columns = {name: typed(table[name]) for name in table if name not in _SHEET_COLUMNS}
    samples = []
    for i, row in enumerate(table.to_dict("records")):
        if not row["path"]:
            raise InputError(f"{path}: found row {i + 1} without a path; expected one; fill it in")
        files = {name: located(row[name], folder) for name in ("peaks", "barcodes", "obs") if row.get(name)}
        values = {str(name): column.iloc[i] for name, column in columns.items() if pd.notna(column.iloc[i])}
        location = located(row["path"], folder)
        samples.append(
            SampleInput(row.get("sample") or default_name(location), location, columns=values, **files)
        )
    return samples


def check_samples(samples: Sequence[SampleInput]) -> None:
    """Raise InputError unless all names are usable, names and paths differ, and all files are there."""
    if not samples:
        raise InputError(
            "inputs: found none; expected at least one file or a sheet; give the paths, or --sheet FILE"
        )
    names: set[str] = set()
    paths: dict[str, str] = {}
    for sample in samples:
        if not re.fullmatch(SAMPLE_NAME, sample.name):
            raise InputError(
                f"sample {shown(sample.name)}: expected letters, digits, '_', '.' and '-', beginning "
                "with a letter or digit; choose another name with --sample or in the sheet"
            )
        if sample.name in names:
            raise InputError(
                f"sample {shown(sample.name)}: found the name twice; expected each once; name the "
                "samples with --sample or in the sheet"
            )
        for file in (sample.path, sample.peaks, sample.barcodes, sample.obs):
            if file is not None and not is_url(file) and not Path(file).exists():
                raise InputError(f"{file}: found no such file (sample {sample.name}); check the path")
        real = str(sample.path) if is_url(sample.path) else os.path.realpath(sample.path)
        if real in paths:
            raise InputError(
                f"{sample.path}: found the same file in samples {paths[real]} and {sample.name}; expected "
                "each file once; leave one out"
            )
        names.add(sample.name)
        paths[real] = sample.name
