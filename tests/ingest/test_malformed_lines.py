"""Lines that are no fragment: strict with their place, or counted by kind; damaged files; files of nothing."""

import gzip
from collections import Counter
from pathlib import Path

import pytest
from compressed_files import END_OF_BGZF, FORMS, bgzf, bgzf_block, many_members
from counted import BINS, TOY, Way, count, lines_of, peak_set
from fragment_lines import INVALID_LINES
from plain_counts import count_plainly

from annatac_scale.errors import InputError

ROWS = [("chr1", i * 37 % 800, i * 37 % 800 + 20 + i % 60, f"BC{i % 23}-1", 1 + i % 3) for i in range(300)]
EXPECTED = {
    "few_columns": "4 or more columns",
    "no_contig": "a contig in 4 or more columns",
    "bad_start": "a whole number as start",
    "bad_end": "a whole number as end",
    "no_barcode": "a barcode in column 4",
    "end_not_after_start": "an end greater than the start",
    "end_beyond_chromosome": "an end of at most ",
}


def written(tmp_path: Path, data: bytes, name: str = "f.tsv") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("line", INVALID_LINES)
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""])
def test_an_invalid_line_stops_with_its_place_and_text(tmp_path: Path, line: bytes, ending: bytes) -> None:
    """Cases 14 and 17."""
    path = written(tmp_path, b"# head\nchr1\t1\t2\tA\n\n" + line + ending)
    for way in (Way(), Way(range_bytes=9, text_bytes=8, listed=["A"], quality=False)):
        with pytest.raises(InputError) as caught:
            count(path, way)
        message = str(caught.value)
        expected = EXPECTED[INVALID_LINES[line]]
        assert message.startswith(f"{path}, line 4: found {line.decode()!r}; expected {expected}")
        assert "--on-invalid count" in message
        assert "\n" not in message


@pytest.mark.parametrize("line", INVALID_LINES)
def test_an_invalid_line_is_counted_by_its_kind(tmp_path: Path, line: bytes) -> None:
    """Case 17, lenient."""
    path = written(tmp_path, b"chr1\t1\t2\tA\n" + line + b"\nchr1\t3\t4\tA\n")
    found = count(path, Way(count_invalid=True))
    assert found.rows == {"A": {0: 4}}
    assert found.cells.invalid == {INVALID_LINES[line]: 1}
    assert found.cells.lines["invalid"] == 1


def test_kinds_of_invalid_lines_add_up_over_ranges(tmp_path: Path) -> None:
    lines = [line for i, line in enumerate(INVALID_LINES) for line in [line] * (i + 1)] * 3
    text = b"\n".join([*lines, b"chr1\t1\t2\tA", *lines])
    found = count(written(tmp_path, text), Way(count_invalid=True, range_bytes=len(text) // 7))
    assert found.cells.invalid == Counter(INVALID_LINES[line] for line in lines * 2)


def test_a_header_row_is_refused_with_its_line_shown(tmp_path: Path) -> None:
    """Case 14: BPCells makes it a chromosome."""
    path = written(tmp_path, b"chrom\tstart\tend\tbarcode\tcount\n" + lines_of(ROWS))
    with pytest.raises(InputError, match=r"line 1: found 'chrom.tstart.tend.tbarcode.tcount'.*marked by #"):
        count(path)


FORMS_OF_RANGES = {
    "plain": bytes,
    "bgzf": lambda text: bgzf(text, 333),
    "gzip": gzip.compress,
    "many members": many_members,
    "zstd": FORMS["zstd"],
}


@pytest.mark.parametrize("form", FORMS_OF_RANGES)
@pytest.mark.parametrize("n_strands", [1, 2, 3])
@pytest.mark.parametrize("place", [0, 1, 57, 150, 211, 299])
def test_the_number_of_a_line_is_right_in_any_range_and_strand(
    tmp_path: Path, form: str, n_strands: int, place: int
) -> None:
    rows: list[tuple[object, ...]] = [*ROWS]
    rows[place] = ("chr1", 9, 5, "torn")
    path = written(tmp_path, FORMS_OF_RANGES[form](lines_of(rows)))
    way = Way(range_bytes=path.stat().st_size // 4, text_bytes=200, read_bytes=300, n_strands=n_strands)
    with pytest.raises(InputError, match=rf"f\.tsv, line {place + 1}: found 'chr1.t9.t5.ttorn'"):
        count(path, way)


@pytest.mark.parametrize("n_strands", [2, 3, 5])
def test_of_several_invalid_lines_in_strands_the_first_is_told(tmp_path: Path, n_strands: int) -> None:
    text = lines_of(ROWS[:40]) + b"bad\n" * 60
    path = written(tmp_path, many_members(text))
    for _ in range(3):
        with pytest.raises(InputError, match=r"f\.tsv, line 41: found 'bad'"):
            count(path, Way(text_bytes=40, read_bytes=300, n_strands=n_strands))


def test_a_long_invalid_line_is_shown_cut(tmp_path: Path) -> None:
    for line in (b"chr1\t9\t5\t" + b"A" * 5000, b"\xff" * 100_000, b"x" * 1_000_000 + b"\t9\t5\tA"):
        with pytest.raises(InputError) as caught:
            count(written(tmp_path, line))
        assert len(str(caught.value)) < 500


# The table "Tolerance measured" of what others do, where no test above is about the line


def test_ends_of_chromosomes(tmp_path: Path) -> None:
    """Case 17: an end at the chromosome's end counts; beyond it, or a start there, is invalid."""
    text = lines_of(
        [("chrM", 899, 900, "A"), ("chrM", 899, 901, "A"), ("chrM", 900, 950, "A"), ("chr1", 0, 10_000, "A")]
    )
    found = count(written(tmp_path, text), Way(count_invalid=True))
    assert found.cells.invalid == {"end_beyond_chromosome": 2}
    assert found.rows == {"A": {0: 1, 9: 1, 15: 2}}


def test_ends_beyond_32_bits_on_an_unknown_contig_are_other_contigs(tmp_path: Path) -> None:
    text = lines_of(
        [("chr1", 1, 2, "A"), ("chrUn", 2**32, 2**32 + 5, "A"), ("chrUn", 10**17, 10**18 - 1, "A")]
    )
    assert count(written(tmp_path, text)).cells.lines["other_contig"] == 2


def test_repeated_lines_count_each_time(tmp_path: Path) -> None:
    found = count(written(tmp_path, b"chr1\t5\t1005\tA\t2\n" * 4))
    assert found.rows == {"A": {0: 4, 1: 4}}


def test_counts_in_column_5_are_no_reason_to_fail(tmp_path: Path) -> None:
    """Case 17: ``1.0`` and ``.``."""
    found = count(
        written(tmp_path, b"chr1\t5\t9\tA\t1.0\nchr1\t5\t9\tA\t.\nchr1\t5\t9\tA\t-3\nchr1\t5\t9\tA\tx\n")
    )
    assert found.rows == {"A": {0: 5}}
    assert found.cells.quality[0].tolist()[-2:] == [0, 0]


@pytest.mark.parametrize("text", [b"", b"# only\n#headers\n", b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf#\r\n"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("listed", [None, ["A"]])
def test_a_file_without_fragments_is_refused(
    tmp_path: Path, text: bytes, form: str, listed: list[str] | None
) -> None:
    """Case 22: an empty file, and one of headers."""
    for range_bytes in (4, 1 << 20):
        with pytest.raises(InputError, match=r"f\.tsv: found no fragment; expected at least one line"):
            count(written(tmp_path, FORMS[form](text)), Way(listed=listed, range_bytes=range_bytes))


def test_a_file_of_invalid_lines_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found no fragment and 3 invalid lines"):
        count(written(tmp_path, b"a,b\n# x\n1,2\n3,4\n"), Way(count_invalid=True))


def test_a_file_without_a_line_on_the_assembly_is_refused(tmp_path: Path) -> None:
    """Case 7."""
    path = written(tmp_path, lines_of([("NC_1", 5, 9, "A"), ("NC_2", 5, 9, "A")]))
    with pytest.raises(
        InputError,
        match=r"f\.tsv: found 2 fragments on 'NC_1', 'NC_2', none on a chromosome of toy.*such as chr1",
    ):
        count(path)


# Case 1: files that were cut off


@pytest.mark.parametrize("size", [10, 900, -1])
@pytest.mark.parametrize("form", ["gzip", "many members", "bgzf", "zstd"])
def test_a_truncated_file_names_file_byte_and_line(tmp_path: Path, form: str, size: int) -> None:
    """Case 1: cut mid-stream; nothing is passed over with --on-invalid count either."""
    path = written(tmp_path, FORMS[form](lines_of(ROWS))[:size])
    for way in (Way(), Way(count_invalid=True, n_strands=3, text_bytes=100, read_bytes=500)):
        with pytest.raises(
            InputError, match=r"f\.tsv, after line [0-9]+: found .*byte .*; expected a whole file"
        ):
            count(path, way)


def test_text_cut_within_a_line_is_invalid(tmp_path: Path) -> None:
    """Case 1: as far as the line itself can tell."""
    text = lines_of(ROWS)[:-12]
    assert text.split(b"\n")[-1] == b"chr1\t663\t"
    with pytest.raises(
        InputError, match=r"f\.tsv, line 300: found 'chr1.t663.t'; expected 4 or more columns"
    ):
        count(written(tmp_path, text), Way(range_bytes=500))


def test_bgzf_without_its_last_block_is_refused(tmp_path: Path) -> None:
    """Case 1: what SnapATAC2 and BPCells accept without a word."""
    path = written(tmp_path, bgzf(lines_of(ROWS), end=b""))
    with pytest.raises(InputError, match=r"f\.tsv, after line 300: found the end of the file at byte"):
        count(path, Way(count_invalid=True))


@pytest.mark.parametrize("damaged", [[3], [0], [20], [3, 20], [30]])
def test_a_damaged_block_names_the_line_before_it(tmp_path: Path, damaged: list[int]) -> None:
    """Also where it is the first of its range, or where a range before it is damaged too."""
    text = lines_of(ROWS)
    blocks = [bytearray(bgzf_block(text[i : i + 200])) for i in range(0, len(text), 200)]
    for number in damaged:
        blocks[number][-6] ^= 1  # of its checksum
    path = written(tmp_path, b"".join(blocks) + END_OF_BGZF)
    sizes = [len(block) for block in blocks]
    n_before = [text[: 200 * number].count(b"\n") for number in damaged]
    for range_bytes in [1 << 20, sum(sizes[: damaged[-1]]) or 700, 1000, 333, sum(sizes[: damaged[-1] + 1])]:
        with pytest.raises(InputError) as caught:
            count(path, Way(range_bytes=range_bytes))
        message = str(caught.value)
        assert message.startswith(
            tuple(f"{path}, after line {n}: found damaged data in the BGZF block" for n in n_before)
        )


def test_a_changed_byte_in_any_range_never_changes_counts(tmp_path: Path) -> None:
    """Every byte of the file, one at a time: refused, or of no meaning."""
    text = lines_of(ROWS[:60])
    whole = bgzf(text, 250)
    way = Way(range_bytes=len(whole) // 3)
    expected = count(written(tmp_path, whole), way).essence()
    n_refused = 0
    for place in range(0, len(whole), 3):
        data = bytearray(whole)
        data[place] ^= 0x41
        try:
            found = count(written(tmp_path, bytes(data)), way)
        except InputError:
            n_refused += 1
        else:
            assert found.essence() == expected
    assert n_refused > len(whole) / 3 * 0.8


def test_a_damaged_head_of_a_block_that_a_range_begins_with_is_found(tmp_path: Path) -> None:
    text = lines_of(ROWS)
    blocks = [bytearray(bgzf_block(text[i : i + 500])) for i in range(0, len(text), 500)]
    for number in range(1, len(blocks)):
        damaged = [bytearray(block) for block in blocks]
        damaged[number][12] ^= 1
        path = written(tmp_path, b"".join(damaged) + END_OF_BGZF)
        for range_bytes in (sum(map(len, blocks[:number])), len(blocks[0]), 100, 1 << 20):
            with pytest.raises(InputError, match="BGZF block"):
                count(path, Way(range_bytes=range_bytes))


def test_strict_and_lenient_count_a_sound_file_alike(tmp_path: Path) -> None:
    path = written(tmp_path, lines_of(ROWS))
    peaks = [("chr1", 0, 400), ("chr1", 300, 800)]
    strict, lenient = (count(path, Way(peak_set(peaks), count_invalid=lenient)) for lenient in (False, True))
    assert strict.essence() == lenient.essence()
    assert strict.cells.lines == count_plainly(lines_of(ROWS), peaks, BINS, TOY).lines
