"""Conversion from and into object storage, on a real S3 server over HTTP."""

from pathlib import Path
from typing import Any

import pytest
from compressed_files import bgzf
from matrix_files import BARCODES, PEAKS, names, some_anndata, some_counts, write_10x_h5, write_10x_mtx
from stores import FRAGMENTS, Convert, write_lines, write_peaks

import annatac_scale as ats
from annatac_scale.errors import InputError
from annatac_scale.ingest import graph
from annatac_scale.ingest.convert import convert
from annatac_scale.store.store import IslandStore


def test_sheet_inputs_and_store_in_a_bucket_give_the_digest_of_a_disk(
    tmp_path: Path, toy_convert: Convert, chrom_sizes: Path, s3: Any
) -> None:
    text = write_lines(tmp_path / "a.tsv", FRAGMENTS).read_bytes()
    peaks = write_peaks(tmp_path / "p.bed")
    bucket = s3.bucket()
    s3.put(f"{bucket}/in/a.tsv.gz", bgzf(text, 500))
    s3.put(f"{bucket}/in/b.tsv", text)
    s3.put(f"{bucket}/in/p.bed", peaks.read_bytes())
    s3.put(
        f"{bucket}/in/sheet.tsv", b"sample\tpath\tpeaks\tdonor\na\ta.tsv.gz\tp.bed\tD1\nb\tb.tsv\tp.bed\tD2\n"
    )
    options: dict[str, Any] = {"select": "all", "chrom_sizes": chrom_sizes, "min_fragments": 0}
    s3.failing = 3
    for _ in range(2):
        report = convert(
            sheet=f"{bucket}/in/sheet.tsv",
            assembly="toy",
            out=f"{bucket}/atlas.zarr",
            range_bytes=4000,
            workers=2,
            **options,
        )
    assert report.skipped == ["a", "b"]
    write_lines(
        tmp_path / "sheet.tsv",
        [("sample", "path", "peaks", "donor"), ("a", "a.tsv", "p.bed", "D1"), ("b", "b.tsv", "p.bed", "D2")],
    )
    (tmp_path / "b.tsv").write_bytes(text)
    toy_convert([], sheet=tmp_path / "sheet.tsv", min_fragments=0)
    there, here = IslandStore.open(f"{bucket}/atlas.zarr"), IslandStore.open(tmp_path / "atlas.zarr")
    assert there.digest == here.digest
    assert not [key for key in s3.keys(f"{bucket}/atlas.zarr") if ".incoming/a" in key]


def test_other_cells_than_a_stopped_run_chose_are_written_to_a_bucket(
    tmp_path: Path, toy_convert: Convert, chrom_sizes: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.bucket()
    more = [row for row in FRAGMENTS if row[3] in BARCODES[:7]]
    path = write_lines(tmp_path / "a.tsv", [*FRAGMENTS, *more])
    s3.put(f"{bucket}/a.tsv", path.read_bytes())
    options: dict[str, Any] = {"select": "all", "chrom_sizes": chrom_sizes, "range_bytes": 4000}

    def stop(*_: Any) -> None:
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(graph, "commit_fragments", stop)
        with pytest.raises(RuntimeError):
            convert(f"{bucket}/a.tsv", assembly="toy", out=f"{bucket}/s.zarr", min_fragments=1, **options)
    convert(f"{bucket}/a.tsv", assembly="toy", out=f"{bucket}/s.zarr", min_fragments=101, **options)
    toy_convert(path, min_fragments=101)
    there, here = IslandStore.open(f"{bucket}/s.zarr"), IslandStore.open(tmp_path / "atlas.zarr")
    assert here.n_cells == 7
    assert there.digest == here.digest


def test_matrices_in_a_bucket_give_the_digests_of_a_disk(
    tmp_path: Path, toy_convert: Convert, chrom_sizes: Path, s3: Any
) -> None:
    some_anndata().write_h5ad(tmp_path / "csr.h5ad", compression="gzip")
    some_anndata(some_counts().tocsc()).write_h5ad(tmp_path / "csc.h5ad")
    write_10x_h5(tmp_path / "tenx.h5", some_counts(), names(PEAKS))
    bed = ["\t".join(map(str, peak)) for peak in PEAKS]
    write_10x_mtx(tmp_path / "mtx", some_counts(), "peaks.bed", bed)
    bucket = s3.bucket()
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        s3.put(f"{bucket}/in/{file.relative_to(tmp_path)}", file.read_bytes())
    inputs = ("csr.h5ad", "csc.h5ad", "tenx.h5", "mtx")
    options: dict[str, Any] = {"select": "all", "chrom_sizes": chrom_sizes}
    convert(
        [f"{bucket}/in/{name}" for name in inputs],
        assembly="toy",
        out=f"{bucket}/s.zarr",
        workers=2,
        **options,
    )
    toy_convert([tmp_path / name for name in inputs])
    there, here = IslandStore.open(f"{bucket}/s.zarr"), IslandStore.open(tmp_path / "atlas.zarr")
    assert there.digest == here.digest
    kinds = {name: sample.conversion["kind"] for name, sample in there.samples.items()}
    assert kinds == {"csr": "h5ad", "csc": "h5ad", "tenx": "10x h5", "mtx": "10x mtx"}
    s3.put(f"{bucket}/in/torn.h5ad", (tmp_path / "csr.h5ad").read_bytes()[:3000])
    with pytest.raises(InputError, match=rf"{bucket}/in/torn\.h5ad: cannot be read as HDF5"):
        convert(f"{bucket}/in/torn.h5ad", assembly="toy", out=f"{bucket}/t.zarr", **options)


def test_labels_join_a_store_in_a_bucket(chrom_sizes: Path, s3: Any) -> None:
    bucket = s3.bucket()
    s3.put(f"{bucket}/a.tsv", b"".join(b"chr1\t%d\t%d\tA\n" % (i, i + 9) for i in range(50)))
    s3.put(f"{bucket}/labels.tsv", b"barcode\tcell_type\nA\tB cell\n")
    ats.convert(
        f"{bucket}/a.tsv", assembly="toy", out=f"{bucket}/s.zarr", select="all", chrom_sizes=chrom_sizes,
        min_fragments=0,
    )  # fmt: skip
    report = ats.convert(out=f"{bucket}/s.zarr", obs=f"{bucket}/labels.tsv")
    assert report.relabelled == ["a"]  # type: ignore[union-attr]
    assert IslandStore.open(f"{bucket}/s.zarr").obs(["cell_type"])["cell_type"].tolist() == ["B cell"]


def test_a_bad_line_and_a_missing_object_are_told_by_their_url(chrom_sizes: Path, s3: Any) -> None:
    bucket = s3.bucket()
    s3.put(f"{bucket}/bad.tsv", b"chr1\t1\t5\tA\nchr1\t9\t5\tA\n")
    options: dict[str, Any] = {"select": "all", "chrom_sizes": chrom_sizes, "min_fragments": 0}
    with pytest.raises(InputError, match=rf"{bucket}/bad\.tsv, line 2: found"):
        convert(f"{bucket}/bad.tsv", assembly="toy", out=f"{bucket}/s.zarr", **options)
    with pytest.raises(InputError, match=rf"{bucket}/none\.tsv"):
        convert(f"{bucket}/none.tsv", assembly="toy", out=f"{bucket}/s.zarr", **options)
    s3.put(f"{bucket}/p.bed", b"chr1\t9\t5\n")
    s3.put(f"{bucket}/good.tsv", b"chr1\t1\t5\tA\n")
    with pytest.raises(InputError, match=rf"{bucket}/p\.bed, line 1: found"):
        convert(
            f"{bucket}/good.tsv", assembly="toy", out=f"{bucket}/s.zarr", peaks=f"{bucket}/p.bed", **options
        )
