"""The labels data set: a folder of Parquet files, one a part, and the manifest that makes it whole.

    labels/
      _manifest.json           model, options, samples, classes, columns, parts; "complete" is written last
      <sample>-00000.parquet   part: the cells of 16 blocks (4,000 cells) of one sample, in their order

``pandas.read_parquet("labels/")`` reads all parts: by custom, readers of Parquet data sets pass over names that
begin with "_". A part appears whole or not at all, and carries what it was made with in its schema metadata.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from annatac_scale.annotate.confidence import ConfidenceRule
from annatac_scale.errors import InputError, ModelError
from annatac_scale.model.hierarchy import Hierarchy
from annatac_scale.store.schema import SHARD_CELLS

FORMAT = "annatac_scale.labels"
FORMAT_VERSION = "2.0"
MANIFEST = "_manifest.json"
PART_CELLS = SHARD_CELLS
"""Cells in a part: 16 blocks of one sample."""

_ASIDE = ".partial"
_MADE_WITH = b"annatac_scale"
_CLASSES = b"classes"


@dataclass(frozen=True)
class Part:
    """The cells ``unit * 4000`` and on of a sample; one that has no cells has one empty part."""

    sample: str
    unit: int
    n_cells: int

    @property
    def file(self) -> str:
        """Its file in the folder."""
        return f"{self.sample}-{self.unit:05d}.parquet"


@dataclass(frozen=True)
class SampleRecord:
    """A sample as it was when its cells were predicted; ``x_sha256`` decides whether it is the same."""

    n_cells: int
    x_sha256: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a labels data set is of.

    model: the model's digest; store: path, for information; rule: what was asked for
    split_sha256: of the split.parquet beside the model, "" where there was none
    classes: cell types in the order of ``probabilities``; columns: of the table
    parents, hierarchy_threshold: the model's hierarchy, as ``Hierarchy.to_json`` has it, and the probability that a
    lineage has at least; None where it has none
    """

    model: str
    store: str
    samples: dict[str, SampleRecord]
    rule: ConfidenceRule
    split_sha256: str
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    complete: bool = False
    parents: dict[str, list[str]] | None = None
    hierarchy_threshold: float | None = None

    @property
    def hierarchy(self) -> Hierarchy | None:
        """What lies above the classes. Raises InputError where ``parents`` say none of these classes."""
        return None if self.parents is None else Hierarchy.of(self.classes, self.parents, MANIFEST)

    @property
    def parts(self) -> list[Part]:
        """All parts of the data set, in the order of the samples."""
        return [
            Part(name, unit, min(PART_CELLS, sample.n_cells - unit * PART_CELLS))
            for name, sample in self.samples.items()
            for unit in range(max(1, -(-sample.n_cells // PART_CELLS)))
        ]

    def made_with(self, sample: str) -> dict[bytes, bytes]:
        """Schema metadata of the parts of a sample: equal if and only if they would hold the same."""
        made_with = {
            "model": self.model,
            "x_sha256": self.samples[sample].x_sha256,
            **asdict(self.rule),
            "split_sha256": self.split_sha256,
        }
        if self.hierarchy_threshold is not None:
            made_with["hierarchy_threshold"] = self.hierarchy_threshold
        return {_MADE_WITH: json.dumps(made_with).encode(), _CLASSES: json.dumps(self.classes).encode()}

    def to_dict(self) -> dict[str, Any]:
        """As it is on disk, with the parts listed."""
        parts = [{"file": part.file, **asdict(part)} for part in self.parts]
        return {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self), "parts": parts}


def read_manifest(path: Path | str) -> Manifest:
    """The manifest of the labels data set in folder ``path``. Raises InputError where there is none."""
    file = Path(path) / MANIFEST
    try:
        values = json.loads(file.read_text())
        if values["format"] != FORMAT or values["version"] != FORMAT_VERSION:
            raise InputError(
                f"{file}: found format {values['format']} {values['version']}, expected {FORMAT} "
                f"{FORMAT_VERSION}; upgrade annatac_scale or predict again"
            )
        return Manifest(
            samples={name: SampleRecord(**record) for name, record in values["samples"].items()},
            rule=ConfidenceRule(**values["rule"]),
            classes=tuple(values["classes"]),
            columns=tuple(values["columns"]),
            **{key: values[key] for key in ("model", "store", "split_sha256", "complete")},
            **{key: values.get(key) for key in ("parents", "hierarchy_threshold")},
        )
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: found no {MANIFEST}, expected a folder of labels; make one with `annatac predict`"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{file}: cannot be read ({error!r}); expected what `annatac predict` wrote; predict again into "
            "another folder"
        ) from error


class LabelsFolder:
    """A labels data set on disk: which parts are there, and what is in them."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open_complete(cls, path: Path | str) -> "LabelsFolder":
        """Open a data set for reading. Raises InputError where there is none, or parts of it are missing."""
        folder = cls(Path(path), read_manifest(path))
        parts = folder.manifest.parts
        n_missing = sum(not folder.has(part) for part in parts)
        if n_missing or not folder.manifest.complete:
            raise InputError(
                f"{path}: found {len(parts) - n_missing:,} of {len(parts):,} parts, {n_missing:,} are missing; "
                "expected a complete data set; run the same `annatac predict` again, it goes on where it stopped"
            )
        return folder

    def has(self, part: Part) -> bool:
        """Whether the part is there, whole to the footer, and made with what the manifest says."""
        try:
            metadata = pq.read_metadata(self.path / part.file)
        except (OSError, pa.ArrowException):
            return False
        found = metadata.metadata or {}
        same = all(found.get(key) == value for key, value in self.manifest.made_with(part.sample).items())
        return same and metadata.num_rows == part.n_cells

    def read(self, part: Part, columns: Sequence[str]) -> pa.Table:
        """Columns of a part. Raises InputError where its bytes do not fit their checksums."""
        file = self.path / part.file
        try:
            return pq.read_table(file, columns=list(columns), page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{file}: cannot be read ({error}); expected a whole Parquet file; delete it and run the same "
                "`annatac predict` again"
            ) from error

    def write(self, part: Part, table: pa.Table) -> None:
        """Write a part: aside, then renamed."""
        table = table.replace_schema_metadata(self.manifest.made_with(part.sample))
        aside = self._aside(part.file)
        with aside.open("wb") as out:
            pq.write_table(table, out, compression="zstd", write_page_checksum=True)
            _flush(out)
        os.replace(aside, self.path / part.file)

    def write_manifest(self, complete: bool) -> None:
        """Write the manifest aside, then rename it."""
        self.manifest = replace(self.manifest, complete=complete)
        aside = self._aside(MANIFEST)
        with aside.open("w") as out:
            json.dump(self.manifest.to_dict(), out, indent=1)
            _flush(out)
        os.replace(aside, self.path / MANIFEST)

    def _aside(self, file: str) -> Path:
        return self.path / f".{file}{_ASIDE}"


@contextmanager
def labels_writer(path: Path | str, manifest: Manifest) -> Iterator[LabelsFolder]:
    """The folder ``path`` to write the data set of a manifest to, locked against other writers.

    A new folder gets the manifest, not yet complete. One that holds parts of the same data set is gone on with,
    samples that are new to it are added. Raises InputError where it holds something else, labels of other samples or
    options, or is being written to; ModelError where it holds labels of another model.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: found a file, expected a folder for labels; choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        folder = LabelsFolder(path, manifest)
        if (path / MANIFEST).exists():
            there = read_manifest(path)
            _check_same(path, there, manifest)
            if there.complete and len(there.samples) == len(manifest.samples):
                folder.manifest = there
            else:
                folder.write_manifest(complete=False)
        else:
            _check_empty(path)
            folder.write_manifest(complete=False)
        for left in path.glob(f".*{_ASIDE}"):  # by a process that was killed
            left.unlink()
        yield folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # A lock on the folder itself: it leaves no file behind, and a killed process holds nothing.
    lock = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{path}: another process is writing labels here; wait for it, stop it or choose another --out"
            ) from error
        yield
    finally:
        os.close(lock)


def _check_empty(path: Path) -> None:
    others = sorted({file.name for file in path.iterdir()} - {f".{MANIFEST}{_ASIDE}"})
    if others:
        raise InputError(
            f"{path}: found {others[0]!r}, expected a new folder or one of labels; choose another --out"
        )


def _check_same(path: Path, there: Manifest, now: Manifest) -> None:
    """Raise unless the parts that are there belong to the data set that is asked for now."""
    if there.model != now.model:
        raise ModelError(
            f"{path}: holds labels of model {there.model[:12]}, now asked for model {now.model[:12]}; "
            "choose another --out or use that model"
        )
    options: list[tuple[str, Any, Any]] = [
        *((name, getattr(there.rule, name), value) for name, value in asdict(now.rule).items()),
        ("hierarchy_threshold", there.hierarchy_threshold, now.hierarchy_threshold),
        ("split_sha256", there.split_sha256[:12] or "none", now.split_sha256[:12] or "none"),
    ]
    for name, before, after in options:
        if before != after:
            raise InputError(
                f"{path}: holds labels made with {name} {before}, now asked for {after}; choose another --out"
            )
    _check_same_samples(path, there.samples, now.samples)


def _check_same_samples(
    path: Path, there: Mapping[str, SampleRecord], now: Mapping[str, SampleRecord]
) -> None:
    for name, record in there.items():
        if name not in now or now[name].x_sha256 != record.x_sha256:
            found = "no such sample" if name not in now else "other cells under that name"
            raise InputError(
                f"{path}: holds labels of sample {name!r}, but the store has {found}; choose another --out"
            )


def _flush(out: Any) -> None:
    out.flush()
    os.fsync(out.fileno())
