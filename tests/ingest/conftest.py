"""A small genome, what is said while converting."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from told import Said

from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest.convert import ConvertReport, convert

TOY = Assembly("toy", ("chr1", "chr2", "chrM"), (10_000, 4_200, 900))


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
