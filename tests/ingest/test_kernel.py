"""The counting kernel on bytes that nobody should write: it never crashes or loops, and each line has its fate."""

import random
from pathlib import Path

import numpy as np
import pytest
from compressed_files import FORMS
from counted import BINS, STRATEGIES, TOY, Way, count, counting_of, lines_of, peak_set
from fragment_lines import INVALID_LINES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_counts import count_plainly

from annatac_scale.errors import InputError
from annatac_scale.ingest import kernel
from annatac_scale.ingest.fragments import _Strand

FEW = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}
PEAKS = [("chr1", 0, 60), ("chr1", 50, 1200), ("chr2", 10, 20)]
PIECES = [
    *[b"\t"] * 6,
    *[b"\n"] * 3,
    *[b"chr1\t", b"chr1\t", b"chr2\t", b"1\t", b"chr", b"A\n", b"A\t", b"\tA"] * 2,
    *[
        b"0",
        b"1",
        b"5",
        b"9",
        b"55",
        b"10000",
        b"10001",
        b"9" * 18,
        b"9" * 19,
        b"9" * 40,
        b"2147483648",
        b"4294967296",
    ],
    *[b"\r", b"\r\n", b" ", b"#", b"\0", b"\xff", b"-", b"+", b".", b"e", b"\xef\xbb\xbf", b"x" * 50],
]
SOUND = b"chr1\t5\t70\tA\n"


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "f"
    path.write_bytes(data)
    return path


def check_any(path: Path, text: bytes, way: Way) -> None:
    found = count(path, way)
    expected = count_plainly(text, PEAKS, BINS, TOY, way.strategy, way.listed)
    assert [(name.encode(), row) for name, row in found.rows.items()] == list(expected.rows.items())
    assert (found.cells.lines, found.cells.invalid) == (expected.lines, expected.invalid)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    pieces=st.lists(st.sampled_from(PIECES) | st.binary(max_size=5), max_size=80),
    range_bytes=st.integers(20, 400),
    quality=st.booleans(),
)
@settings(**FEW, max_examples=150)
def test_any_bytes_have_the_fate_that_a_plain_loop_gives_them(
    tmp_path: Path, strategy: str, pieces: list[bytes], range_bytes: int, quality: bool
) -> None:
    text = SOUND + b"".join(pieces)
    way = Way(
        peak_set(PEAKS),
        strategy=strategy,
        listed=["A"],
        quality=quality,
        count_invalid=True,
        range_bytes=range_bytes,
    )
    check_any(written(tmp_path, text), text, way)


def test_long_random_texts_have_the_fate_that_a_plain_loop_gives_them(tmp_path: Path) -> None:
    for seed in range(12):
        chosen = random.Random(seed)
        text = SOUND + b"".join(chosen.choice(PIECES) for _ in range(4000)) + chosen.randbytes(2000)
        way = Way(peak_set(PEAKS), listed=["A"], count_invalid=True, range_bytes=3000 + seed, n_keys=1)
        check_any(written(tmp_path, text), text, way)


@given(pieces=st.lists(st.sampled_from(PIECES) | st.binary(max_size=5), max_size=40))
@settings(**FEW, max_examples=100)
def test_strict_counting_of_any_bytes_ends_well_or_names_the_first_invalid_line(
    tmp_path: Path, pieces: list[bytes]
) -> None:
    text = SOUND + b"".join(pieces)
    expected = count_plainly(text, PEAKS, BINS, TOY, listed=["A"])
    path = written(tmp_path, text)
    if not expected.lines["invalid"]:
        count(path, Way(peak_set(PEAKS), listed=["A"], range_bytes=30))
        return
    first = 1 + next(
        i
        for i in range(text.count(b"\n") + 1)
        if count_plainly(b"\n".join(text.split(b"\n")[: i + 1]), [], BINS, TOY, listed=["A"]).lines["invalid"]
    )
    with pytest.raises(InputError) as caught:
        count(path, Way(peak_set(PEAKS), listed=["A"]))
    assert str(caught.value).startswith(f"{path}, line {first}: found ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_a_contig_of_a_megabyte_and_a_barcode_of_one_are_names(tmp_path: Path, form: str) -> None:
    name = "x" * 1_000_000
    text = lines_of([(name, 5, 9, "A"), ("chr1", 5, 9, name), (name, 5, 9, "A"), ("chr1", 5, 9, name)])
    found = count(written(tmp_path, FORMS[form](text) if form != "many members" else text))
    assert found.rows == {name: {0: 4}}
    assert found.cells.contigs["other"] == {name: 2}


def test_many_contigs_and_barcodes_make_tables_grow(tmp_path: Path) -> None:
    rows = [(f"u{i}", 5, 9, "A") for i in range(5000)] + [("chr1", 5, 9, f"{i:x}") for i in range(70_000)]
    random.Random(0).shuffle(rows)
    path = written(tmp_path, lines_of(rows))
    for way in (Way(n_keys=1 << 12), Way(listed=["0", "11"]), Way(listed=["0", "11"], n_strands=2)):
        found = count(path, way)
        assert found.cells.contigs["n_other"] == 5000
        assert found.cells.lines["counted"] == (70_000 if way.listed is None else 2)
        assert found.rows["11"] == {0: 2}


@pytest.mark.parametrize("line", INVALID_LINES)
def test_nothing_is_counted_before_what_is_needed_is_there(line: bytes) -> None:
    """The kernel is called again from the line it stopped at: its counters must not have moved."""
    strand = _Strand(counting_of(Way()), lambda n_bytes, n_lines: None)
    text = np.frombuffer(line + b"\n", np.uint8)
    before = strand.tallies.counters.copy()
    rules, segments = strand.rules, strand.counting.segments
    at, status = kernel.count_lines(text, 0, segments, rules, strand.tallies)
    while status == kernel.NEW_CONTIG:
        strand._resolve_contig()
        at, status = kernel.count_lines(text, at, segments, rules, strand.tallies)
    assert status >= kernel.FIRST_INVALID
    assert at == 0
    assert strand.tallies.counters.tolist() == before.tolist()
    assert not strand.tallies.contig_lines.any()
