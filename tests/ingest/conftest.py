"""A small genome, what is said while converting."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest.convert import ConvertReport, convert
from annatac_scale.progress import Advance

TOY = Assembly("toy", ("chr1", "chr2", "chrM"), (10_000, 4_200, 900))


class Said:
    """A Progress that keeps the lines, and what it was told of the work of each sample."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done = 0
        self.found = 0
        self.n_lines = 0
        self.samples: dict[str, int] = {}
        self.finished: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def task(
        self, name: str, total: int | None, unit: str, samples: Mapping[str, int] | None = None
    ) -> Iterator[Advance]:
        self.samples = dict(samples or {})
        assert sum(self.samples.values()) == total
        yield _Told(self)

    def __contains__(self, part: str) -> bool:
        return any(part in line for line in self.lines)


class _Told(Advance):
    def __init__(self, said: Said) -> None:
        self.said = said
        self.lock = threading.Lock()

    def __call__(self, n: int, lines: int = 0, sample: str = "") -> None:
        with self.lock:
            self.said.done += n
            self.said.n_lines += lines

    def found(self, n: int, sample: str = "") -> None:
        with self.lock:
            self.said.found += n

    def finished(self, sample: str) -> None:
        self.said.finished.append(sample)


@pytest.fixture
def toy() -> Assembly:
    return TOY


@pytest.fixture
def bins() -> IslandSpace:
    """All bins of 1,000 bp."""
    return IslandSpace.all(TOY, width_bp=1000)


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def chrom_sizes(tmp_path: Path) -> Path:
    path = tmp_path / "toy.chrom.sizes"
    path.write_text(
        "".join(f"{name}\t{size}\n" for name, size in zip(TOY.chromosomes, TOY.sizes, strict=True))
    )
    return path


@pytest.fixture
def toy_convert(tmp_path: Path, chrom_sizes: Path) -> Callable[..., ConvertReport]:
    """convert() into tmp_path / out over all bins of the toy genome."""

    def run(inputs: Any, out: str = "atlas.zarr", **options: Any) -> ConvertReport:
        options = {"select": "all", "chrom_sizes": chrom_sizes} | options
        return convert(inputs, assembly="toy", out=tmp_path / out, **options)

    return run
