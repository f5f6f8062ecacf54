"""What a conversion will need, told by the first 64 kB of each fragment file, before any work is done."""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annatac_scale.errors import StoreError
from annatac_scale.ingest.bgzf import BrokenTextError, Bytes, inflate
from annatac_scale.ingest.samples import FRAGMENTS, Job, Recipe
from annatac_scale.ingest.text import PLAIN, ZSTD, TextFile, whole_lines, zstd_texts
from annatac_scale.store.files import INCOMING
from annatac_scale.store.place import Blob, blob_of, is_url, place_of

HEAD_BYTES = 1 << 16

_BYTES_OF_COUNT = 3
"""An island in a spill takes 1 to 3 bytes, and a fragment's ends are at most two."""
_BYTES_OF_BARCODE = 130
_MOST_STORED_OF_SPILL = 0.6
"""The island codec and zstd take about half of what a spill takes, whose counts are those of one range."""


@dataclass(frozen=True)
class Head:
    """The beginning of a fragment file: its lines, as text, and the bytes of the file that they took."""

    lines: list[bytes]
    n_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a sample will need at most, as far as the first 64 kB of its file tells.

    lines: of a fragment file, else 0; scratch_bytes: on the way, store_bytes: for good
    """

    lines: int
    scratch_bytes: int
    store_bytes: int


@dataclass(frozen=True)
class _Beginning:
    """A blob that ends early."""

    blob: Blob
    size: int

    @property
    def location(self) -> str:
        return self.blob.location

    @property
    def stamp(self) -> int | str:
        return self.blob.stamp

    def read(self, start: int, length: int) -> bytes:
        """As in Blob."""
        return self.blob.read(start, max(0, min(length, self.size - start)))


def read_head(file: TextFile) -> Head:
    """The whole lines in the first 64 kB of a file."""
    blob = blob_of(file.location)
    beginning = _Beginning(blob, min(blob.size, HEAD_BYTES))
    source = Bytes(beginning, 0, lambda place, piece: None)
    texts: Iterator[bytes]
    if file.form == PLAIN:
        text = beginning.read(0, beginning.size)
        texts = iter([text if beginning.size == blob.size else text[: text.rfind(b"\n") + 1]])
    else:
        texts = zstd_texts(source) if file.form == ZSTD else inflate(source)
    lines: list[bytes] = []
    try:
        for text in whole_lines(texts, iter(()), True, 1 << 16):
            lines += text.splitlines(keepends=True)
    except BrokenTextError:
        # Where the beginning ends, most of all: what is damaged is told when all is read.
        if blob.size <= HEAD_BYTES:
            raise
    return Head(lines, beginning.size)


def estimate(job: Job, recipe: Recipe) -> Estimate:
    """What the conversion of a sample will need."""
    if job.kind != FRAGMENTS:
        return Estimate(0, 0, job.n_bytes)
    try:
        head = read_head(job.text)
    except BrokenTextError:
        head = Head([], job.n_bytes)
    n_lines = len(head.lines) * max(1, job.n_bytes) // max(1, head.n_bytes)
    barcodes = [line.split(b"\t", 4)[3].strip() for line in head.lines if line.count(b"\t") >= 3]
    per_range = _distinct_among(barcodes, n_lines // job.text.n_ranges)
    name_bytes = sum(map(len, barcodes)) // max(1, len(barcodes))
    counts = 2 * _BYTES_OF_COUNT * n_lines
    scratch = counts + job.text.n_ranges * per_range * (_BYTES_OF_BARCODE + name_bytes)
    return Estimate(n_lines, scratch, int(_MOST_STORED_OF_SPILL * counts))


def _distinct_among(sample: Sequence[bytes], n: int) -> int:
    """How many different ones ``n`` would hold, as a power of n (Heaps' law) fitted to a sample and its first half."""
    whole, half = len(set(sample)), len(set(sample[: len(sample) // 2]))
    if len(sample) < 2 or n <= len(sample) or not half:
        return min(whole, n) if sample else 0
    exponent = min(1.0, math.log(whole / half) / math.log(2) if whole > half else 0.0)
    return int(whole * (n / len(sample)) ** exponent)


def check_disks(jobs: Sequence[Job], recipe: Recipe) -> None:
    """Raise StoreError where a disk has less room than the conversion may need."""
    needs: dict[str, list[Any]] = {}
    for folder, n_bytes, what in _needed(jobs, recipe):
        existing = _existing(folder)
        entry = needs.setdefault(str(os.stat(existing).st_dev), [folder, existing, 0, []])
        entry[2] += n_bytes
        entry[3].append(what)
    for folder, existing, n_bytes, what in needs.values():
        free = shutil.disk_usage(existing).free
        if free < n_bytes:
            raise StoreError(
                f"{folder}: found {shown_bytes(free)} free; expected {shown_bytes(n_bytes)}, which "
                f"{' and '.join(what)} may need; free some space, or give a folder elsewhere with --scratch or --out"
            )


def still_needed(jobs: Sequence[Job], recipe: Recipe) -> str:
    """How much room the conversion still takes, for whom the disk was full."""
    needs = [
        f"{shown_bytes(n_bytes)} in {folder} for {what}" for folder, n_bytes, what in _needed(jobs, recipe)
    ]
    return f"it may take another {' and '.join(needs)}"


def _is_down(job: Job, recipe: Recipe) -> int:
    """Bytes that a stopped run put down for a sample, which this one need not put down again."""
    draft = place_of(recipe.store).below(f"{INCOMING}/{job.name}")
    return (
        sum(draft.sizes().values()) if recipe.scratch is None else sum(job.scratch(recipe).sizes().values())
    )


def _needed(jobs: Sequence[Job], recipe: Recipe) -> Iterator[tuple[Path, int, str]]:
    """Folders, bytes that they may need, and for what."""
    estimates = [estimate(job, recipe) for job in jobs]
    # A sample's scratch is freed at its commit; so many samples are on the way at once.
    scratch_bytes = [found.scratch_bytes for found in estimates]
    if not is_url(recipe.store if recipe.scratch is None else recipe.scratch):
        left = zip(scratch_bytes, jobs, strict=True)
        scratch_bytes = [max(0, n_bytes - _is_down(job, recipe)) for n_bytes, job in left]
    largest = sorted(scratch_bytes, reverse=True)[: recipe.workers + 1]
    scratch = recipe.store if recipe.scratch is None else recipe.scratch
    if not is_url(scratch):
        yield Path(scratch), sum(largest), "what is put down on the way"
    if not is_url(recipe.store):
        yield Path(recipe.store), sum(found.store_bytes for found in estimates), "the store"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def shown_bytes(n_bytes: int) -> str:
    """A size for people."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
