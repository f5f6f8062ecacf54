"""A small genome, what is said while converting."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.progress import Advance

TOY = Assembly("toy", ("chr1", "chr2", "chrM"), (10_000, 4_200, 900))


class Said:
    """A Progress that keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done = 0

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        def advance(n: int) -> None:
            self.done += n

        yield advance

    def __contains__(self, part: str) -> bool:
        return any(part in line for line in self.lines)


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
