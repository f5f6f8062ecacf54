"""The whole way of a fragment file without a store: its ranges, its cells, its rows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd

from annatac_scale.genome.annotation import place_tss
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest import fragments
from annatac_scale.ingest.cells import Cells, choose_cells
from annatac_scale.ingest.finish import finish_shard, n_open_name
from annatac_scale.ingest.fragments import Counting, count_range, count_stream, spill_names
from annatac_scale.ingest.key_table import table_of
from annatac_scale.ingest.peaks import PeakSet, as_intervals
from annatac_scale.ingest.quality import fragment_quality
from annatac_scale.ingest.segments import cut_genome
from annatac_scale.ingest.text import RANGE_BYTES, TEXT_BYTES, RangeReader, look_at
from annatac_scale.store.draft import ShardRecord
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Folder
from annatac_scale.store.schema import SHARD_CELLS

TOY = Assembly("toy", ("chr1", "chr2", "chrM"), (10_000, 4_200, 900))
BINS = IslandSpace.all(TOY, width_bp=1000)
STRATEGIES = ("insertion", "fragment", "paired-insertion")


def some_bins(*kept: int) -> IslandSpace:
    """A few of BINS."""
    i = np.array(kept)
    return IslandSpace(
        "toy", TOY.chromosomes, 0, "windows", BINS.chrom[i], BINS.start[i], BINS.end[i], BINS.genes[i]
    )


@dataclass(frozen=True, eq=False)
class Way:
    """How a file is counted; read_bytes: read from the file at a time."""

    peaks: PeakSet = field(default_factory=lambda: PeakSet.of_space(BINS))
    tss: pd.DataFrame | None = None
    strategy: str = "insertion"
    listed: Sequence[str] | None = None
    quality: bool = True
    count_invalid: bool = False
    min_fragments: int = 0
    min_tsse: float = 0
    assembly: Assembly = TOY
    range_bytes: int = RANGE_BYTES
    text_bytes: int = TEXT_BYTES
    read_bytes: int = 1 << 20
    n_keys: int = 1 << 10
    n_strands: int = 1


@dataclass(frozen=True, eq=False)
class Counted:
    """rows: {barcode: {island: level}} in their order; told: bytes and lines that were reported as worked through"""

    cells: Cells
    rows: dict[str, dict[int, int]]
    obs: pd.DataFrame
    told: tuple[int, int]

    def essence(self) -> dict[str, Any]:
        """All that no split of the file may change."""
        cells = self.cells
        return {
            "rows": list(self.rows.items()),
            "quality": cells.quality.tolist(),
            "lines": cells.lines,
            "invalid": cells.invalid,
            "contigs": cells.contigs,
            "chromosomes": cells.chromosomes,
            "barcode_rank": cells.barcode_rank,
        }


class CapturedRows:
    """Stands for a Draft, and keeps what is written."""

    def __init__(self) -> None:
        self.shards: list[OpenIslands] = []

    def written(self, shard: int) -> None:
        return None

    def write_blocks(self, shard: int, blocks: Iterable[OpenIslands]) -> ShardRecord:
        rows = OpenIslands.concatenate(list(blocks))
        self.shards.append(rows)
        return ShardRecord(shard, "", len(rows.islands), len(rows))


def count(path: Path, way: Way | None = None, before: Callable[[], None] = lambda: None) -> Counted:
    """Count a file; ``before`` is called between looking at it and reading."""
    way = way or Way()
    told = [0, 0]

    def advance(n_bytes: int, n_lines: int) -> None:
        told[0] += n_bytes
        told[1] += n_lines

    with (
        TemporaryDirectory() as folder,
        patch.object(fragments, "RangeReader", partial(RangeReader, text_bytes=way.text_bytes)),
        patch("annatac_scale.ingest.bgzf.READ_BYTES", way.read_bytes),
    ):
        place, file = Folder(folder), look_at(path, way.range_bytes)
        before()
        counting = counting_of(way)
        if file.n_ranges > 1:
            for number in reversed(range(file.n_ranges)):
                count_range(file, number, counting, place, advance)
        else:
            count_stream(file, way.n_strands, counting, place, advance)
        names = spill_names(file, place)
        cells = choose_cells(file, place, names, counting, way.min_fragments, way.min_tsse)
        draft, n_cells = CapturedRows(), len(cells.barcodes)
        for shard in range(-(-n_cells // SHARD_CELLS)):
            finish_shard(draft, place, names, n_cells, shard, way.peaks.n)  # type: ignore[arg-type]
        n_open = [place.read(n_open_name(i)) for i in range(len(draft.shards))]
        rows = OpenIslands.concatenate(draft.shards)
    assert np.frombuffer(b"".join(n_open), np.int32).tolist() == rows.n_open.tolist()
    obs = fragment_quality(
        cells.barcodes,
        cells.quality,
        rows.n_open,
        way.quality,
        True,
        way.tss is not None,
        way.quality or way.listed is None,
    )
    return Counted(cells, as_dict(cells.barcodes, rows), obs, (told[0], told[1]))


def counting_of(way: Way) -> Counting:
    tss = None if way.tss is None else place_tss(way.assembly, way.tss)
    return Counting(
        way.assembly,
        cut_genome(way.peaks, way.assembly, tss),
        len(way.peaks.n),
        way.strategy,
        None if way.listed is None else table_of([name.encode() for name in way.listed]),
        way.quality,
        way.count_invalid,
        way.n_keys,
    )


def as_dict(barcodes: Sequence[str], rows: OpenIslands) -> dict[str, dict[int, int]]:
    assert len(rows) == len(barcodes)
    found = {}
    for i, barcode in enumerate(barcodes):
        part = rows[i : i + 1]
        assert (np.diff(part.islands) > 0).all()
        found[barcode] = dict(zip(part.islands.tolist(), part.levels.tolist(), strict=True))
    return found


def peak_set(peaks: Sequence[tuple[str, int, int]], space: IslandSpace = BINS) -> PeakSet:
    return PeakSet.of_intervals(as_intervals(peaks), TOY, space, "peaks")


def tss_table(rows: Sequence[tuple[str, int]], types: Sequence[str] | str = "protein_coding") -> pd.DataFrame:
    kinds = [types] * len(rows) if isinstance(types, str) else list(types)
    return pd.DataFrame(
        {
            "chrom": [chrom for chrom, _ in rows],
            "position": np.array([position for _, position in rows], np.int64),
            "strand": "+",
            "gene": [f"g{i}" for i in range(len(rows))],
            "type": kinds,
        }
    )


def lines_of(rows: Sequence[tuple[object, ...]], ending: str = "\n") -> bytes:
    """Rows as the text of a file."""
    return "".join("\t".join(map(str, row)) + ending for row in rows).encode()
