"""The quality of a store's cells: what obs and the conversions say, sample by sample. docs/qc.md has the formulas."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from annatac_scale.store.store import IslandStore, Sample

Floats = NDArray[np.float64]

QC_COLUMNS = {
    "n_fragments": "fragments",
    "n_counts": "counts",
    "n_insertions": "insertions",
    "n_open": "open",
    "fraction_in_islands": "in islands",
    "fraction_in_peaks": "in peaks",
    "fraction_in_tss": "in TSS",
    "tss_enrichment": "TSS enr.",
    "nucleosome_signal": "nucl. sig.",
    "duplicate_rate": "duplicates",
    "fraction_mitochondrial": "chrM",
}
"""obs columns that are about quality, in the order they are shown, and the words above them in the table."""

_SHARES = {
    "counted": "counted",
    "outside_islands": "outside",
    "not_a_cell": "no cell",
    "other_contig": "other contig",
    "invalid": "invalid",
}
"""What may become of a line of fragments, and the words above its share."""

_HEADS = ("sample", "from", "cells", *QC_COLUMNS.values(), "barcodes", "lines", *_SHARES.values())
_N_TEXTS = 2
_IN_PERCENT = ("fraction_", "duplicate_")
_LEGEND = (
    "Medians over the cells; of the lines, shares without comments. docs/qc.md says how each is defined."
)


@dataclass(frozen=True)
class RankCurve:
    """Barcodes of a fragment file by their fragments, most first.

    rank: int64 [m], from 1; n_fragments: int64 [m] of the barcode of that rank; n_barcodes: all that were seen
    """

    rank: NDArray[np.int64]
    n_fragments: NDArray[np.int64]
    n_barcodes: int


@dataclass(frozen=True)
class SampleQuality:
    """What is known of the cells of one sample.

    columns: float64 [n_cells], NaN where not defined, by obs column; those of QC_COLUMNS that the sample has
    curve: None where the sample does not come from fragments; lines: lines of its file by what became of them
    """

    name: str
    kind: str
    n_cells: int
    columns: dict[str, Floats]
    curve: RankCurve | None
    lines: dict[str, int]

    @property
    def medians(self) -> dict[str, float | None]:
        """The median over the cells that a column is defined for; None where it is for none."""
        defined = {name: values[~np.isnan(values)] for name, values in self.columns.items()}
        return {name: float(np.median(values)) if len(values) else None for name, values in defined.items()}

    @property
    def shares(self) -> dict[str, float]:
        """Share of the file's lines, comments left out, that each account holds."""
        n_lines = self.lines.get("lines", 0) - self.lines.get("comment", 0)
        return {name: self.lines[name] / n_lines for name in _SHARES if n_lines > 0 and name in self.lines}


def read_quality(store: IslandStore) -> list[SampleQuality]:
    """The quality of all samples, in order of commit."""
    return [_read_sample(sample) for sample in store.samples.values()]


def _read_sample(sample: Sample) -> SampleQuality:
    obs, conversion = sample.obs(), sample.conversion
    lines = conversion.get("lines") or {}
    return SampleQuality(
        name=sample.name,
        kind=str(conversion.get("kind", "-")),
        n_cells=sample.n_cells,
        columns={name: obs[name].to_numpy(np.float64) for name in QC_COLUMNS if _is_number(obs, name)},
        curve=_curve(conversion.get("barcode_rank")),
        lines={name: count for name, count in lines.items() if isinstance(count, int)},
    )


def _is_number(obs: pd.DataFrame, name: str) -> bool:
    # A column of texts under one of our names is the user's.
    return name in obs and pd.api.types.is_numeric_dtype(obs[name].dtype)


def _curve(record: Mapping[str, Any] | None) -> RankCurve | None:
    if not record:
        return None
    rank, n_fragments = (np.asarray(record[key], np.int64) for key in ("rank", "n_fragments"))
    return RankCurve(rank, n_fragments, int(record["n_barcodes"]))


@dataclass(frozen=True)
class QualityTable:
    """The quality of a store's cells, one line a sample."""

    path: str
    samples: Sequence[SampleQuality]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return {"path": self.path, "samples": [_to_dict(sample) for sample in self.samples]}

    def text(self) -> str:
        """All of it for people. Columns that no sample has are left out; one that a sample lacks shows "-"."""
        if not self.samples:
            return f"{self.path}: holds no sample; add one with `annatac convert`"
        written = [_written(sample) for sample in self.samples]
        heads = [head for head in _HEADS if any(head in texts for texts in written)]
        rows = [heads, *([texts.get(head, "-") for head in heads] for texts in written)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, "", _LEGEND])


def _to_dict(sample: SampleQuality) -> dict[str, Any]:
    known = {
        "name": sample.name,
        "kind": sample.kind,
        "n_cells": sample.n_cells,
        "medians": sample.medians,
        "n_barcodes": None if sample.curve is None else sample.curve.n_barcodes,
    }
    return known | {"lines": sample.lines, "shares_of_lines": sample.shares}


def _written(sample: SampleQuality) -> dict[str, str]:
    """What the table says of a sample, by the head of the column."""
    texts = {"sample": sample.name, "from": sample.kind, "cells": f"{sample.n_cells:,}"}
    for name, median in sample.medians.items():
        if median is not None:
            texts[QC_COLUMNS[name]] = _percent(median) if name.startswith(_IN_PERCENT) else _number(median)
    if sample.curve is not None:
        texts["barcodes"] = f"{sample.curve.n_barcodes:,}"
    if "lines" in sample.lines:
        texts["lines"] = f"{sample.lines['lines']:,}"
    return texts | {_SHARES[name]: _percent(share) for name, share in sample.shares.items()}


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    """Sample and kind to the left, numbers to the right."""
    cells = enumerate(zip(row, widths, strict=True))
    return [text.ljust(width) if i < _N_TEXTS else text.rjust(width) for i, (text, width) in cells]


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _number(value: float) -> str:
    """Counts without digits behind the point, small numbers with two."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"
