"""The generator of fragments: what it writes is what was asked for, in every order and packing."""

import gzip
import importlib
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
fragments: Any = importlib.import_module("fragments")
writer: Any = importlib.import_module("fragment_writer")

SPEC = replace(fragments.Spec.quick(), lines=20_000, in_mitochondrion=0.05)
COLUMNS = ["chrom", "start", "end", "barcode", "count"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fragments.make(tmp_path_factory.mktemp("made"), SPEC)


def text_of(path: Path) -> str:
    packed = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(packed).decode()
    if path.suffix == ".zst":
        return pa.CompressedInputStream(pa.BufferReader(packed), "zstd").read().decode()
    return packed.decode()


def table_of(path: Path) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text_of(path)), sep="\t", comment="#", names=COLUMNS)


def bed_of(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", names=COLUMNS[:3])


def test_every_line_is_a_fragment_of_the_assembly(made: Any) -> None:
    table = table_of(made.fragments)
    genome = fragments.Genome.of("hg38")
    size = table["chrom"].map(dict(zip(genome.names, genome.sizes, strict=True)))
    assert len(table) == SPEC.lines
    assert (table["start"] >= 0).all()
    assert (table["start"] < table["end"]).all()
    assert (table["end"] <= size).all()
    assert (table["count"] >= 1).all()


def test_lines_are_sorted_by_chromosome_and_start(made: Any) -> None:
    table = table_of(made.fragments)
    code = table["chrom"].map({name: code for code, name in enumerate(fragments.Genome.of("hg38").names)})
    key = code * 10**9 + table["start"]
    assert key.is_monotonic_increasing


def test_pieces_of_a_chromosome_join_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = table_of(fragments.make(tmp_path / "whole", SPEC).fragments)
    monkeypatch.setattr(fragments, "_PIECE_LINES", 100)
    pieces = table_of(fragments.make(tmp_path / "pieces", SPEC).fragments)
    assert len(pieces) == len(whole)
    assert pieces.groupby("chrom")["start"].is_monotonic_increasing.all()


def test_shares_are_near_those_asked_for(made: Any) -> None:
    table, cells = table_of(made.fragments), made.barcodes.read_text().split()
    peaks = bed_of(made.peaks)
    middle = (table["start"] + table["end"]) // 2
    inside = 0
    for chrom, own in peaks.groupby("chrom"):
        places = middle[table["chrom"] == chrom].to_numpy()
        at = np.searchsorted(own["start"], places, side="right") - 1
        inside += ((at >= 0) & (places < own["end"].to_numpy()[at])).sum()
    assert len(set(cells)) == SPEC.cells
    assert table["barcode"].isin(cells).mean() == pytest.approx(1 - SPEC.in_ambient, abs=0.01)
    assert (table["chrom"] == "chrM").mean() == pytest.approx(SPEC.in_mitochondrion, abs=0.01)
    assert inside / len(table) == pytest.approx(SPEC.in_peaks, abs=0.03)


def test_peaks_are_sorted_apart_and_often_share_a_bin(made: Any) -> None:
    peaks = bed_of(made.peaks)
    assert len(peaks) == SPEC.peaks
    for _, own in peaks.groupby("chrom"):
        assert own["start"].is_monotonic_increasing
        assert (own["start"].to_numpy()[1:] >= own["end"].to_numpy()[:-1]).all()
    assert 300 < (peaks["end"] - peaks["start"]).median() < 700
    many = fragments.draw_peaks(np.random.default_rng(0), fragments.Genome.of("hg38"), fragments.Spec())
    per_bin = pd.Series(many.start // 5_000 + many.chrom * 10**6).value_counts()
    assert len(many.start) == 100_000
    assert (per_bin > 1).mean() > 0.1


@pytest.mark.parametrize("order", ["barcode", "random"])
def test_order_changes_nothing_but_the_order(
    order: str, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fragments, "_BUCKET_LINES", 6_000)
    other = fragments.make(tmp_path, replace(SPEC, order=order))
    table = table_of(other.fragments)
    assert not table.equals(table_of(made.fragments))
    expected = table_of(made.fragments).sort_values(COLUMNS, ignore_index=True)
    pd.testing.assert_frame_equal(table.sort_values(COLUMNS, ignore_index=True), expected)
    if order == "barcode":
        assert (table["barcode"] != table["barcode"].shift()).sum() == table["barcode"].nunique()


@pytest.mark.parametrize("compression", ["gzip", "text", "zstd"])
def test_packing_changes_no_line(compression: str, made: Any, tmp_path: Path) -> None:
    other = fragments.make(tmp_path, replace(SPEC, compression=compression))
    lines = [line for line in text_of(other.fragments).splitlines() if not line.startswith("#")]
    expected = [line for line in text_of(made.fragments).splitlines() if not line.startswith("#")]
    assert lines == expected


def test_the_same_options_give_the_same_bytes_and_another_seed_others(made: Any, tmp_path: Path) -> None:
    again = fragments.make(tmp_path / "again", SPEC, threads=1)
    other = fragments.make(tmp_path / "other", replace(SPEC, seed=1))
    assert again.fragments.read_bytes() == made.fragments.read_bytes()
    assert again.peaks.read_bytes() == made.peaks.read_bytes()
    assert other.fragments.read_bytes() != made.fragments.read_bytes()


def test_a_set_that_is_there_is_not_made_again_unless_the_options_differ(tmp_path: Path) -> None:
    made = fragments.make(tmp_path, SPEC)
    made.barcodes.write_text("touched\n")
    assert fragments.make(tmp_path, SPEC).barcodes.read_text() == "touched\n"
    assert fragments.make(tmp_path, replace(SPEC, seed=1)).barcodes.read_text() != "touched\n"


def test_bgzf_is_blocks_that_name_their_size_and_ends_with_the_empty_one(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 256, 5 * writer.BLOCK_BYTES // 2, dtype=np.uint8).tobytes()
    with writer.open_packed(tmp_path / "x.gz", "bgzf", 1, 2) as out:
        for begin in range(0, len(text), 10_007):
            out.write(text[begin : begin + 10_007])
    packed = (tmp_path / "x.gz").read_bytes()
    assert gzip.decompress(packed) == text
    blocks, at = [], 0
    while at < len(packed):
        size = int.from_bytes(packed[at + 16 : at + 18], "little") + 1
        assert packed[at + 12 : at + 16] == b"BC\x02\x00"
        blocks.append(gzip.decompress(packed[at : at + size]))
        at += size
    assert [len(block) for block in blocks] == [writer.BLOCK_BYTES] * 2 + [writer.BLOCK_BYTES // 2, 0]


LINE = st.tuples(
    st.integers(0, 2),
    st.integers(0, 2**31 - 2_000),
    st.integers(0, 1_999),
    st.integers(0, 3),
    st.integers(0, 255),
)


@settings(max_examples=50)
@given(st.lists(LINE, max_size=30))
def test_lines_are_formatted_as_python_would(lines: list[tuple[int, ...]]) -> None:
    chromosomes, barcodes = ["chr1", "chr10", "M"], ["AAAA-1", "CCCC-1", "GGGG-1", "TTTT-1"]
    columns = list(zip(*lines, strict=True)) or [()] * 5
    kinds = ("u1", "i4", "i4", "i4", "u1")
    out = io.BytesIO()
    writer.FragmentWriter(out, chromosomes, barcodes).write(
        writer.Fragments(*(np.array(column, dtype=kind) for column, kind in zip(columns, kinds, strict=True)))
    )
    expected = [
        f"{chromosomes[chrom]}\t{start}\t{start + length}\t{barcodes[barcode]}\t{count}\n"
        for chrom, start, length, barcode, count in lines
    ]
    assert out.getvalue().decode() == "".join(expected)
