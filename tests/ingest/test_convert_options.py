"""Options of a conversion: those that do not go together, or do not apply."""

from pathlib import Path
from typing import Any

import pytest
from matrix_files import some_anndata
from stores import FRAGMENTS, Convert, digests, write_barcodes, write_lines, write_peaks

from annatac_scale.errors import InputError


def test_options_that_do_not_go_with_an_input_are_refused_before_work(
    tmp_path: Path, toy_convert: Convert
) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    write_lines(tmp_path / "f.tsv", FRAGMENTS)
    peaks = write_peaks(tmp_path / "p.bed")
    for inputs, options, message in [
        (["a.h5ad"], {"peaks": peaks}, "found a peak file for h5ad"),
        (["a.h5ad", "f.tsv"], {"layer": "counts"}, r"f\.tsv: found --layer or --use-raw for fragments"),
        (["a.h5ad"], {"layer": "counts", "use_raw": True}, "found both a layer and raw"),
        (
            ["f.tsv", "a.h5ad"],
            {"counting": "fragment"},
            r"a\.h5ad: found --counting fragment for h5ad, .* leave it",
        ),
        (["a.h5ad"], {"counting": "paired-insertion"}, "found --counting paired-insertion for h5ad"),
        (["f.tsv"], {"tss": "x", "gtf": "y"}, "both a TSS table and a GTF file"),
        (["f.tsv"], {"workers": 0}, "workers 0"),
        (["f.tsv"], {"select": "tss"}, "found no TSS table"),
        (["f.tsv"], {"chrom_sizes": None}, "assembly: found 'toy'"),
        (["f.tsv", "f.tsv"], {"sample": ["a", "b"]}, "the same file in samples a and b"),
    ]:
        with pytest.raises(InputError, match=message):
            toy_convert([tmp_path / name for name in inputs], **options)
    assert not any(path.suffix == ".zarr" for path in tmp_path.iterdir())
    with pytest.raises(TypeError, match="strategy"):
        toy_convert(tmp_path / "f.tsv", strategy="x")


def test_options_that_do_not_apply_are_told(tmp_path: Path, toy_convert: Convert, said: Any) -> None:
    some_anndata().write_h5ad(tmp_path / "cells.h5ad")
    write_lines(tmp_path / "f.tsv", FRAGMENTS)
    barcodes = write_barcodes(tmp_path / "cells.txt")
    inputs = [tmp_path / "cells.h5ad", tmp_path / "f.tsv"]
    toy_convert(inputs, "default.zarr", barcodes=barcodes, progress=said)
    assert "--min-fragments" not in said
    toy_convert(inputs, "listed.zarr", barcodes=barcodes, min_fragments=7, progress=said)
    assert [line for line in said.lines if "--min-fragments" in line] == [
        "cells: a peak matrix: --min-fragments does not apply",
        "f: --barcodes lists the cells: --min-fragments does not apply",
    ]
    assert digests(tmp_path / "default.zarr") == digests(tmp_path / "listed.zarr")
    said.lines.clear()
    toy_convert(tmp_path / "f.tsv", "found.zarr", min_fragments=7, progress=said)
    assert "--min-fragments" not in said
