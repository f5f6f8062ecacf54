"""Small inputs of a conversion, and what is in the stores that come of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matrix_files import BARCODES, PEAKS
from scipy import sparse

from annatac_scale.ingest.convert import ConvertReport
from annatac_scale.store.store import IslandStore

Convert = Callable[..., ConvertReport]

FRAGMENTS = [
    (chrom, start, start + 20 + i % 180, BARCODES[i * 7 % 30])
    for i in range(3000)
    for chrom, start in [("chr1", i * 131 % 9700) if i % 3 else ("chr2", i * 57 % 3900)]
]


def write_lines(path: Path, rows: Sequence[tuple[Any, ...]]) -> Path:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def write_peaks(path: Path) -> Path:
    return write_lines(path, PEAKS)


def write_barcodes(path: Path, barcodes: Sequence[str] = BARCODES) -> Path:
    return write_lines(path, [(barcode,) for barcode in barcodes])


def islands_of(store: Path, sample: str | None = None) -> pd.DataFrame:
    """Rows (barcode, chrom, bin, level) of a sample, sorted."""
    opened = IslandStore.open(store)
    name = sample or next(iter(opened.samples))
    chosen = opened.samples[name]
    blocks = [chosen.read_block(i).to_csr(opened.n_islands) for i in range(chosen.n_blocks)]
    table = sparse.vstack(blocks).tocoo()
    space = opened.space
    rows = pd.DataFrame(
        {
            "barcode": chosen.obs().index.to_numpy()[table.row],
            "chrom": np.array(space.chromosomes)[space.chrom[table.col]],
            "bin": space.start[table.col] // 5000,
            "level": table.data.astype(int),
        }
    )
    return rows.sort_values(["barcode", "chrom", "bin"], ignore_index=True)


def shard_bytes(store: Path, sample: str) -> dict[str, bytes]:
    return all_bytes(store / "samples" / sample / "X")


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def digests(store: Path) -> dict[str, str]:
    return {name: sample.digest for name, sample in IslandStore.open(store).samples.items()}
