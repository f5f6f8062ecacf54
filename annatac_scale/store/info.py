"""What `annatac info` says of a store: read from its index, obs and conversions; X is never opened."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from annatac_scale.store import schema
from annatac_scale.store.elements import read_elem
from annatac_scale.store.files import INCOMING
from annatac_scale.store.place import place_of
from annatac_scale.store.store import IslandStore, Sample

MAX_DETAILED = 10
"""Samples up to which the text says where each came from; JSON always does."""

_ACCOUNTS = ("peaks", "cells", "lines")
_SHOWN = 3


@dataclass(frozen=True)
class OpenPerCell:
    """Open islands of a sample's cells. None: no cells, or (but for the mean) no column ``n_open`` in obs."""

    mean: float | None
    median: float | None
    least: int | None
    most: int | None


@dataclass(frozen=True)
class SampleInfo:
    """One sample.

    n_open: open islands of all its cells together; measured_islands: islands that its peaks measure
    bytes, x_bytes: of all its files, of X alone; columns: names of its obs columns
    conversion: where it came from, as it was stored
    """

    name: str
    n_cells: int
    n_open: int
    open_per_cell: OpenPerCell
    measured_islands: int
    bytes: int
    x_bytes: int
    digest: str
    columns: list[str]
    conversion: dict[str, Any]


@dataclass(frozen=True)
class StoreInfo:
    """A store and its samples in order of commit.

    digest: equal exactly for identical stores
    width_bp: 0 for windows from a file; bytes: of islands and committed samples; x_bytes: of X in all of them;
    bytes_per_cell: of all bytes, None without cells
    unfinished: names of samples that are being written, or were left by a writer that was killed
    """

    path: str
    format: str
    version: str
    digest: str
    assembly: str
    selection: str
    width_bp: int
    counting: str
    n_islands: int
    islands_sha256: str
    n_cells: int
    n_open: int
    bytes: int
    x_bytes: int
    bytes_per_cell: float | None
    samples: list[SampleInfo]
    unfinished: list[str]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return asdict(self)

    def text(self) -> str:
        """All of it for people, as aligned lines; where samples came from only if they are few."""
        parts = [[self.path, *_aligned(self._facts(), "  ")]]
        if self.samples:
            parts.append(_table(self.samples))
        if len(self.samples) <= MAX_DETAILED:
            parts += [[sample.name, *_aligned(_details(sample), "  ")] for sample in self.samples]
        else:
            parts.append(["Inputs, options and accounting of all samples: --json"])
        return "\n\n".join("\n".join(lines) for lines in parts)

    def _facts(self) -> list[tuple[str, str]]:
        bins = f"bins of {self.width_bp:,} bp" if self.width_bp else "from a file"
        facts = [
            ("format", f"{self.format} {self.version}"),
            ("digest", self.digest),
            ("assembly", self.assembly),
            ("islands", f"{self.n_islands:,} ({self.selection}, {bins})"),
            ("counting", self.counting),
            ("samples", f"{len(self.samples):,}"),
            ("cells", f"{self.n_cells:,}"),
            ("open islands", f"{self.n_open:,}{_per_cell(self.n_open, self.n_cells)}"),
            ("size", f"{_size(self.bytes)}{_per_cell(self.bytes, self.n_cells, ' bytes')}"),
            ("size of X", f"{_size(self.x_bytes)}{_per_cell(self.x_bytes, self.n_cells, ' bytes')}"),
        ]
        if self.unfinished:
            names = ", ".join(self.unfinished)
            facts.append(("unfinished", f"{names}: being written, or left by a stopped run; convert again"))
        return facts


def describe(store: IslandStore) -> StoreInfo:
    """What a store holds and where it came from."""
    sizes = _Sizes(place_of(store.path).sizes())
    samples = [_describe_sample(sample, sizes) for sample in store.samples.values()]
    n_bytes = sum(sample.bytes for sample in samples) + sizes.below(schema.ISLANDS)
    return StoreInfo(
        path=str(store.path),
        format=store.attributes["format"],
        version=store.attributes["version"],
        digest=store.digest,
        assembly=store.attributes["assembly"],
        selection=store.attributes["selection"],
        width_bp=store.attributes["width_bp"],
        counting=store.counting,
        n_islands=store.n_islands,
        islands_sha256=store.islands_sha256,
        n_cells=store.n_cells,
        n_open=sum(sample.n_open for sample in samples),
        bytes=n_bytes,
        x_bytes=sum(sample.x_bytes for sample in samples),
        bytes_per_cell=n_bytes / store.n_cells if store.n_cells else None,
        samples=samples,
        unfinished=_unfinished(store),
    )


class _Sizes:
    """Bytes below the folders of a store, to the depth of a sample's X."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._below: Counter[str] = Counter()
        for name, size in sizes.items():
            folders = name.split("/")[:-1]
            for depth in range(1, min(len(folders), 3) + 1):
                self._below["/".join(folders[:depth])] += size

    def below(self, folder: str) -> int:
        return self._below[folder]


def _describe_sample(sample: Sample, sizes: _Sizes) -> SampleInfo:
    columns = cast(list[str], sample.group["obs"].attrs["column-order"])
    n_open = read_elem(sample.group["obs/n_open"]) if "n_open" in columns else None
    if not isinstance(n_open, np.ndarray):  # A column of text: not ours.
        n_open = None
    folder = f"{schema.SAMPLES}/{sample.name}"
    return SampleInfo(
        name=sample.name,
        n_cells=sample.n_cells,
        n_open=sample.n_open,
        open_per_cell=_open_per_cell(sample, n_open),
        measured_islands=int(sample.measured.sum()),
        bytes=sizes.below(folder),
        x_bytes=sizes.below(f"{folder}/X"),
        digest=sample.digest,
        columns=columns,
        conversion=sample.conversion,
    )


def _open_per_cell(sample: Sample, n_open: NDArray[np.int64] | None) -> OpenPerCell:
    if not sample.n_cells:
        return OpenPerCell(None, None, None, None)
    mean = sample.n_open / sample.n_cells
    if n_open is None:
        return OpenPerCell(mean, None, None, None)
    return OpenPerCell(mean, float(np.median(n_open)), int(n_open.min()), int(n_open.max()))


def _unfinished(store: IslandStore) -> list[str]:
    # In .incoming a draft is told by its name from the obs beside it; in samples/ lies, not in the index, a sample
    # whose writer was killed between its rename and the index, or one that is being written to object storage.
    place = place_of(store.path)
    incoming = {name for name in place.folders(INCOMING) if not name.startswith(".")}
    in_place = set(place.folders(schema.SAMPLES)) - set(store.samples)
    return sorted((incoming - set(store.samples)) | in_place)


def _table(samples: Sequence[SampleInfo]) -> list[str]:
    """One line a sample; text to the left, numbers to the right."""
    head = ["sample", "from", "cells", "open: mean", "median", "least", "most", "measured", "size"]
    rows = [head]
    for sample in samples:
        opened = sample.open_per_cell
        rows.append(
            [
                sample.name,
                str(sample.conversion.get("kind", "-")),
                f"{sample.n_cells:,}",
                *(_number(value) for value in (opened.mean, opened.median, opened.least, opened.most)),
                f"{sample.measured_islands:,}",
                _size(sample.bytes),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in cells).rstrip()
        for cells in (enumerate(zip(row, widths, strict=True)) for row in rows)
    ]


def _details(sample: SampleInfo) -> list[tuple[str, str]]:
    """Where a sample came from. What is in a conversion is up to its writer: what is not there is left out."""
    conversion = sample.conversion
    facts = [("digest", sample.digest), ("obs", ", ".join(sample.columns))]
    facts += [("input", _input(entry)) for entry in conversion.get("inputs", [])]
    options = conversion.get("options") or {}
    facts.append(("options", ", ".join(f"{name} = {value}" for name, value in options.items())))
    facts += [(key, _account(conversion[key])) for key in _ACCOUNTS if key in conversion]
    facts.append(("contigs", _contigs(conversion.get("contigs") or {})))
    version = (conversion.get("versions") or {}).get("annatac_scale")
    by = [conversion.get("finished"), f"by annatac_scale {version}" if version else None]
    facts.append(("converted", " ".join(str(part) for part in by if part)))
    return [(name, value) for name, value in facts if value]


def _input(entry: Any) -> str:
    if not isinstance(entry, Mapping) or "path" not in entry:
        return str(entry)
    more = [str(entry["role"])] if "role" in entry else []
    more += [_size(entry["size"])] if "size" in entry else []
    return " ".join([str(entry["path"]), f"({', '.join(more)})" if more else ""]).rstrip()


def _account(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{_number(count)} {name.replace('_', ' ')}" for name, count in counts.items())


def _contigs(contigs: Mapping[str, Any]) -> str:
    """Contigs that were renamed, and those the assembly does not have with their lines."""
    renamed = [f"{name} as {chrom}" for name, chrom in (contigs.get("renamed") or {}).items()]
    other = [f"{name} ({_number(lines)} lines)" for name, lines in (contigs.get("other") or {}).items()]
    said = [_first(renamed, len(renamed))] if renamed else []
    if other:
        said.append(f"not in the assembly: {_first(other, contigs.get('n_other', len(other)))}")
    return "; ".join(said)


def _first(names: Sequence[str], n: int) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if n <= _SHOWN else f"{shown} and {n - _SHOWN:,} more"


def _aligned(facts: Sequence[tuple[str, str]], indent: str) -> list[str]:
    """``name  value`` lines; a name that repeats the one before it is left blank."""
    width = max(len(name) for name, _ in facts)
    previous = [None, *(name for name, _ in facts)]
    return [
        f"{indent}{'' if name == before else name:{width}}  {value}"
        for before, (name, value) in zip(previous, facts, strict=False)
    ]


def _number(value: Any) -> str:
    """A count with separators, a fraction with one digit, "-" for what is not known."""
    if isinstance(value, float):
        return f"{value:,.1f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _per_cell(total: int, n_cells: int, unit: str = "") -> str:
    return f", {total / n_cells:,.1f}{unit} a cell" if n_cells else ""


def _size(n_bytes: float) -> str:
    """Bytes in decimal units, as 1.2 MB."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        n_bytes /= 1000
        if n_bytes < 999.95:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:.1f} TB"
