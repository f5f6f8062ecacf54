"""The labels data set: Parquet files, one a part, and the manifest that makes them whole; on a disk or in storage.

    labels/
      _manifest.json           model, options, samples, classes, columns, parts; "complete" is written last
      <sample>-00000.parquet   part: the cells of 16 blocks (4,000 cells) of one sample, in their order
      _embeddings.zarr/        where they were asked for: <sample>, float16 [cells, width]

A complete one may have a consensus besides: CONSENSUS_COLUMNS, which are the last ones then.

``labels/*.parquet`` is the data set to any reader of Parquet; those that take the folder itself pass, by custom, over
names that begin with "_". A part appears whole or not at all, its embeddings before its rows, and carries what it was
made with in its schema metadata.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from annatac_scale.annotate.confidence import ConfidenceRule
from annatac_scale.errors import InputError
from annatac_scale.model.hierarchy import Hierarchy
from annatac_scale.store.cell_arrays import cell_array_files, chunk_file, read_cell_array
from annatac_scale.store.place import Location, joined, place_of
from annatac_scale.store.schema import SHARD_CELLS

FORMAT = "annatac_scale.labels"
FORMAT_VERSION = "3.0"
MANIFEST = "_manifest.json"
EMBEDDINGS = "_embeddings.zarr"
PART_CELLS = SHARD_CELLS
"""Cells in a part: 16 blocks of one sample."""

CONSENSUS_COLUMNS = ("cluster", "consensus", "consensus_share")
"""cluster: of the cell, null where it is in none; consensus: the label that most of the cluster's voting cells have;
consensus_share: their share, float32; the two are null where no cell votes. ``annotate.consensus`` says who does."""

_MADE_WITH = b"annatac_scale"
_CLASSES = b"classes"
_FOOTER_BYTES = 64 << 10
"""From the end of a file, in which its footer mostly is."""
_LOOKING = 16
"""Parts that are looked at side by side."""
_AHEAD = 8
"""Parts that are read ahead, in which object storage answers while others are counted."""


@dataclass(frozen=True)
class Part:
    """The cells ``unit * 4000`` and on of a sample; one that has no cells has one empty part."""

    sample: str
    unit: int
    n_cells: int

    @property
    def first(self) -> int:
        """Its first cell, counted within the sample."""
        return self.unit * PART_CELLS

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
class Written:
    """What is written of each cell besides the columns that are always there.

    probabilities: of all classes, in a column; embeddings: what the logits stand on, in a Zarr group
    projected: whether the store's islands were mapped onto the model's
    """

    probabilities: bool = False
    embeddings: bool = False
    projected: bool = False


@dataclass(frozen=True)
class Consensus:
    """How the consensus of a data set was found.

    by: "leiden", or the column of obs that names the clusters
    seed, resolution: of Leiden; None for a column
    column_sha256: of the clusters that a column names; None for Leiden, whose clusters follow from the data set
    n_clusters: that have a cell; n_voting: cells that are in a cluster and vote; n_agree: those of them whose label is
    the consensus
    """

    by: str
    seed: int | None = None
    resolution: float | None = None
    column_sha256: str | None = None
    n_clusters: int = 0
    n_voting: int = 0
    n_agree: int = 0

    def same_clusters(self, other: "Consensus") -> bool:
        """Whether the two are over the same clusters."""
        return replace(self, n_clusters=0, n_voting=0, n_agree=0) == replace(
            other, n_clusters=0, n_voting=0, n_agree=0
        )

    @property
    def share(self) -> float:
        """The share of the voting cells whose label is the consensus; NaN where none votes."""
        return self.n_agree / self.n_voting if self.n_voting else float("nan")


@dataclass(frozen=True)
class Manifest:
    """What a labels data set is of.

    model: the model's digest; store: its location, for information; rule: what was asked for
    split_sha256: of the split.parquet beside the model, "" where there was none
    classes: cell types in the order of ``probabilities``; columns: of the table; written: what else there is
    parents, hierarchy_threshold: the model's hierarchy, as ``Hierarchy.to_json`` has it, and the probability that a
    lineage has at least; None where it has none
    consensus: how it was found; None where there is none, or some parts may lack it
    """

    model: str
    store: str
    samples: dict[str, SampleRecord]
    rule: ConfidenceRule
    split_sha256: str
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    written: Written = Written()
    complete: bool = False
    parents: dict[str, list[str]] | None = None
    hierarchy_threshold: float | None = None
    consensus: Consensus | None = None

    @property
    def hierarchy(self) -> Hierarchy | None:
        """What lies above the classes. Raises InputError where ``parents`` say none of these classes."""
        return None if self.parents is None else Hierarchy.of(self.classes, self.parents, MANIFEST)

    @property
    def predicted_columns(self) -> tuple[str, ...]:
        """Columns of the table but for those of a consensus."""
        return tuple(name for name in self.columns if name not in CONSENSUS_COLUMNS)

    @property
    def parts(self) -> list[Part]:
        """All parts of the data set, in the order of the samples."""
        return [
            Part(name, unit, min(PART_CELLS, sample.n_cells - unit * PART_CELLS))
            for name, sample in self.samples.items()
            for unit in range(max(1, -(-sample.n_cells // PART_CELLS)))
        ]

    @property
    def options(self) -> dict[str, Any]:
        """All that changes what a row holds, but for the model and the cells; JSON-able."""
        options = {**asdict(self.rule), **asdict(self.written), "split_sha256": self.split_sha256}
        if self.hierarchy_threshold is not None:
            options["hierarchy_threshold"] = self.hierarchy_threshold
        return options

    def made_with(self, sample: str) -> dict[bytes, bytes]:
        """Schema metadata of the parts of a sample: equal if and only if they would hold the same."""
        made_with = {"model": self.model, "x_sha256": self.samples[sample].x_sha256, **self.options}
        return {_MADE_WITH: json.dumps(made_with).encode(), _CLASSES: json.dumps(self.classes).encode()}

    def to_dict(self) -> dict[str, Any]:
        """As it is on disk, with the parts listed."""
        parts = [{"file": part.file, **asdict(part)} for part in self.parts]
        return {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self), "parts": parts}


def read_manifest(path: Location) -> Manifest:
    """The manifest of the labels data set at ``path``. Raises InputError where there is none."""
    file = joined(path, MANIFEST)
    try:
        values = json.loads(place_of(path).read(MANIFEST))
        if values["format"] != FORMAT or values["version"] != FORMAT_VERSION:
            raise InputError(
                f"{file}: found format {values['format']} {values['version']}, expected {FORMAT} "
                f"{FORMAT_VERSION}; upgrade annatac_scale or predict again"
            )
        consensus = values.get("consensus")
        return Manifest(
            samples={name: SampleRecord(**record) for name, record in values["samples"].items()},
            rule=ConfidenceRule(**values["rule"]),
            written=Written(**values["written"]),
            classes=tuple(values["classes"]),
            columns=tuple(values["columns"]),
            consensus=None if consensus is None else Consensus(**consensus),
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
    """A labels data set: which parts are there, and what is in them; any number of threads may use it."""

    def __init__(self, location: Location, manifest: Manifest) -> None:
        self.location = location
        self.manifest = manifest
        self.place = place_of(location)

    @classmethod
    def open(cls, location: Location) -> "LabelsFolder":
        """Open a data set for reading, complete or not. Raises InputError where there is none."""
        return cls(location, read_manifest(location))

    def there(self) -> tuple[list[Part], int]:
        """The parts that are there, in their order, and how many cells the others have.

        Raises InputError where none of the parts is there.
        """
        parts = self.manifest.parts
        missing = set(self.missing(parts))
        if parts and len(missing) == len(parts):
            raise InputError(
                f"{self.location}: found none of its {len(parts):,} parts, expected some to read; run the same "
                "`annatac predict` again, it goes on where it stopped"
            )
        n_missing = sum(part.n_cells for part in missing)
        return [part for part in parts if part not in missing], n_missing

    def missing(self, parts: Sequence[Part]) -> list[Part]:
        """Those of some parts that are not there, whole to the footer, and made with what the manifest says."""
        if not parts:
            return []
        with ThreadPoolExecutor(min(_LOOKING, len(parts)), "parts") as pool:
            there = pool.map(self.has, parts)
            return [part for part, is_there in zip(parts, there, strict=True) if not is_there]

    def has(self, part: Part) -> bool:
        """Whether the part is there, whole to the footer, and made with what the manifest says."""
        metadata = self._metadata(part)
        if metadata is None:
            return False
        found = metadata.metadata or {}
        same = all(found.get(key) == value for key, value in self.manifest.made_with(part.sample).items())
        return same and metadata.num_rows == part.n_cells and self._has_embeddings(part)

    def _has_embeddings(self, part: Part) -> bool:
        """Whether those of a part are there, where they were asked for."""
        if not (self.manifest.written.embeddings and part.n_cells):
            return True
        return bool(self.place.size(f"{EMBEDDINGS}/{chunk_file(part.sample, part.unit)}"))

    def _metadata(self, part: Part) -> pq.FileMetaData | None:
        for n_bytes in (_FOOTER_BYTES, None):  # where the end is too short, the whole file
            try:
                read = (
                    self.place.read if n_bytes is None else partial(_read_end, self.place.read_range, n_bytes)
                )
                return pq.read_metadata(pa.BufferReader(read(part.file)))
            except FileNotFoundError:
                return None
            except (OSError, pa.ArrowException):
                continue
        return None

    def read(self, part: Part, columns: Sequence[str]) -> pa.Table:
        """Columns of a part. Raises InputError where its bytes do not fit their checksums."""
        file = joined(self.location, part.file)
        try:
            data = pa.BufferReader(self.place.read(part.file))
            return pq.read_table(data, columns=list(columns), page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{file}: cannot be read ({error}); expected a whole Parquet file; delete it and run the same "
                "`annatac predict` again"
            ) from error

    def read_all(
        self, parts: Iterable[Part], columns: Sequence[str], n_ahead: int = _AHEAD
    ) -> Iterator[tuple[Part, pa.Table]]:
        """Columns of parts, one after the other, in their order; ``n_ahead`` of them are read meanwhile.

        Memory is that of ``n_ahead`` parts. Raises InputError as ``read``.
        """
        left = iter(parts)
        with ThreadPoolExecutor(n_ahead, "labels") as pool:
            reading: deque[tuple[Part, Future[pa.Table]]] = deque()
            try:
                while True:
                    for part in islice(left, n_ahead - len(reading)):
                        reading.append((part, pool.submit(self.read, part, columns)))
                    if not reading:
                        return
                    part, future = reading.popleft()
                    yield part, future.result()
            finally:
                for _, future in reading:
                    future.cancel()

    def read_embeddings(self, part: Part) -> NDArray[np.float16]:
        """Embeddings of the cells of a part, float16 [n, width]. Raises StoreError where they cannot be read."""
        return read_cell_array(joined(self.location, EMBEDDINGS), part.sample, part.first, part.n_cells)

    def write(self, part: Part, table: pa.Table, embeddings: NDArray[np.float16] | None = None) -> None:
        """Write a part, whole or not at all. embeddings: float16 [n, width], written first"""
        if embeddings is not None:
            shape = self.manifest.samples[part.sample].n_cells, embeddings.shape[1]
            files = cell_array_files(part.sample, shape, PART_CELLS, part.unit, embeddings)
            for name, data in files.items():
                self.place.write(f"{EMBEDDINGS}/{name}", data, wait=True)
        self.replace(part, table)

    def replace(self, part: Part, table: pa.Table) -> None:
        """Write the rows of a part, in place of those that are there."""
        table = table.replace_schema_metadata(self.manifest.made_with(part.sample))
        out = pa.BufferOutputStream()
        pq.write_table(table, out, compression="zstd", write_page_checksum=True)
        self.place.write(part.file, out.getvalue().to_pybytes(), wait=True)

    def write_manifest(self, complete: bool, consensus: Consensus | None = None) -> None:
        """Write the manifest, whole or not at all.

        consensus: that all parts have now; an earlier one is not kept, as whoever writes the manifest changes parts
        """
        columns = self.manifest.predicted_columns + (() if consensus is None else CONSENSUS_COLUMNS)
        self.manifest = replace(self.manifest, complete=complete, columns=columns, consensus=consensus)
        self.place.write(MANIFEST, json.dumps(self.manifest.to_dict(), indent=1).encode(), wait=True)


def _read_end(read_range: Any, n_bytes: int, name: str) -> bytes:
    data: bytes = read_range(name, -n_bytes, n_bytes)
    return data
