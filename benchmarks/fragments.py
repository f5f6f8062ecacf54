"""Fragment files like real ones, of any size: the only generator of fragments in the benchmarks.

    python benchmarks/fragments.py --out FOLDER [--lines 20000000] [--cells 5000] [--peaks 100000] ...

Writes ``fragments.tsv.gz`` (or .tsv, .tsv.zst), ``barcodes.txt`` (the cells) and ``peaks.bed`` (sorted, none overlaps
another) into FOLDER. The same options give the same lines. What is modelled:

- cells: depth lognormal; ambient barcodes share a small part of the lines;
- peaks: width lognormal around 500 bp, weight lognormal; 45% lie around TSS, one on it and others near, so that
  islands often hold several; fragments in peaks centre on them;
- lengths: nucleosome-free, mono-, di- and trinucleosome; column 5: geometric; chrM has its share;
- lines: sorted by chromosome and start as Cell Ranger has them, by barcode, or shuffled.

Not modelled: cell types, PCR duplicates as lines, contigs outside the chromosomes.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
from fragment_writer import EXTENSION, Fragments, FragmentWriter, open_packed

from annatac_scale.genome.annotation import builtin_tss
from annatac_scale.genome.assembly import Assembly

ORDERS = ("coordinate", "barcode", "random")
SPEC_FILE = "spec.json"
GENERATOR_VERSION = 1
_TSS_SHARE = 0.45
_ON_TSS_WEIGHT = 5.0
_LENGTHS = ((0.55, 78.0, 22.0), (0.33, 198.0, 26.0), (0.10, 385.0, 40.0), (0.02, 570.0, 50.0))
_BUCKET_LINES = 4_000_000
_PIECE_LINES = 4_000_000


@dataclass(frozen=True)
class Spec:
    """What to generate. Shares are of lines; level is that of BGZF and gzip."""

    lines: int = 20_000_000
    cells: int = 5_000
    ambient: int = 100_000
    peaks: int = 100_000
    assembly: str = "hg38"
    in_peaks: float = 0.45
    in_ambient: float = 0.04
    in_mitochondrion: float = 0.01
    order: str = "coordinate"
    compression: str = "bgzf"
    level: int = 6
    seed: int = 0

    @classmethod
    def quick(cls) -> "Spec":
        return cls(lines=50_000, cells=100, ambient=500, peaks=2_000, level=1)

    def folder(self) -> str:
        """A name for a folder that no other options have."""
        key = hashlib.sha256(json.dumps([GENERATOR_VERSION, asdict(self)]).encode()).hexdigest()
        return f"{self.assembly}_{self.lines}_lines_{self.cells}_cells_{self.peaks}_peaks_{key[:8]}"


class FragmentSet(NamedTuple):
    fragments: Path
    barcodes: Path
    peaks: Path


class Peaks(NamedTuple):
    """Sorted by chromosome (an index) and start; weight: relative number of fragments."""

    chrom: np.ndarray
    start: np.ndarray
    end: np.ndarray
    weight: np.ndarray


class Genome(NamedTuple):
    """The chromosomes without scaffolds."""

    names: list[str]
    sizes: np.ndarray
    mitochondrion: int

    @classmethod
    def of(cls, assembly: str) -> "Genome":
        whole = Assembly.builtin(assembly)
        plain = {
            name: size for name, size in zip(whole.chromosomes, whole.sizes, strict=True) if "_" not in name
        }
        return cls(list(plain), np.array(list(plain.values())), list(plain).index("chrM"))

    def nuclear_share(self) -> np.ndarray:
        share = self.sizes.astype(float)
        share[self.mitochondrion] = 0
        return share / share.sum()


def make(folder: Path, spec: Spec, threads: int = 2) -> FragmentSet:
    """The set in ``folder``, generated unless it is there already."""
    made = FragmentSet(
        folder / f"fragments{EXTENSION[spec.compression]}", folder / "barcodes.txt", folder / "peaks.bed"
    )
    wanted = json.dumps({"generator": GENERATOR_VERSION, **asdict(spec)}, indent=1)
    marker = folder / SPEC_FILE
    if marker.exists() and marker.read_text() == wanted:
        return made
    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    _generate(made, spec, threads)
    marker.write_text(wanted)
    return made


def _generate(made: FragmentSet, spec: Spec, threads: int) -> None:
    rng = np.random.default_rng([spec.seed, 0])
    genome = Genome.of(spec.assembly)
    barcodes = _draw_barcodes(rng, spec.cells + spec.ambient)
    peaks = draw_peaks(rng, genome, spec)
    made.barcodes.write_text("".join(f"{barcode}\n" for barcode in barcodes[: spec.cells]))
    made.peaks.write_text(
        "".join(
            f"{genome.names[chrom]}\t{start}\t{end}\n"
            for chrom, start, end in zip(
                peaks.chrom.tolist(), peaks.start.tolist(), peaks.end.tolist(), strict=True
            )
        )
    )
    depth = _draw_depth(rng, spec)
    pieces = _by_coordinate(genome, peaks, depth, spec)
    if spec.order != "coordinate":
        pieces = _reordered(pieces, depth, spec, made.fragments.parent)
    with open_packed(made.fragments, spec.compression, spec.level, threads) as out:
        writer = FragmentWriter(out, genome.names, barcodes)
        writer.header(_header(spec, genome))
        for piece in pieces:
            writer.write(piece)


def _header(spec: Spec, genome: Genome) -> list[str]:
    given = [f"{name}={value}" for name, value in asdict(spec).items()]
    return ["id=generated", *given, *(f"primary_contig={name}" for name in genome.names)]


def _draw_barcodes(rng: np.random.Generator, n: int) -> list[str]:
    """Distinct ones of 16 letters with Cell Ranger's ``-1``."""
    codes = np.empty(0, dtype=np.int64)
    while len(codes) < n:
        codes = np.unique(np.concatenate([codes, rng.integers(0, 4**16, n)]))
    codes = rng.permutation(codes)[:n]
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)[(codes[:, None] >> np.arange(0, 32, 2)) & 3]
    return [f"{barcode.decode()}-1" for barcode in np.ascontiguousarray(letters).view("S16")[:, 0].tolist()]


def _draw_depth(rng: np.random.Generator, spec: Spec) -> np.ndarray:
    """Running share of the lines over the barcodes, cells first."""
    cells = rng.lognormal(0, 0.6, spec.cells)
    ambient = rng.lognormal(0, 1.0, spec.ambient)
    shares = np.concatenate([
        cells / cells.sum() * (1 - spec.in_ambient if spec.ambient else 1),
        ambient / max(ambient.sum(), 1e-9) * spec.in_ambient,
    ])  # fmt: skip
    return np.cumsum(shares) / shares.sum()


def draw_peaks(rng: np.random.Generator, genome: Genome, spec: Spec) -> Peaks:
    """``spec.peaks`` peaks, fewer only where the genome has no room for them."""
    tss = builtin_tss(spec.assembly)
    tss = tss[tss["chrom"].isin(genome.names)]
    likely = np.where(tss["type"].isin(["protein_coding", "unknown"]), 1.0, 0.2)
    tss_chrom = tss["chrom"].map({name: code for code, name in enumerate(genome.names)}).to_numpy()
    tss_position = tss["position"].to_numpy()
    likely[tss_chrom == genome.mitochondrion] = 0
    kept = Peaks(*(np.empty(0, dtype=kind) for kind in (np.int64, np.int64, np.int64, float)))
    used = np.zeros(len(tss), dtype=bool)
    for _ in range(30):
        missing = spec.peaks - len(kept.chrom)
        if missing <= 0:
            break
        n_tss = rng.binomial(missing, _TSS_SHARE)
        gene = rng.choice(len(tss), n_tss, p=likely / likely.sum())
        first = np.zeros(n_tss, dtype=bool)
        first[np.unique(gene, return_index=True)[1]] = True
        first &= ~used[gene]
        used[gene] = True
        offset = np.where(first, rng.normal(0, 60, n_tss), rng.laplace(0, 1_800, n_tss))
        anywhere = rng.choice(len(genome.names), missing - n_tss, p=genome.nuclear_share())
        chrom = np.concatenate([tss_chrom[gene], anywhere])
        centre = np.concatenate(
            [tss_position[gene] + offset, rng.random(len(anywhere)) * genome.sizes[anywhere]]
        )
        weight = rng.lognormal(0, 1.0, missing)
        weight[:n_tss][first] *= _ON_TSS_WEIGHT
        width = np.clip(500 * rng.lognormal(0, 0.25, missing), 150, 2_500)
        kept = _without_overlaps(kept, chrom, centre, width, weight, genome)
    return kept


def _without_overlaps(
    kept: Peaks,
    chrom: np.ndarray,
    centre: np.ndarray,
    width: np.ndarray,
    weight: np.ndarray,
    genome: Genome,
) -> Peaks:
    start = np.clip(centre - width / 2, 0, genome.sizes[chrom] - 3_000).astype(np.int64)
    new = Peaks(chrom, start, start + width.astype(np.int64), weight)
    both = Peaks(*(np.concatenate(columns) for columns in zip(kept, new, strict=True)))
    old = np.arange(len(both.chrom)) < len(kept.chrom)
    order = np.lexsort((both.start, both.chrom))
    both = Peaks(*(column[order] for column in both))
    keep = _keep_apart(both.chrom, both.start, both.end, old[order])
    return Peaks(*(column[keep] for column in both))


@numba.njit(cache=True)
def _keep_apart(chrom: np.ndarray, start: np.ndarray, end: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Which intervals to keep: old ones always, new ones where they touch neither the last kept nor the next old."""
    keep = old.copy()
    last = -1
    for here in range(len(start)):
        if not old[here]:
            free = last < 0 or chrom[last] != chrom[here] or end[last] <= start[here]
            ahead = here + 1
            while free and ahead < len(start) and chrom[ahead] == chrom[here] and start[ahead] < end[here]:
                free = not old[ahead]
                ahead += 1
            keep[here] = free
        if keep[here]:
            last = here
    return keep


def _by_coordinate(genome: Genome, peaks: Peaks, depth: np.ndarray, spec: Spec) -> Iterator[Fragments]:
    """Chromosome by chromosome, and these in pieces, so that memory does not grow with the lines."""
    rng = np.random.default_rng([spec.seed, 1])
    weight = np.bincount(peaks.chrom, peaks.weight, len(genome.names))
    inside = spec.in_peaks * weight / weight.sum() if len(peaks.chrom) else np.zeros(len(genome.names))
    outside = (1 - inside.sum() - spec.in_mitochondrion) * genome.nuclear_share()
    outside[genome.mitochondrion] = spec.in_mitochondrion
    n = rng.multinomial(spec.lines, np.concatenate([inside, outside])).reshape(2, -1)
    for chrom, size in enumerate(genome.sizes.tolist()):
        own = peaks.chrom == chrom
        mine = Peaks(*(column[own] for column in peaks))
        middle = np.concatenate(
            [_in_peaks(rng, mine, n[0, chrom]), (rng.random(n[1, chrom]) * size).astype(np.int32)]
        )
        middle.sort()
        edge = 0
        carried = Fragments(*(np.empty(0, dtype=kind) for kind in (np.uint8, "i4", "i4", "i4", np.uint8)))
        for begin in range(0, len(middle), _PIECE_LINES):
            piece = _fragments(rng, chrom, middle[begin : begin + _PIECE_LINES], size, depth)
            piece = _sorted(Fragments(*(np.concatenate(two) for two in zip(carried, piece, strict=True))))
            # What begins left of the next piece's leftmost possible start can be written.
            edge = len(piece.start)
            if begin + _PIECE_LINES < len(middle):
                edge = int(np.searchsorted(piece.start, middle[begin + _PIECE_LINES] - 1_000))
            yield Fragments(*(column[:edge] for column in piece))
            carried = Fragments(*(column[edge:] for column in piece))


def _in_peaks(rng: np.random.Generator, peaks: Peaks, n: int) -> np.ndarray:
    if n == 0:
        return np.empty(0, dtype=np.int32)
    running = np.cumsum(peaks.weight)
    peak = np.searchsorted(running, rng.random(n) * running[-1], side="right")
    place = np.clip(rng.normal(0.5, 0.2, n), 0, 1)
    return (peaks.start[peak] + place * (peaks.end - peaks.start)[peak]).astype(np.int32)


def _fragments(
    rng: np.random.Generator, chrom: int, middle: np.ndarray, size: int, depth: np.ndarray
) -> Fragments:
    n = len(middle)
    share, mean, spread = (np.array(column) for column in zip(*_LENGTHS, strict=True))
    kind = np.searchsorted(np.cumsum(share), rng.random(n, dtype=np.float32), side="right").clip(0, 3)
    noise = rng.standard_normal(n, dtype=np.float32)
    length = np.clip(mean[kind] + spread[kind] * noise, 20, 1_000).astype(np.int32)
    start = np.clip(middle - length // 2, 0, size - length).astype(np.int32)
    barcode = np.searchsorted(depth, rng.random(n)).clip(0, len(depth) - 1).astype(np.int32)
    count = np.minimum(rng.geometric(0.6, n), 200).astype(np.uint8)
    return Fragments(np.full(n, chrom, dtype=np.uint8), start, length, barcode, count)


def _sorted(piece: Fragments) -> Fragments:
    key = (piece.start.astype(np.int64) << 32) | np.arange(len(piece.start))
    key.sort()
    order = key & 0xFFFFFFFF
    return Fragments(*(column[order] for column in piece))


def _reordered(
    pieces: Iterator[Fragments], depth: np.ndarray, spec: Spec, folder: Path
) -> Iterator[Fragments]:
    """By barcode or shuffled, through buckets on disk: a bucket is a run of barcodes, or a random part."""
    rng = np.random.default_rng([spec.seed, 2])
    n_buckets = spec.lines // _BUCKET_LINES + 1
    by_barcode = spec.order == "barcode"
    kind = np.dtype([("chrom", "u1"), ("start", "i4"), ("length", "i4"), ("barcode", "i4"), ("count", "u1")])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        paths = [Path(scratch) / str(bucket) for bucket in range(n_buckets)]
        files = [path.open("wb") for path in paths]
        for piece in pieces:
            share = depth[piece.barcode] if by_barcode else rng.random(len(piece.start))
            bucket = np.minimum((share * n_buckets).astype(np.int64), n_buckets - 1)
            records = np.rec.fromarrays(piece, dtype=kind)
            for number in np.unique(bucket):
                files[number].write(records[bucket == number].tobytes())
        for file in files:
            file.close()
        for path in paths:
            records = np.fromfile(path, dtype=kind)
            order = (
                np.argsort(records["barcode"], kind="stable") if by_barcode else rng.permutation(len(records))
            )
            yield Fragments(*(records[name][order] for name in Fragments._fields))


def add_options(parser: argparse.ArgumentParser) -> None:
    choices = {"order": ORDERS, "compression": tuple(EXTENSION), "assembly": ("hg38", "hg19", "mm10", "mm9")}
    for field in fields(Spec):
        kind = type(field.default)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=(lambda text: int(float(text))) if kind is int else kind,
            choices=choices.get(field.name),
            help=f"default {field.default}",
        )
    parser.add_argument("--quick", action="store_true", help="50,000 lines, 100 cells, 2,000 peaks")


def spec_of(options: argparse.Namespace) -> Spec:
    given = {field.name: getattr(options, field.name) for field in fields(Spec)}
    base = Spec.quick() if options.quick else Spec()
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=2, help="that compress; default 2")
    add_options(parser)
    options = parser.parse_args()
    for path in make(options.out, spec_of(options), options.threads):
        print(path)


if __name__ == "__main__":
    main()
