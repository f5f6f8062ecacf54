"""What broke others: whole conversions of fragments in other orders, splits, forms and amounts."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from compressed_files import FORMS, bgzf
from matrix_files import BARCODES, PEAKS
from stores import FRAGMENTS, Convert, digests, islands_of, write_barcodes, write_lines, write_peaks

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store.info import describe
from annatac_scale.store.store import IslandStore

ORDERS = {
    "coordinate": sorted(FRAGMENTS),
    "barcode": sorted(FRAGMENTS, key=lambda row: row[3]),
    "random": random.Random(0).sample(FRAGMENTS, len(FRAGMENTS)),
}


@pytest.fixture
def expected(tmp_path: Path, toy_convert: Convert) -> dict[str, str]:
    """Digest of the fragments as they are, converted in one piece by one worker."""
    write_lines(tmp_path / "s.tsv", FRAGMENTS)
    toy_convert(tmp_path / "s.tsv", "expected.zarr", min_fragments=5)
    return digests(tmp_path / "expected.zarr")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_any_order_in_any_form_gives_the_same_store(
    tmp_path: Path, toy_convert: Convert, expected: dict[str, str], order: str, form: str
) -> None:
    """Cases 2, 12 and 13."""
    path = tmp_path / "other.gz"
    path.write_bytes(FORMS[form](write_lines(tmp_path / "text", ORDERS[order]).read_bytes()))
    (tmp_path / "other.gz.tbi").write_bytes(b"a stale index")
    for workers in (1, 8):
        toy_convert(path, f"{workers}.zarr", sample=["s"], min_fragments=5, workers=workers)
        assert digests(tmp_path / f"{workers}.zarr") == expected


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("range_bytes", [97, 3000, 1 << 16])
def test_any_split_among_any_workers_gives_the_same_store(
    tmp_path: Path, toy_convert: Convert, expected: dict[str, str], range_bytes: int, workers: int
) -> None:
    text = (tmp_path / "s.tsv").read_bytes()
    n = 300 if range_bytes < 100 else len(FRAGMENTS)  # tiny ranges are many
    lines = b"".join(text.splitlines(keepends=True)[:n])
    for form in ("plain", "bgzf"):
        path = tmp_path / f"{form}.gz"
        path.write_bytes(FORMS[form](lines))
        options = {"sample": ["s"], "min_fragments": 5, "workers": workers}
        toy_convert(path, f"{form}.zarr", range_bytes=range_bytes, **options)
        toy_convert(path, f"{form}.whole.zarr", **options)
        assert digests(tmp_path / f"{form}.zarr") == digests(tmp_path / f"{form}.whole.zarr")
        assert n < len(FRAGMENTS) or digests(tmp_path / f"{form}.zarr") == expected


def test_the_same_name_or_path_twice_is_refused_before_work(tmp_path: Path, toy_convert: Convert) -> None:
    """Case 6."""
    (tmp_path / "b").mkdir()
    one, other = (write_lines(tmp_path / name, FRAGMENTS) for name in ("a.tsv", "b/a.tsv"))
    (tmp_path / "link.tsv").symlink_to(one)
    sheet = write_lines(tmp_path / "sheet.tsv", [("path",), ("a.tsv",), ("b/../a.tsv",)])
    for arguments in (
        {"inputs": [one, other]},
        {"inputs": [one, one]},
        {"inputs": [one, tmp_path / "link.tsv"]},
        {"inputs": [one, other], "sample": ["x", "x"]},
        {"inputs": [], "sheet": sheet},
    ):
        with pytest.raises(InputError, match=r"found the (name twice|same file)"):
            toy_convert(**arguments, min_fragments=0)
    assert not (tmp_path / "atlas.zarr").exists()


@pytest.mark.parametrize("qc", [True, False])
def test_every_listed_barcode_keeps_a_row_and_what_is_dropped_is_counted(
    tmp_path: Path, toy_convert: Convert, said: Any, qc: bool
) -> None:
    """Case 8."""
    listed = ["nobody", *BARCODES[20:2:-1], "no-one"]
    write_lines(tmp_path / "s.tsv", FRAGMENTS)
    toy_convert(
        tmp_path / "s.tsv", barcodes=write_barcodes(tmp_path / "cells.txt", listed), qc=qc, progress=said
    )
    sample = IslandStore.open(tmp_path / "atlas.zarr").samples["s"]
    obs = sample.obs()
    assert list(obs.index) == listed
    assert obs.loc[["nobody", "no-one"], "n_open"].tolist() == [0, 0]
    lines = sample.conversion["lines"]
    n_listed = sum(row[3] in listed for row in FRAGMENTS)
    assert (lines["counted"], lines["not_a_cell"]) == (n_listed, len(FRAGMENTS) - n_listed)
    assert lines["lines"] == sum(n for name, n in lines.items() if name != "lines")
    assert sample.conversion["cells"] == {"cells": len(listed), "without_counts": 2}
    assert f"s: {len(listed)} cells; 3,000 lines: {n_listed:,} counted" in said
    assert "s: 2 listed barcodes have no fragment" in said


def test_totals_do_not_depend_on_islands_and_the_counting_is_recorded(
    tmp_path: Path, toy_convert: Convert
) -> None:
    """Case 10."""
    path, peaks = write_lines(tmp_path / "s.tsv", FRAGMENTS), write_peaks(tmp_path / "p.bed")
    windows = str(write_lines(tmp_path / "w.bed", [("chr1", 0, 33), ("chr1", 80, 99), ("chr2", 7, 4000)]))
    totals = {barcode: 2 * sum(row[3] == barcode for row in FRAGMENTS) for barcode in BARCODES}
    for i, options in enumerate(
        ({}, {"peaks": peaks}, {"select": windows}, {"counting": "paired-insertion"})
    ):
        toy_convert(path, f"{i}.zarr", min_fragments=0, **options)
        sample = IslandStore.open(tmp_path / f"{i}.zarr").samples["s"]
        assert sample.obs()["n_insertions"].to_dict() == totals
        assert sample.conversion["counting"] == options.get("counting", "insertion")
    other = write_lines(tmp_path / "t.tsv", FRAGMENTS[1:])
    with pytest.raises(StoreError, match="holds counting 'paired-insertion', but 'insertion' was asked for"):
        toy_convert(other, "3.zarr", min_fragments=0)


def test_peaks_where_nothing_lies_are_closed_and_told(
    tmp_path: Path, toy_convert: Convert, said: Any
) -> None:
    """Case 27."""
    peaks = [*PEAKS, ("chrM", 0, 100), ("chrM", 500, 600)]
    (tmp_path / "shuffled.sizes").write_text("chrM\t900\nchr2\t4200\nchr1\t10000\n")
    write_lines(tmp_path / "s.tsv", FRAGMENTS)
    for out, order, options in (
        ("a.zarr", peaks, {}),
        ("b.zarr", random.Random(2).sample(peaks, len(peaks)), {"chrom_sizes": tmp_path / "shuffled.sizes"}),
    ):
        bed = write_lines(tmp_path / f"{out}.bed", order)
        toy_convert(tmp_path / "s.tsv", out, peaks=bed, min_fragments=0, progress=said, **options)
    assert digests(tmp_path / "a.zarr") == digests(tmp_path / "b.zarr")
    store = IslandStore.open(tmp_path / "a.zarr")
    mitochondrial = store.space.chrom == store.space.chromosomes.index("chrM")
    assert store.samples["s"].measured[mitochondrial].all()
    assert "chrM" not in set(islands_of(tmp_path / "a.zarr")["chrom"])
    assert sum("s: no fragment lies on 'chrM', where" in line for line in said.lines) == 2


@pytest.mark.parametrize("workers", [1, 4])
def test_two_hundred_small_samples_are_all_there(tmp_path: Path, chrom_sizes: Path, workers: int) -> None:
    """Case 5, and few open files: a soft limit of 256 is usual."""
    n = 200 if workers > 1 else 70
    for i in range(n):
        write_lines(tmp_path / f"f{i}.tsv", FRAGMENTS[i : i + 90])
    sheet = write_lines(
        tmp_path / "sheet.tsv", [("sample", "path", "number"), *((f"s{i}", f"f{i}.tsv", i) for i in range(n))]
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import resource\n"
        "from annatac_scale.ingest.convert import convert\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        f"convert(sheet={str(sheet)!r}, assembly='toy', out={str(tmp_path / 'a.zarr')!r}, select='all',\n"
        f"        min_fragments=0, chrom_sizes={str(chrom_sizes)!r}, workers={workers})\n"
    )
    subprocess.run([sys.executable, script], timeout=200, check=True)
    store = IslandStore.open(tmp_path / "a.zarr")
    assert list(store.samples) == [f"s{i}" for i in range(n)]
    assert describe(store).unfinished == []
    obs = store.obs(["number", "n_fragments"])
    assert obs.groupby("number", observed=True)["n_fragments"].sum().tolist() == [90] * n


# ru_maxrss would begin with what the parent has.
MEASURED = """
import sys
from annatac_scale.ingest.convert import convert
convert(sys.argv[1], assembly="wide", chrom_sizes=sys.argv[2], out=sys.argv[3], select="all", min_fragments=0,
        range_bytes=1 << 20)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_is_flat_from_2_000_to_50_000_cells(tmp_path: Path) -> None:
    """Case 3. 50,000 cells x 20,000 islands would take 1 GB."""
    (tmp_path / "sizes").write_text("chr1\t100000000\n")
    n_lines = 300_000
    start = np.random.default_rng(0).integers(0, 99_000_000, n_lines)
    peak = {}
    for n_cells in (2000, 50_000):
        barcode = pd.Series(np.arange(n_lines) % n_cells).map("{:016d}-1".format)
        lines = pd.DataFrame({"chrom": "chr1", "start": start, "end": start + 100, "barcode": barcode})
        path = tmp_path / f"{n_cells}.gz"
        path.write_bytes(bgzf(lines.to_csv(sep="\t", header=False, index=False).encode(), 60_000))
        command = [sys.executable, "-c", MEASURED, path, tmp_path / "sizes", tmp_path / f"{n_cells}.zarr"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, timeout=120)
        peak[n_cells] = int(done.stdout) * 1024
        assert IslandStore.open(tmp_path / f"{n_cells}.zarr").n_cells == n_cells
    dictionary = 200 * (50_000 - 2000)  # as cells.choose_cells states
    assert peak[50_000] - dictionary < 1.1 * peak[2000]
    assert max(peak.values()) < 600e6
