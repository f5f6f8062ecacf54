"""Peak matrices in every layout give the same counts; anything but counts is refused by barcode and peak."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrix_files import BARCODES, PEAKS, names, some_anndata, some_counts, write_10x_h5, write_10x_mtx
from scipy import sparse

from annatac_scale.errors import InputError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.ingest.h5ad import open_h5ad
from annatac_scale.ingest.matrices import PeakMatrix, count_islands
from annatac_scale.ingest.open_matrix import open_matrix
from annatac_scale.ingest.peaks import PeakSet, as_intervals
from annatac_scale.ingest.samples import kind_of
from annatac_scale.ingest.tenx import open_10x_h5, open_10x_mtx

COUNTS = some_counts()
LAYOUTS = [sparse.csr_matrix, sparse.csc_matrix, lambda matrix: matrix.toarray()]


def table(matrix: PeakMatrix) -> tuple[list[str], list[str], list[list[int]]]:
    peaks = [matrix.intervals.name(i) for i in range(len(matrix.intervals))]
    counts = matrix.counts(np.arange(len(matrix)))
    assert counts.dtype == np.int64
    barcodes = list(matrix.obs.index)
    matrix.close()
    return barcodes, peaks, counts.toarray().tolist()


EXPECTED = (BARCODES, names(PEAKS), COUNTS.toarray().tolist())


@pytest.mark.parametrize("layout", LAYOUTS, ids=["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", "float32", "float64"])
def test_an_h5ad_gives_its_counts_in_any_layout_and_number_type(
    tmp_path: Path, layout: Callable[..., object], dtype: str
) -> None:
    path = tmp_path / "x.h5ad"
    some_anndata(layout(COUNTS.astype(dtype))).write_h5ad(path, compression="gzip")
    assert kind_of(path) == "h5ad"
    assert table(open_h5ad(path)) == EXPECTED


def test_booleans_are_counts_of_one(tmp_path: Path) -> None:
    some_anndata(COUNTS.astype(bool)).write_h5ad(tmp_path / "x.h5ad")
    assert table(open_h5ad(tmp_path / "x.h5ad"))[2] == (COUNTS > 0).astype(int).toarray().tolist()


def test_counts_may_lie_in_a_layer_or_in_raw(tmp_path: Path) -> None:
    data = some_anndata(COUNTS.astype(np.float32))
    data.layers["counts"] = data.X.copy()
    data.raw = data.copy()
    data = data[:, ::2].copy()
    data.X = data.X.log1p()
    data.write_h5ad(tmp_path / "x.h5ad")
    assert table(open_h5ad(tmp_path / "x.h5ad", use_raw=True)) == EXPECTED
    assert table(open_h5ad(tmp_path / "x.h5ad", layer="counts"))[2] == COUNTS[:, ::2].toarray().tolist()
    with pytest.raises(InputError, match=r"in X for barcode 'AAAC000-1', peak chr1:.*, which looks normalised.*"
                       r"--layer \(there are: counts\) or --use-raw"):  # fmt: skip
        table(open_h5ad(tmp_path / "x.h5ad"))
    with pytest.raises(InputError, match=r"found no layers/count; .*--layer \(there are: counts\)"):
        open_h5ad(tmp_path / "x.h5ad", layer="count")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 0.5, 2.0**31])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["csr", "csc", "dense"])
def test_what_is_no_count_is_refused_by_barcode_and_peak(
    tmp_path: Path, value: float, layout: Callable[..., object]
) -> None:
    matrix = COUNTS.astype(np.float64).tolil()
    matrix[7, 5] = value
    some_anndata(layout(matrix.tocsr())).write_h5ad(tmp_path / "x.h5ad")
    message = f"x.h5ad: found {value:g} in X for barcode 'AAAC007-1', peak chr1:1750-2150"
    with pytest.raises(InputError, match=re.escape(message)):
        table(open_h5ad(tmp_path / "x.h5ad"))


VAR_COLUMNS = [
    ("chrom", "start", "end"),
    ("Chr", "chromStart", "chromEnd"),
    ("seqnames", "start", "End"),
    ("chromosome", "START", "end"),
]


@pytest.mark.parametrize("columns", VAR_COLUMNS)
def test_coordinates_may_lie_in_var_columns(tmp_path: Path, columns: tuple[str, str, str]) -> None:
    data = some_anndata()
    var = dict(zip(columns, zip(*PEAKS, strict=True), strict=True))
    data.var = pd.DataFrame(var, index=[str(i) for i in range(33)])
    data.write_h5ad(tmp_path / "x.h5ad")
    assert table(open_h5ad(tmp_path / "x.h5ad")) == EXPECTED


@pytest.mark.parametrize("form", ["{}:{}-{}", "{}-{}-{}", "{}_{}_{}"])
def test_coordinates_may_lie_in_var_names(tmp_path: Path, form: str) -> None:
    data = some_anndata()
    data.var_names = names(PEAKS, form)
    data.write_h5ad(tmp_path / "x.h5ad")
    assert table(open_h5ad(tmp_path / "x.h5ad")) == EXPECTED


def test_peaks_without_coordinates_are_refused(tmp_path: Path) -> None:
    data = some_anndata()
    data.var_names = [str(i) for i in range(33)]
    data.write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(
        InputError, match=r"x\.h5ad, var: found a peak named '0'; .*columns chrom, start and end"
    ):
        _ = open_h5ad(tmp_path / "x.h5ad").intervals
    data.var["chrom"], data.var["start"], data.var["end"] = "chr1", np.arange(33.0), np.arange(33.0)
    data.write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(InputError, match=r"x\.h5ad, var '0': found chrom chr1, start 0.0, end 0.0"):
        _ = open_h5ad(tmp_path / "x.h5ad").intervals


def test_only_the_peaks_of_several_feature_types_count(tmp_path: Path) -> None:
    genes = sparse.csr_matrix(np.full((30, 4), 0.5))
    data = some_anndata(sparse.hstack([genes, COUNTS], format="csr")[:, 4:])
    wide = anndata.AnnData(
        sparse.hstack([genes, COUNTS], format="csr"), obs=data.obs,
        var=pd.DataFrame({"feature_types": ["Gene Expression"] * 4 + ["Peaks"] * 33},
                         index=["G1", "G2", "G3", "G4", *names(PEAKS)]),
    )  # fmt: skip
    wide.write_h5ad(tmp_path / "x.h5ad")
    assert table(open_h5ad(tmp_path / "x.h5ad")) == EXPECTED


def test_legacy_categories_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.h5ad"
    some_anndata().write_h5ad(path)
    with h5py.File(path, "a") as file:
        obs = file["obs"]
        codes, categories = obs["cell_type/codes"][:], obs["cell_type/categories"][:]
        del obs["cell_type"]
        obs["__categories/cell_type"] = categories
        obs["__categories/cell_type"].attrs["ordered"] = False
        obs["cell_type"] = codes
        obs["cell_type"].attrs["categories"] = obs["__categories/cell_type"].ref
        obs.attrs["encoding-version"] = "0.1.0"
        for name in ("passed", "donor"):
            del obs[name]
        obs.attrs["column-order"] = ["cell_type", "depth", "n_counts"]
    assert list(open_h5ad(path).obs["cell_type"]) == ["B", "T", "NK"] * 10


def test_the_layout_before_encoding_types_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.h5ad"
    some_anndata().write_h5ad(path)
    with h5py.File(path, "a") as file:
        for name in ("encoding-type", "encoding-version"):
            del file["X"].attrs[name]
        file["X"].attrs["h5sparse_format"] = "csr"
        file["X"].attrs["h5sparse_shape"] = file["X"].attrs.pop("shape")
    assert table(open_h5ad(path)) == EXPECTED


def test_duplicated_barcodes_and_peaks_are_refused_by_name(tmp_path: Path) -> None:
    data = some_anndata()
    data.obs_names = [*BARCODES[:29], BARCODES[3]]
    data.write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(InputError, match=r"b\.h5ad: found barcode 'AAAC003-1' again in row 30"):
        _ = open_h5ad(tmp_path / "b.h5ad").obs
    data = some_anndata()
    data.var_names = [*names(PEAKS)[:32], "chr1-350-750"]
    data.write_h5ad(tmp_path / "p.h5ad")
    with pytest.raises(InputError, match=r"p\.h5ad: found peak chr1:350-750 again as peak 33"):
        _ = open_h5ad(tmp_path / "p.h5ad").intervals


def test_arrays_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5ad"
    some_anndata().write_h5ad(path)
    with h5py.File(path, "a") as file:
        file["X"].attrs["shape"] = [30, 40]
    with pytest.raises(InputError, match="found X of shape 30x40 beside 30 rows of obs and 33 of var"):
        open_h5ad(path)
    some_anndata().write_h5ad(path)
    with h5py.File(path, "a") as file:
        file["X/indptr"][3] = 10**6
    with pytest.raises(InputError, match="an indptr that does not divide"):
        table(open_h5ad(path))
    some_anndata().write_h5ad(path)
    with h5py.File(path, "a") as file:
        file["X/indptr"][30] -= 1
    with pytest.raises(InputError, match="indptr in X that does not divide"):
        open_h5ad(path)
    some_anndata().write_h5ad(path)
    with h5py.File(path, "a") as file:
        file["X/indices"][3] = 33
    with pytest.raises(InputError, match=r"X cannot be read \(a column index outside 0..32\)"):
        table(open_h5ad(path))


@pytest.mark.parametrize("interval", [False, True])
def test_a_10x_h5_gives_its_peaks_and_never_its_genes(tmp_path: Path, interval: bool) -> None:
    genes = sparse.csr_matrix(np.full((30, 3), 7))
    both = sparse.hstack([genes, COUNTS[:, :10], genes, COUNTS[:, 10:]], format="csr")
    kinds = ["Gene Expression"] * 3 + ["Peaks"] * 10 + ["Gene Expression"] * 3 + ["Peaks"] * 23
    features = ["chr1:0-9"] * 3 + names(PEAKS)[:10] + ["chr1:0-9"] * 3 + names(PEAKS)[10:]
    path = write_10x_h5(tmp_path / "m.h5", both, features, kinds, interval)
    assert kind_of(path) == "10x h5"
    assert table(open_10x_h5(path)) == EXPECTED


def test_a_10x_h5_without_peaks_or_of_wrong_size_is_refused(tmp_path: Path) -> None:
    path = write_10x_h5(tmp_path / "m.h5", COUNTS, names(PEAKS), ["Gene Expression"] * 33)
    with pytest.raises(
        InputError, match="found features of type Gene Expression; expected some of type Peaks"
    ):
        open_10x_h5(path)
    path = write_10x_h5(tmp_path / "n.h5", COUNTS, names(PEAKS)[:30])
    with pytest.raises(InputError, match="33 features x 30 barcodes beside 30 features"):
        open_10x_h5(path)
    with h5py.File(path, "a") as file:
        del file["matrix/indptr"]
    with pytest.raises(InputError, match=r"n\.h5: "):
        open_10x_h5(path)


MULTIOME = ["ENSG1\tA\tGene Expression\tchr1\t0\t9"] * 2 + [
    f"{c}:{a}-{b}\t{c}:{a}-{b}\tPeaks\t{c}\t{a}\t{b}" for c, a, b in PEAKS
]
FEATURES = {
    "peaks.bed": ["\t".join(map(str, peak)) for peak in PEAKS],
    "peaks.bed with comments": ["# one", *("\t".join(map(str, peak)) for peak in PEAKS), ""],
    "features.tsv": names(PEAKS),
    "features.tsv of three": [f"{name}\t{name}\tPeaks" for name in names(PEAKS)],
    "features.tsv of six": MULTIOME,
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("features", FEATURES)
def test_a_10x_folder_gives_its_peaks(tmp_path: Path, features: str, zipped: bool) -> None:
    genes = sparse.csr_matrix(np.full((30, 2), 7))
    matrix = sparse.hstack([genes, COUNTS], format="csr") if FEATURES[features] is MULTIOME else COUNTS
    folder = write_10x_mtx(tmp_path / "m", matrix, features.split()[0], FEATURES[features], zipped)
    assert kind_of(folder) == "10x mtx"
    assert table(open_10x_mtx(folder)) == EXPECTED


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("features", ["peaks.bed", "features.tsv"])
def test_features_may_end_their_lines_with_crlf_and_have_blank_ones(
    tmp_path: Path, features: str, zipped: bool
) -> None:
    rows = [f"{row}\r" for row in FEATURES[features]]
    for lines in (rows, [*rows[:7], "\r", *rows[7:]]):
        folder = write_10x_mtx(tmp_path / str(len(lines)), COUNTS, features, lines, zipped)
        assert table(open_10x_mtx(folder)) == EXPECTED


@pytest.mark.parametrize("line", ["chr1\t5", "chr1\t9\t9", "chr1\t-1\t9", "chr1\tx\t9", "chr1\t1.0\t9"])
def test_a_peak_of_a_folder_that_is_no_interval_is_refused_by_line(tmp_path: Path, line: str) -> None:
    for features, rows in FEATURES.items():
        if features in ("peaks.bed", "features.tsv of six"):
            bad = list(rows)
            bad[4] = line if features == "peaks.bed" else f"a\tb\tPeaks\t{line}"
            folder = write_10x_mtx(tmp_path / features, COUNTS, features.split()[0], bad)
            if features == "peaks.bed":
                with pytest.raises(
                    InputError, match=r"peaks\.bed\.gz, line 5: found .*expected 'chrom start end'"
                ):
                    open_10x_mtx(folder)
            elif line != "chr1\t5":
                with pytest.raises(InputError, match=r"features\.tsv\.gz, line 5: found .*'chrom start end'"):
                    open_10x_mtx(folder)


ALIKE = ["{}:{}-{}", "{}-{}-{}", "{}_{}_{}"]


@pytest.mark.parametrize("kind", ["h5ad", "10x h5", "10x mtx"])
def test_peak_names_in_every_spelling_parse_alike(tmp_path: Path, kind: str) -> None:
    peaks = [*PEAKS[:32], ("chrUn_X_v1", 1, 2)]
    spelled = [ALIKE[i % 3].format(*peak) for i, peak in enumerate(peaks)]
    if kind == "h5ad":
        data = some_anndata()
        data.var_names = spelled
        data.write_h5ad(tmp_path / "x")
    elif kind == "10x h5":
        write_10x_h5(tmp_path / "x", COUNTS, spelled)
    else:
        write_10x_mtx(tmp_path / "x", COUNTS, "features.tsv", spelled)
    assert table(open_matrix(tmp_path / "x", kind)) == (BARCODES, names(peaks), EXPECTED[2])


def test_a_10x_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = write_10x_mtx(tmp_path / "m", COUNTS, "peaks.bed", FEATURES["peaks.bed"])
    matrix = folder / "matrix.mtx.gz"
    whole = matrix.read_bytes()
    matrix.write_bytes(whole[:-40])
    with pytest.raises(
        InputError, match=r"matrix\.mtx\.gz, after line \d+: found the end of the file within"
    ):
        table(open_10x_mtx(folder))
    matrix.write_bytes(gzip.compress(b"".join(gzip.decompress(whole).splitlines(keepends=True)[:-1])))
    with pytest.raises(
        InputError, match=r"matrix\.mtx\.gz, after line 299: .* after 296 entries; expected 297"
    ):
        table(open_10x_mtx(folder))
    matrix.write_bytes(whole)
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress(b"A\nB\n"))
    with pytest.raises(InputError, match="33 features x 30 barcodes beside 33 features and 2 barcodes"):
        open_10x_mtx(folder)
    (folder / "barcodes.tsv.gz").unlink()
    with pytest.raises(InputError, match=r"m: found no barcodes\.tsv, plain or \.gz"):
        open_10x_mtx(folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("name", ["x.h5ad", "x.h5"])
def test_a_truncated_hdf5_names_the_file(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    if name == "x.h5":
        write_10x_h5(path, COUNTS, names(PEAKS))
    else:
        some_anndata().write_h5ad(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(InputError, match=rf"{name}: cannot be read as HDF5"):
        kind_of(path)


def test_rows_may_be_asked_for_in_any_order_and_absent(tmp_path: Path) -> None:
    some_anndata().write_h5ad(tmp_path / "x.h5ad")
    matrix = open_h5ad(tmp_path / "x.h5ad")
    rows = np.array([5, -1, 29, 6, 5, 0, -1])
    expected = np.array([COUNTS[i].toarray()[0] if i >= 0 else np.zeros(33, int) for i in rows])
    assert matrix.counts(rows).toarray().tolist() == expected.tolist()
    assert matrix.counts(np.array([-1])).toarray().tolist() == [[0] * 33]


@given(
    cells=st.lists(st.lists(st.integers(0, 12), min_size=6, max_size=6), min_size=1, max_size=8),
    starts=st.lists(st.integers(0, 5999), min_size=6, max_size=6),
)
def test_islands_of_peaks_equal_a_plain_loop(cells: list[list[int]], starts: list[int]) -> None:
    assembly = Assembly("toy", ("chr1",), (6000,))
    space = IslandSpace.all(assembly, width_bp=1000)
    peaks = PeakSet.of_intervals(as_intervals([("chr1", s, s + 1) for s in starts]), assembly, space, "x")
    # A stored zero is no open island.
    matrix = sparse.csr_matrix(np.array(cells) + 1)
    matrix.data -= 1
    found = count_islands(matrix, peaks)
    assert found.n_counts.tolist() == [sum(cell) for cell in cells]
    assert found.n_inside.tolist() == found.n_counts.tolist()
    for i, cell in enumerate(cells):
        expected = {}
        for island in range(6):
            values = [value for value, start in zip(cell, starts, strict=True) if start // 1000 == island]
            if sum(values):
                expected[island] = min(5, -(-sum(values) // len(values)))
        part = found.open[i : i + 1]
        assert dict(zip(part.islands.tolist(), part.levels.tolist(), strict=True)) == expected
        assert part.islands.tolist() == sorted(expected)
