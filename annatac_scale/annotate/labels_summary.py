"""What a labels data set says, all of it or the parts that are there: counted in one pass, part by part."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from annatac_scale.annotate.histograms import Histogram
from annatac_scale.annotate.labels import LabelsFolder, Manifest
from annatac_scale.model.labels import LOW_DEPTH, NOVEL
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.place import Location

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_PAIRS = 20
"""Pairs of types that are listed."""

Quantiles = Mapping[str, float] | None
"""Of some cells at QUANTILES, by their names as "0.5"; None without a cell."""


@dataclass(frozen=True)
class SampleSummary:
    """The cells of a sample. n_cells: in parts that are there; n_missing: in the others; n_open: open islands"""

    name: str
    n_cells: int
    n_missing: int
    labels: Mapping[str, int]
    n_open: Quantiles


@dataclass(frozen=True)
class LabelSummary:
    """The cells with a label, and how sure the model is of their best type."""

    name: str
    n_cells: int
    confidence: Quantiles


@dataclass(frozen=True)
class SetsSummary:
    """Prediction sets.

    n_of_size: cells by the number of types in their set
    pairs: types that are a set of two together, most cells first, at most MOST_PAIRS
    """

    n_of_size: Mapping[int, int]
    pairs: Sequence[tuple[str, str, int]]


@dataclass(frozen=True)
class ConsensusSummary:
    """Labels of cells against that of most of their cluster.

    n_cells: that have a consensus and are not Unassigned_low_depth; n_differ: those of them with another label
    share: of the cells of the cluster that agree, over these cells
    """

    n_cells: int
    n_differ: int
    share: Quantiles


@dataclass(frozen=True)
class LabelsSummary:
    """What a labels data set says.

    location: where it lies; manifest: what it is of; n_parts, n_parts_there: all of it, and what is summed up here
    samples: in their order; labels: those that cells have, most cells first
    confidence: of the best types of all cells; sets, consensus: None where there are none
    """

    location: Location
    manifest: Manifest
    n_parts: int
    n_parts_there: int
    samples: Sequence[SampleSummary]
    labels: Sequence[LabelSummary]
    confidence: Quantiles
    sets: SetsSummary | None
    consensus: ConsensusSummary | None

    @property
    def n_cells(self) -> int:
        """Cells that are summed up."""
        return sum(sample.n_cells for sample in self.samples)

    @property
    def n_missing(self) -> int:
        """Cells in parts that are not there."""
        return sum(sample.n_missing for sample in self.samples)

    def n_of(self, label: str) -> int:
        """Cells with a label."""
        return sum(one.n_cells for one in self.labels if one.name == label)

    def share(self, n_cells: int) -> float:
        """Of all cells; 0 where there is none."""
        return n_cells / self.n_cells if self.n_cells else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it in the types of JSON."""
        n_novel, n_low_depth = self.n_of(NOVEL), self.n_of(LOW_DEPTH)
        return {
            "labels": str(self.location),
            "model": self.manifest.model,
            "store": self.manifest.store,
            "options": self.manifest.options,
            "n_cells": self.n_cells,
            "n_missing": self.n_missing,
            "n_parts": self.n_parts,
            "n_parts_there": self.n_parts_there,
            "n_novel": n_novel,
            "share_novel": self.share(n_novel),
            "n_low_depth": n_low_depth,
            "share_low_depth": self.share(n_low_depth),
            "confidence": self.confidence,
            "by_label": [{**asdict(one), "share": self.share(one.n_cells)} for one in self.labels],
            "by_sample": [asdict(one) for one in self.samples],
            "sets": None if self.sets is None else _sets_dict(self.sets),
            "consensus": None if self.consensus is None else asdict(self.consensus),
        }


def _sets_dict(sets: SetsSummary) -> dict[str, Any]:
    pairs = [{"types": [first, second], "n_cells": n} for first, second, n in sets.pairs]
    return {"n_of_size": {str(size): n for size, n in sets.n_of_size.items()}, "pairs": pairs}


def summarize(location: Location, progress: Progress | None = None) -> LabelsSummary:
    """Read a labels data set once, the parts that are there, and count.

    Memory: a few parts, 16 kB a label, 64 kB a sample's labels at most, and 100 bytes a pair of types; whatever the
    number of cells. Raises InputError where there is no data set, no part of it, or a part is damaged.
    """
    progress = progress or Silent()
    folder = LabelsFolder.open(location)
    there, _ = folder.there()
    manifest = folder.manifest
    columns = ["label", "confidence", "n_open", "set", "set_size"]
    columns += [name for name in ("consensus", "consensus_share") if name in manifest.columns]
    counts, samples = _Counts(), {name: _SampleCounts() for name in manifest.samples}
    with progress.task("report", sum(part.n_cells for part in there), "cells") as advance:
        for part, table in folder.read_all(there, columns):
            counts.add(table)
            samples[part.sample].add(table)
            advance(part.n_cells)
            if samples[part.sample].n_cells == manifest.samples[part.sample].n_cells:
                samples[part.sample].close()
    return LabelsSummary(
        location=folder.location,
        manifest=manifest,
        n_parts=len(manifest.parts),
        n_parts_there=len(there),
        samples=[counted.summary(name, manifest.samples[name].n_cells) for name, counted in samples.items()],
        labels=counts.labels(),
        confidence=_quantiles(counts.confidence),
        sets=counts.sets(),
        consensus=counts.consensus_summary(),
    )


def _quantiles(histogram: Histogram) -> Quantiles:
    found = {str(share): histogram.quantile(share) for share in QUANTILES}
    return {name: value for name, value in found.items() if value is not None} or None


def _counted(values: pa.ChunkedArray) -> dict[Any, int]:
    return {row["values"]: row["counts"] for row in values.value_counts().to_pylist()}


@dataclass
class _SampleCounts:
    """Of one sample, its histogram only while its parts are read."""

    n_cells: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    n_open: Quantiles = None
    _histogram: Histogram | None = None

    def add(self, table: pa.Table) -> None:
        self._histogram = self._histogram or Histogram.of_counts()
        self._histogram.add(table["n_open"].to_numpy())
        self.labels.update(_counted(table["label"]))
        self.n_cells += len(table)

    def close(self) -> None:
        """Note that all of its parts were added."""
        if self._histogram is not None:
            self.n_open, self._histogram = _quantiles(self._histogram), None

    def summary(self, name: str, n_cells: int) -> SampleSummary:
        self.close()
        labels = dict(self.labels.most_common())
        return SampleSummary(name, self.n_cells, n_cells - self.n_cells, labels, self.n_open)


@dataclass
class _Counts:
    """Of all samples."""

    confidence: Histogram = field(default_factory=Histogram.of_shares)
    _n_of: Counter[str] = field(default_factory=Counter)
    _confidence_of: dict[str, Histogram] = field(default_factory=dict)
    _sizes: Counter[int] = field(default_factory=Counter)
    _pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    _consensus: list[int] | None = None
    _consensus_share: Histogram = field(default_factory=Histogram.of_shares)

    def add(self, table: pa.Table) -> None:
        sure, labels = table["confidence"].to_numpy(), table["label"].combine_chunks().dictionary_encode()
        codes, names = labels.indices.to_numpy(), labels.dictionary.to_pylist()
        self.confidence.add(sure)
        for code, name in enumerate(names):
            own = sure[codes == code]
            self._n_of[name] += len(own)
            self._confidence_of.setdefault(name, Histogram.of_shares()).add(own)
        self._sizes.update({size: n for size, n in _counted(table["set_size"]).items() if size is not None})
        twos = table["set"].filter(pc.equal(table["set_size"], 2))
        types = np.asarray(pc.list_flatten(twos).to_pylist(), object).reshape(-1, 2)
        self._pairs.update((min(pair), max(pair)) for pair in types.tolist())
        if "consensus" in table.column_names:
            self._add_consensus(table)

    def _add_consensus(self, table: pa.Table) -> None:
        voted = table.filter(
            pc.and_(pc.is_valid(table["consensus"]), pc.not_equal(table["label"], LOW_DEPTH))
        )
        n_cells, n_differ = self._consensus or (0, 0)
        differs = pc.sum(pc.not_equal(voted["label"], voted["consensus"])).as_py() or 0
        self._consensus = [n_cells + len(voted), n_differ + differs]
        if "consensus_share" in table.column_names:
            self._consensus_share.add(voted["consensus_share"].drop_null().to_numpy())

    def labels(self) -> list[LabelSummary]:
        """Most cells first, of equally many by name."""
        ordered: Iterable[tuple[str, int]] = sorted(self._n_of.items(), key=lambda one: (-one[1], one[0]))
        return [LabelSummary(name, n, _quantiles(self._confidence_of[name])) for name, n in ordered]

    def sets(self) -> SetsSummary | None:
        if not self._sizes:
            return None
        ordered = sorted(self._pairs.items(), key=lambda one: (-one[1], one[0]))[:MOST_PAIRS]
        pairs = [(*types, n) for types, n in ordered]
        return SetsSummary(dict(sorted(self._sizes.items())), pairs)

    def consensus_summary(self) -> ConsensusSummary | None:
        if self._consensus is None:
            return None
        n_cells, n_differ = self._consensus
        return ConsensusSummary(n_cells, n_differ, _quantiles(self._consensus_share))
