"""Conversion of all kinds of input into a store, against scripts in pandas and against each other."""

import gzip
import random
import subprocess
import sys
from collections.abc import Callable
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

from annatac_scale.errors import InputError, StoreError
from annatac_scale.genome.annotation import builtin_tss
from annatac_scale.ingest import samples
from annatac_scale.ingest.convert import ConvertReport, convert
from annatac_scale.ingest.labels import join_obs
from annatac_scale.store.store import IslandStore, remove_empty
from annatac_scale.store.writer import SampleWriter, create_store

Convert = Callable[..., ConvertReport]

BM0828 = Path(__file__).parent.parent / "data" / "bm0828_slice.h5ad"
CEREBELLUM = Path(str(resources.files("annatac_scale") / "data" / "cerebellum.h5ad"))
PBSMALL = Path(str(resources.files("annatac_scale") / "data" / "archr_PBSmall.tsv.gz"))


@pytest.fixture
def toy_convert(tmp_path: Path, chrom_sizes: Path) -> Convert:
    """convert() into tmp_path / out over all bins of the toy genome."""

    def run(inputs: Any, out: str = "atlas.zarr", **options: Any) -> ConvertReport:
        options = {"select": "all", "chrom_sizes": chrom_sizes} | options
        return convert(inputs, assembly="toy", out=tmp_path / out, **options)

    return run


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


def shard_bytes(store: Path, sample: str) -> dict[str, bytes]:
    folder = store / "samples" / sample / "X"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def digests(store: Path) -> dict[str, str]:
    return {name: sample.digest for name, sample in IslandStore.open(store).samples.items()}


def write_lines(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


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


FRAGMENTS = [
    (chrom, start, start + 20 + i % 180, BARCODES[i * 7 % 30])
    for i in range(3000)
    for chrom, start in [("chr1", i * 131 % 9700) if i % 3 else ("chr2", i * 57 % 3900)]
]


def write_peaks(path: Path) -> Path:
    return write_lines(path, PEAKS)


def test_fragments_equal_the_matrix_of_their_cut_sites(tmp_path: Path, toy_convert: Convert) -> None:
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


def test_two_samples_that_share_barcodes_keep_all_rows_in_input_order(
    tmp_path: Path, toy_convert: Convert
) -> None:
    for name in ("zz", "aa", "mm"):
        write_lines(tmp_path / f"{name}.tsv", FRAGMENTS)
    some_anndata().write_h5ad(tmp_path / "h.h5ad")
    report = toy_convert(
        [tmp_path / f for f in ("zz.tsv", "h.h5ad", "aa.tsv", "mm.tsv")], workers=3, min_fragments=0
    )
    store = IslandStore.open(tmp_path / "atlas.zarr")
    assert list(store.samples) == list(report.converted) == ["zz", "h", "aa", "mm"]
    assert store.n_cells == 4 * 30


def test_a_second_sample_leaves_the_bytes_of_the_first_untouched(
    tmp_path: Path, toy_convert: Convert
) -> None:
    write_lines(tmp_path / "a.tsv", FRAGMENTS)
    write_lines(tmp_path / "b.tsv", FRAGMENTS[::2])
    toy_convert(tmp_path / "a.tsv", min_fragments=0)
    before = all_bytes(tmp_path / "atlas.zarr" / "samples" / "a")
    toy_convert(tmp_path / "b.tsv", min_fragments=0)
    assert all_bytes(tmp_path / "atlas.zarr" / "samples" / "a") == before


def test_what_is_there_already_is_skipped(tmp_path: Path, toy_convert: Convert, said: Any) -> None:
    a, b = write_lines(tmp_path / "a.tsv", FRAGMENTS), write_lines(tmp_path / "b.tsv", FRAGMENTS[::2])
    toy_convert(a, min_fragments=0)
    before = digests(tmp_path / "atlas.zarr")
    moved = a.rename(tmp_path / "moved.tsv")
    report = toy_convert([moved, b], sample=["a", "b"], min_fragments=0, progress=said)
    assert (report.skipped, list(report.converted)) == (["a"], ["b"])
    assert digests(tmp_path / "atlas.zarr")["a"] == before["a"]
    assert "a: is in" in said


def test_a_sample_made_otherwise_is_refused_with_the_difference(tmp_path: Path, toy_convert: Convert) -> None:
    a, peaks = write_lines(tmp_path / "a.tsv", FRAGMENTS), write_peaks(tmp_path / "p.bed")
    toy_convert(a, min_fragments=0, peaks=peaks)
    for options, message in [
        ({"min_fragments": 5, "peaks": peaks}, "min_fragments = 0, now 5"),
        ({"min_fragments": 0}, "it was made with a file for peaks"),
        (
            {"min_fragments": 0, "peaks": write_lines(tmp_path / "q.bed", PEAKS[1:])},
            r"q\.bed \(peaks\) has other content",
        ),
    ]:
        with pytest.raises(StoreError, match=f"sample 'a' is there already, but .*{message}"):
            toy_convert(a, **options)
    write_lines(a, FRAGMENTS[1:])
    with pytest.raises(StoreError, match=r"a\.tsv \(data\) has other content"):
        toy_convert(a, min_fragments=0, peaks=peaks)
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(StoreError, match="it was made from fragments, now h5ad"):
        toy_convert(tmp_path / "a.h5ad")


def test_stores_of_other_counting_or_islands_are_not_mixed(tmp_path: Path, toy_convert: Convert) -> None:
    a, b = write_lines(tmp_path / "a.tsv", FRAGMENTS), write_lines(tmp_path / "b.tsv", FRAGMENTS[1:])
    toy_convert(a, min_fragments=0, counting="fragment")
    assert IslandStore.open(tmp_path / "atlas.zarr").counting == "fragment"
    with pytest.raises(StoreError, match="counting"):
        toy_convert(b, min_fragments=0)
    with pytest.raises(StoreError, match=r"width_bp|islands_sha256"):
        toy_convert(
            b, min_fragments=0, counting="fragment", select=str(write_lines(tmp_path / "w.bed", PEAKS[::2]))
        )
    with pytest.raises(InputError, match="counting: found 'cuts'; expected one of insertion"):
        toy_convert(b, counting="cuts")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_bad_input_stops_and_leaves_only_whole_samples(
    tmp_path: Path, toy_convert: Convert, workers: int
) -> None:
    write_lines(tmp_path / "a.tsv", FRAGMENTS)
    write_lines(tmp_path / "b.tsv", [*FRAGMENTS, ("chr1", 5, 4, "A")])
    some_anndata().write_h5ad(tmp_path / "c.h5ad")
    with pytest.raises(InputError, match=r"b\.tsv, line 3001"):
        toy_convert([tmp_path / f for f in ("a.tsv", "b.tsv", "c.h5ad")], min_fragments=0, workers=workers)
    store = tmp_path / "atlas.zarr"
    assert not store.exists() or list(digests(store)) == ["a"]
    assert not (store / ".incoming").exists() or not list((store / ".incoming").iterdir())
    write_lines(tmp_path / "b.tsv", FRAGMENTS)
    report = toy_convert(
        [tmp_path / f for f in ("a.tsv", "b.tsv", "c.h5ad")], min_fragments=0, workers=workers
    )
    assert sorted([*report.converted, *report.skipped]) == ["a", "b", "c"]
    assert list(digests(store)) == ["a", "b", "c"]


def test_a_sample_of_closed_islands_alone_is_refused(tmp_path: Path, toy_convert: Convert) -> None:
    windows = str(write_lines(tmp_path / "w.bed", [("chr1", 9990, 10_000), ("chr1", 0, 10)]))
    write_lines(tmp_path / "f.tsv", [("chr1", 50, 90, "A")])
    matrix = some_counts().toarray()
    matrix[:, 0] = 0
    some_anndata(matrix).write_h5ad(tmp_path / "h.h5ad")
    for name in ("f.tsv", "h.h5ad"):
        with pytest.raises(InputError, match=f"{name}: found no count of any cell in the 2 islands"):
            toy_convert(tmp_path / name, min_fragments=0, select=windows)
    assert not (tmp_path / "atlas.zarr").exists()


def test_a_truncated_file_is_never_a_sample(tmp_path: Path, toy_convert: Convert) -> None:
    text = write_lines(tmp_path / "x.tsv", FRAGMENTS).read_bytes()
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(text)[:-100])
    with pytest.raises(InputError, match=r"cut\.tsv\.gz, after line .*byte"):
        toy_convert(tmp_path / "cut.tsv.gz", min_fragments=0)
    assert not (tmp_path / "atlas.zarr").exists()


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


def test_obs_of_an_h5ad_are_carried_over(tmp_path: Path, toy_convert: Convert) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    toy_convert(tmp_path / "a.h5ad")
    obs = IslandStore.open(tmp_path / "atlas.zarr").samples["a"].obs()
    assert obs["cell_type"].tolist() == ["B", "T", "NK"] * 10
    assert obs["depth"].tolist() == (np.arange(30) / 4).tolist()
    assert obs["passed"].tolist() == [True, False] * 15
    assert obs["donor"].tolist() == [f"D{i % 2}" for i in range(30)]
    assert obs["n_counts_given"].tolist() == list(range(30))
    assert obs["n_counts"].tolist() == np.asarray(some_counts().sum(axis=1)).ravel().tolist()


def test_labels_join_at_conversion_or_later_alike_and_x_stays(
    tmp_path: Path, toy_convert: Convert, said: Any
) -> None:
    write_lines(tmp_path / "a.tsv", FRAGMENTS)
    rows = [(barcode, "TB"[i % 2], i) for i, barcode in enumerate(BARCODES[:20])]
    labels = write_lines(tmp_path / "cells.tsv", [("barcode", "cell_type", "age"), *rows, ("Z", "T", 1)])
    toy_convert(tmp_path / "a.tsv", "at.zarr", min_fragments=0, obs=labels)
    for out in ("later.zarr", "again.zarr"):
        toy_convert(tmp_path / "a.tsv", out, min_fragments=0)
    before = shard_bytes(tmp_path / "later.zarr", "a")
    join_obs(tmp_path / "later.zarr", labels, said)
    report = toy_convert(tmp_path / "a.tsv", "again.zarr", min_fragments=0, obs=labels)
    assert report.relabelled == ["a"]
    assert shard_bytes(tmp_path / "later.zarr", "a") == before
    assert (
        digests(tmp_path / "at.zarr") == digests(tmp_path / "later.zarr") == digests(tmp_path / "again.zarr")
    )
    obs = IslandStore.open(tmp_path / "later.zarr").samples["a"].obs()
    assert obs["cell_type"].isna().sum() == 10
    assert obs.loc[BARCODES[1], ["cell_type", "age"]].tolist() == ["B", 1]
    assert "20 of 30 cells have labels" in said


def test_labels_of_no_cell_are_refused_before_anything_changes(tmp_path: Path, toy_convert: Convert) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    write_lines(tmp_path / "b.tsv", FRAGMENTS)
    toy_convert([tmp_path / "a.h5ad", tmp_path / "b.tsv"], min_fragments=0)
    before = all_bytes(tmp_path / "atlas.zarr")
    wrong = write_lines(tmp_path / "wrong.tsv", [("barcode", "t"), ("nobody", "x")])
    with pytest.raises(InputError, match=r"wrong\.tsv: found barcodes such as 'nobody', none of a cell"):
        join_obs(tmp_path / "atlas.zarr", wrong)
    write_lines(wrong, [("barcode", "sample", "t"), (BARCODES[0], "elsewhere", "x")])
    with pytest.raises(InputError, match="of samples 'elsewhere', none of a cell"):
        join_obs(tmp_path / "atlas.zarr", wrong)
    assert all_bytes(tmp_path / "atlas.zarr") == before
    write_lines(wrong, [("barcode", "sample", "t"), (BARCODES[0], "b", "x")])
    join_obs(tmp_path / "atlas.zarr", wrong)
    assert IslandStore.open(tmp_path / "atlas.zarr").obs(["t"])["t"].dropna().tolist() == ["x"]


def test_a_sheet_converts_all_its_samples(tmp_path: Path, toy_convert: Convert) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    write_lines(tmp_path / "f.tsv", FRAGMENTS)
    write_peaks(tmp_path / "p.bed")
    write_lines(tmp_path / "cells.txt", [(barcode,) for barcode in BARCODES[:5]])
    rows = [("sample", "path", "peaks", "barcodes", "donor"), ("one", "a.h5ad", "", "", "D1")]
    sheet = write_lines(tmp_path / "samples.tsv", [*rows, ("two", "f.tsv", "p.bed", "cells.txt", "D2")])
    toy_convert([], sheet=sheet)
    store = IslandStore.open(tmp_path / "atlas.zarr")
    assert {name: sample.n_cells for name, sample in store.samples.items()} == {"one": 30, "two": 5}
    assert store.obs(["donor"])["donor"].tolist() == ["D1"] * 30 + ["D2"] * 5
    with pytest.raises(InputError, match="found a sheet together with inputs"):
        toy_convert([tmp_path / "a.h5ad"], sheet=sheet)


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
    barcodes = write_lines(tmp_path / "cells.txt", [(barcode,) for barcode in BARCODES])
    inputs = [tmp_path / "cells.h5ad", tmp_path / "f.tsv"]
    toy_convert(inputs, "default.zarr", barcodes=barcodes, progress=said)
    assert "--min-fragments" not in said
    toy_convert(inputs, "listed.zarr", barcodes=barcodes, min_fragments=7, progress=said)
    assert [line for line in said.lines if "--min-fragments" in line] == [
        "cells.h5ad: a peak matrix: --min-fragments does not apply",
        "f.tsv: --barcodes lists the cells: --min-fragments does not apply",
    ]
    assert digests(tmp_path / "default.zarr") == digests(tmp_path / "listed.zarr")
    said.lines.clear()
    toy_convert(tmp_path / "f.tsv", "found.zarr", min_fragments=7, progress=said)
    assert "--min-fragments" not in said


def test_a_failed_conversion_leaves_a_store_that_was_there(tmp_path: Path, toy_convert: Convert) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    write_lines(tmp_path / "bad.tsv", [("chr1", 5, 4, "A")])
    toy_convert(tmp_path / "a.h5ad")
    before = all_bytes(tmp_path / "atlas.zarr")
    with pytest.raises(InputError, match=r"bad\.tsv, line 1"):
        toy_convert(tmp_path / "bad.tsv", min_fragments=0)
    after = all_bytes(tmp_path / "atlas.zarr")
    assert after == before
    create_store(tmp_path / "empty.zarr", IslandStore.open(tmp_path / "atlas.zarr").space, "insertion")
    with pytest.raises(InputError, match=r"bad\.tsv, line 1"):
        toy_convert(tmp_path / "bad.tsv", "empty.zarr", min_fragments=0)
    with pytest.raises(InputError, match=r"empty\.zarr: holds no sample, .* `annatac convert`"):
        IslandStore.open(tmp_path / "empty.zarr").obs(["cell_type"])


def test_an_empty_store_is_not_removed_while_another_writes(tmp_path: Path, toy_convert: Convert) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    toy_convert(tmp_path / "a.h5ad")
    remove_empty(tmp_path / "atlas.zarr")
    assert list(digests(tmp_path / "atlas.zarr")) == ["a"]
    store = tmp_path / "new.zarr"
    create_store(store, IslandStore.open(tmp_path / "atlas.zarr").space, "insertion")
    with SampleWriter(store, "s", 1):
        remove_empty(store)
        assert store.exists()
    remove_empty(store)
    remove_empty(store)  # nothing there, nothing to do
    (tmp_path / "mine").mkdir()
    write_lines(tmp_path / "mine" / "notes.txt", [("kept",)])
    with pytest.raises(StoreError, match="mine: exists and is not an island store"):
        toy_convert(tmp_path / "a.h5ad", "mine")
    assert list(all_bytes(tmp_path / "mine")) == ["notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.h5ad", "atlas.zarr", "mine", "toy.chrom.sizes"
    ]  # fmt: skip


def test_a_store_that_another_conversion_removed_is_made_again(
    tmp_path: Path, toy_convert: Convert, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "f.tsv", FRAGMENTS)
    count = samples.count_fragments

    def removed_meanwhile(*arguments: Any) -> Any:
        remove_empty(tmp_path / "atlas.zarr")
        assert not (tmp_path / "atlas.zarr").exists()
        return count(*arguments)

    monkeypatch.setattr(samples, "count_fragments", removed_meanwhile)
    toy_convert(tmp_path / "f.tsv", min_fragments=0)
    assert list(digests(tmp_path / "atlas.zarr")) == ["f"]


@pytest.mark.parametrize("place", ["x.zarr", "samples/x.zarr", "samples/a/deep/x.zarr"])
def test_a_store_within_a_store_is_refused(tmp_path: Path, toy_convert: Convert, place: str) -> None:
    some_anndata().write_h5ad(tmp_path / "a.h5ad")
    toy_convert(tmp_path / "a.h5ad")
    before = all_bytes(tmp_path / "atlas.zarr")
    (tmp_path / "link").symlink_to(tmp_path / "atlas.zarr")
    for outer in ("atlas.zarr", "link"):
        with pytest.raises(StoreError, match=r"x\.zarr: lies in .*atlas\.zarr, which is an island store"):
            toy_convert(tmp_path / "a.h5ad", f"{outer}/{place}")
    assert all_bytes(tmp_path / "atlas.zarr") == before
    toy_convert(tmp_path / "a.h5ad", "beside/x.zarr")


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
    assert said.done == (tmp_path / "f.tsv").stat().st_size
    sample = IslandStore.open(tmp_path / "atlas.zarr").samples["f"]
    record = sample.conversion
    assert record["lines"]["counted"] == 1
    assert record["peaks"]["other_contig"] == 1
    assert record["contigs"]["renamed"] == {"1": "chr1"}
    assert {entry["role"] for entry in record["inputs"]} == {"data", "peaks"}
    assert all(len(entry["sha256"]) == 64 and entry["size"] > 0 for entry in record["inputs"])
    assert record["options"] == {"min_fragments": 0}
    assert np.flatnonzero(sample.measured).tolist() == [0, 3]


def test_another_assembly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"peaks \([0-9.]+%\) that pass the end of their chromosome"):
        convert(CEREBELLUM, assembly="hg38", out=tmp_path / "a.zarr")
    assert not any(tmp_path.iterdir())


def test_a_script_without_a_main_guard_ends(tmp_path: Path, chrom_sizes: Path) -> None:
    for i in range(6):
        write_lines(tmp_path / f"f{i}.tsv", FRAGMENTS[i:])
    script = tmp_path / "script.py"
    script.write_text(
        "from annatac_scale.ingest.convert import convert\n"
        f"files = [{str(tmp_path)!r} + f'/f{{i}}.tsv' for i in range(6)]\n"
        f"r = convert(files, assembly='toy', out={str(tmp_path / 'a.zarr')!r}, select='all', min_fragments=0,\n"
        f"            chrom_sizes={str(chrom_sizes)!r}, workers=4)\n"
        "print(len(r.converted))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "6"
