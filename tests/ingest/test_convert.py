"""Conversion of all kinds of input into a store, against scripts in pandas and against each other."""

import random
from importlib import resources
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from compressed_files import FORMS
from matrix_files import BARCODES, PEAKS, names, some_anndata, some_counts, write_10x_h5, write_10x_mtx
from scipy import sparse
from stores import (
    FRAGMENTS,
    Convert,
    digests,
    islands_of,
    shard_bytes,
    write_lines,
    write_peaks,
)

from annatac_scale.errors import InputError
from annatac_scale.genome.annotation import builtin_tss
from annatac_scale.ingest.convert import convert
from annatac_scale.store.store import IslandStore

BM0828 = Path(__file__).parent.parent / "data" / "bm0828_slice.h5ad"
CEREBELLUM = Path(str(resources.files("annatac_scale") / "data" / "cerebellum.h5ad"))
PBSMALL = Path(str(resources.files("annatac_scale") / "data" / "archr_PBSmall.tsv.gz"))


def pandas_script(path: Path, tss: pd.DataFrame | None) -> pd.DataFrame:
    """The islands of an h5ad by DESIGN.md's rule, in pandas alone."""
    data = anndata.read_h5ad(path)
    peaks = pd.DataFrame(
        [name.replace("-", ":").split(":") for name in data.var_names], columns=["chrom", "start", "end"]
    )
    peaks["bin"] = peaks["start"].astype(int) // 5000
    if tss is not None:
        coding = tss[tss["type"] == "protein_coding"] if (tss["type"] == "protein_coding").any() else tss
        kept = set(zip(coding["chrom"], coding["position"] // 5000, strict=True))
        peaks = peaks[[key in kept for key in zip(peaks["chrom"], peaks["bin"], strict=True)]]
    peaks = peaks.assign(n=peaks.groupby(["chrom", "bin"])["start"].transform("size"))
    matrix = sparse.csr_matrix((data.X.data, data.X.indices.astype(int), data.X.indptr), data.shape).tocoo()
    cells = pd.DataFrame(
        {"barcode": data.obs_names[matrix.row], "peak": matrix.col, "count": matrix.data.astype(int)}
    )
    cells = cells.merge(peaks, left_on="peak", right_index=True)
    sums = cells.groupby(["barcode", "chrom", "bin"], as_index=False).agg({"count": "sum", "n": "first"})
    sums = sums[sums["count"] > 0]
    sums["level"] = ((sums["count"] + sums["n"] - 1) // sums["n"]).clip(upper=5)
    return sums.sort_values(["barcode", "chrom", "bin"], ignore_index=True)[
        ["barcode", "chrom", "bin", "level"]
    ]


@pytest.mark.parametrize("select", ["tss", "all"])
def test_bm0828_has_the_islands_of_a_pandas_script(tmp_path: Path, select: str) -> None:
    convert(BM0828, assembly="hg19", out=tmp_path / "atlas.zarr", select=select)
    expected = pandas_script(BM0828, builtin_tss("hg19") if select == "tss" else None)
    assert expected["level"].value_counts().min() > 10
    pd.testing.assert_frame_equal(islands_of(tmp_path / "atlas.zarr"), expected, check_dtype=False)


@pytest.mark.parametrize("select", ["tss", "all"])
def test_cerebellum_has_the_islands_of_a_pandas_script(tmp_path: Path, select: str) -> None:
    report = convert(CEREBELLUM, assembly="mm9", out=tmp_path / "atlas.zarr", select=select)
    expected = pandas_script(CEREBELLUM, builtin_tss("mm9") if select == "tss" else None)
    pd.testing.assert_frame_equal(islands_of(tmp_path / "atlas.zarr"), expected, check_dtype=False)
    sample = IslandStore.open(tmp_path / "atlas.zarr").samples["cerebellum"]
    assert list(report.converted) == ["cerebellum"]
    assert sample.obs()["cell_type"].value_counts().to_dict() == {
        "Astrocytes": 363, "Inhibitory neurons": 281, "Oligodendrocytes": 128, "Microglia": 29
    }  # fmt: skip
    assert sample.measured.sum() == sample.conversion["peaks"]["measured_islands"]


def test_fragments_of_pbsmall_have_the_bins_of_a_pandas_script(tmp_path: Path) -> None:
    convert(str(PBSMALL), assembly="hg19", out=str(tmp_path / "a.zarr"), select="all", min_fragments=0)
    lines = pd.read_csv(
        PBSMALL, sep="\t", header=None, usecols=range(4), names=["chrom", "start", "end", "barcode"]
    )
    ends = pd.concat([lines.assign(bin=lines["start"] // 5000), lines.assign(bin=(lines["end"] - 1) // 5000)])
    expected = ends.groupby(["barcode", "chrom", "bin"]).size().clip(upper=5).rename("level").reset_index()
    pd.testing.assert_frame_equal(islands_of(tmp_path / "a.zarr"), expected, check_dtype=False)
    obs = IslandStore.open(tmp_path / "a.zarr").samples["archr_PBSmall"].obs()
    assert obs["n_fragments"].to_dict() == lines["barcode"].value_counts().to_dict()
    assert list(obs.index) == sorted(obs.index)


def test_h5ad_h5_and_mtx_of_the_same_cells_give_the_same_bytes(tmp_path: Path, toy_convert: Convert) -> None:
    some_anndata(some_counts().astype(np.float32)).write_h5ad(tmp_path / "a.h5ad")
    some_anndata(some_counts().tocsc()).write_h5ad(tmp_path / "b.h5ad")
    write_10x_h5(tmp_path / "c.h5", some_counts(), names(PEAKS))
    write_10x_mtx(tmp_path / "d", some_counts(), "peaks.bed", ["\t".join(map(str, peak)) for peak in PEAKS])
    toy_convert([tmp_path / name for name in ("a.h5ad", "b.h5ad", "c.h5", "d")])
    store = tmp_path / "atlas.zarr"
    expected = shard_bytes(store, "a")
    assert any(name.startswith("c/") for name in expected)
    assert all(shard_bytes(store, sample) == expected for sample in "bcd")
    kinds = {name: sample.conversion["kind"] for name, sample in IslandStore.open(store).samples.items()}
    assert kinds == {"a": "h5ad", "b": "h5ad", "c": "10x h5", "d": "10x mtx"}


def test_fragments_equal_the_matrix_of_their_cut_sites(tmp_path: Path, toy_convert: Convert) -> None:
    """Case 23."""
    cut_sites = np.zeros((30, len(PEAKS)), int)
    for chrom, start, end, barcode in FRAGMENTS:
        for j, (name, left, right) in enumerate(PEAKS):
            inside = (left <= start < right) + (left <= end - 1 < right)
            cut_sites[BARCODES.index(barcode), j] += inside if name == chrom else 0
    write_10x_h5(tmp_path / "h5.h5", sparse.csr_matrix(cut_sites), names(PEAKS))
    write_lines(tmp_path / "frags.tsv", FRAGMENTS)
    write_lines(tmp_path / "cells.txt", [(barcode,) for barcode in BARCODES])
    toy_convert(
        tmp_path / "frags.tsv", peaks=write_peaks(tmp_path / "p.bed"), barcodes=tmp_path / "cells.txt"
    )
    toy_convert(tmp_path / "h5.h5")
    store = IslandStore.open(tmp_path / "atlas.zarr")
    assert shard_bytes(tmp_path / "atlas.zarr", "frags") == shard_bytes(tmp_path / "atlas.zarr", "h5")
    frags, h5 = store.samples["frags"], store.samples["h5"]
    assert (frags.measured == h5.measured).all()
    assert h5.obs()["n_counts"].tolist() == cut_sites.sum(axis=1).tolist()
    assert frags.obs()["n_insertions"].tolist() == [2 * sum(f[3] == b for f in FRAGMENTS) for b in BARCODES]
    assert frags.obs()["n_open"].tolist() == h5.obs()["n_open"].tolist()


def test_order_compression_peak_order_and_workers_give_equal_digests(
    tmp_path: Path, toy_convert: Convert
) -> None:
    peaks = write_peaks(tmp_path / "p.bed")
    write_lines(tmp_path / "q.bed", random.Random(1).sample(PEAKS, len(PEAKS)))
    (tmp_path / "sizes.txt").write_text("chrM\t900\nchr2\t4200\nchr1\t10000\n")
    text = write_lines(tmp_path / "plain.tsv", FRAGMENTS).read_bytes()
    toy_convert(tmp_path / "plain.tsv", "plain.zarr", sample=["s"], peaks=peaks, min_fragments=0)
    expected = digests(tmp_path / "plain.zarr")
    write_lines(tmp_path / "shuffled.tsv", random.Random(0).sample(FRAGMENTS, len(FRAGMENTS)))
    (tmp_path / "shuffled.tsv.tbi").write_bytes(b"a stale index")
    for form, pack in FORMS.items():
        (tmp_path / f"{form}.gz").write_bytes(pack(text))
    for name in ["shuffled.tsv", *(f"{form}.gz" for form in FORMS)]:
        toy_convert(tmp_path / name, f"{name}.zarr", sample=["s"], peaks=tmp_path / "q.bed", min_fragments=0,
                    workers=2, chrom_sizes=tmp_path / "sizes.txt")  # fmt: skip
        assert digests(tmp_path / f"{name}.zarr") == expected


def test_samples_of_many_shards_are_the_same_for_any_workers(tmp_path: Path, toy_convert: Convert) -> None:
    matrix = some_counts(9001, 33, seed=4)
    obs = pd.DataFrame(index=[f"c{i}" for i in range(9001)])
    anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=names(PEAKS))).write_h5ad(tmp_path / "big.h5ad")
    for workers in (1, 3):
        toy_convert(tmp_path / "big.h5ad", f"{workers}.zarr", workers=workers)
    assert digests(tmp_path / "1.zarr") == digests(tmp_path / "3.zarr")
    found = IslandStore.open(tmp_path / "3.zarr").samples["big"].obs()
    assert found["n_counts"].tolist() == np.asarray(matrix.sum(axis=1)).ravel().tolist()
    assert len(shard_bytes(tmp_path / "3.zarr", "big")) == 1 + 3


def test_a_listed_barcode_that_a_matrix_lacks_is_an_all_closed_row(
    tmp_path: Path, toy_convert: Convert, said: Any
) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    listed = ["AAAC009-1", "none", "AAAC002-1"]
    write_lines(tmp_path / "cells.txt", [(barcode,) for barcode in listed])
    toy_convert(tmp_path / "a.h5ad", "all.zarr")
    toy_convert(tmp_path / "a.h5ad", barcodes=tmp_path / "cells.txt", progress=said)
    sample = IslandStore.open(tmp_path / "atlas.zarr").samples["a"]
    obs = sample.obs()
    assert list(obs.index) == listed
    assert obs["n_open"].tolist()[1] == 0
    assert [value if isinstance(value, str) else None for value in obs["cell_type"]] == ["B", None, "NK"]
    assert sample.conversion["cells"] == {"cells": 3, "not_listed": 28, "not_in_file": 1}
    assert "28 cells are not listed and left out; 1 listed barcodes are not in the file" in said
    everything = islands_of(tmp_path / "all.zarr")
    expected = everything[everything["barcode"].isin(listed)].reset_index(drop=True)
    pd.testing.assert_frame_equal(islands_of(tmp_path / "atlas.zarr"), expected)
    write_lines(tmp_path / "cells.txt", [("X",)])
    with pytest.raises(InputError, match=r"cells\.txt: found barcodes such as 'X' and none of .*a\.h5ad"):
        toy_convert(tmp_path / "a.h5ad", "other.zarr", barcodes=tmp_path / "cells.txt")


def test_a_tss_table_or_a_gtf_select_the_same_islands(tmp_path: Path, toy_convert: Convert) -> None:
    write_lines(tmp_path / "f.tsv", FRAGMENTS)
    tss = write_lines(
        tmp_path / "t.tsv", [("chr1", 6200, "+", "G1", "protein_coding"), ("chr2", 10, "+", "G2", "lncRNA")]
    )
    gtf = tmp_path / "g.gtf"
    gtf.write_text('chr1\tx\tgene\t6201\t7000\t.\t+\t.\tgene_id "G1"; gene_type "protein_coding";\n'
                   'chr2\tx\tgene\t11\t50\t.\t+\t.\tgene_id "G2"; gene_type "lncRNA";\n')  # fmt: skip
    for out, options in {"t.zarr": {"tss": tss}, "g.zarr": {"gtf": gtf}}.items():
        toy_convert(tmp_path / "f.tsv", out, select="tss", min_fragments=0, **options)
    assert IslandStore.open(tmp_path / "t.zarr").space.names() == ["chr1:5000-10000"]
    assert digests(tmp_path / "t.zarr") == digests(tmp_path / "g.zarr")


def test_what_became_of_contigs_and_peaks_is_said_and_recorded(
    tmp_path: Path, toy_convert: Convert, said: Any
) -> None:
    write_lines(tmp_path / "f.tsv", [("1", 5, 90, "A"), ("1", 5000, 5001, "A"), ("weird", 1, 2, "A")])
    peaks = write_lines(
        tmp_path / "p.bed", [("chr1", 0, 100), ("1", 50, 60), ("chrM", 0, 5), ("other", 1, 2)]
    )
    toy_convert(tmp_path / "f.tsv", peaks=peaks, min_fragments=0, progress=said)
    for part in (
        "f: contigs read as the assembly's: 1 as chr1",
        "f: 1 contigs are not in toy: 'weird'",
        "f: 4 peaks: 3 in 2 islands, 0 outside islands, 1 on other contigs",
        "f: no fragment lies on 'chrM', where",
        "3 lines: 1 counted, 1 outside islands, 0 of no cell, 1 on other contigs, 0 comments",
    ):
        assert part in said
    size = (tmp_path / "f.tsv").stat().st_size
    assert (said.samples, said.done, said.found, said.n_lines) == ({"f": size}, size, 0, 3)
    assert said.finished == ["f"]
    sample = IslandStore.open(tmp_path / "atlas.zarr").samples["f"]
    record = sample.conversion
    assert record["lines"]["counted"] == 1
    assert record["peaks"]["other_contig"] == 1
    assert record["contigs"]["renamed"] == {"1": "chr1"}
    assert {entry["role"] for entry in record["inputs"]} == {"data", "peaks"}
    assert all(len(entry["sha256"]) == 64 and entry["size"] > 0 for entry in record["inputs"])
    assert record["options"] == {"qc": True, "min_fragments": 0, "min_tsse": 0.0}
    assert np.flatnonzero(sample.measured).tolist() == [0, 3]


def test_another_assembly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"peaks \([0-9.]+%\) that pass the end of their chromosome"):
        convert(CEREBELLUM, assembly="hg38", out=tmp_path / "a.zarr")
    assert not any(tmp_path.iterdir())
