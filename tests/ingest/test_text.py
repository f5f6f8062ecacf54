"""The text of fragment files in every compression and any ranges, and data that break off or change."""

import gzip
import hashlib
from pathlib import Path
from unittest.mock import patch

import pytest
from compressed_files import END_OF_BGZF, FORMS, bgzf, bgzf_block, many_members
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annatac_scale.errors import InputError
from annatac_scale.ingest.bgzf import BrokenTextError
from annatac_scale.ingest.text import (
    RANGE_BYTES,
    RangeReader,
    digest_of_parts,
    digest_of_pieces,
    look_at,
    n_lines_before,
)

TEXT = b"".join(b"chr1\t%d\t%d\tAAAC-%d\n" % (i, i + 50, i % 7) for i in range(400))
FEW = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}


def read(path: Path, text_bytes: int = 256, range_bytes: int = RANGE_BYTES) -> list[list[bytes]]:
    """The buffers of each range."""
    file = look_at(path, range_bytes)
    return [list(RangeReader(file, i, text_bytes=text_bytes).buffers()) for i in range(file.n_ranges)]


def joined(ranges: list[list[bytes]]) -> bytes:
    return b"".join(buffer for buffers in ranges for buffer in buffers)


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "f"
    path.write_bytes(data)
    return path


LINES = st.lists(
    st.one_of(st.binary(max_size=80), st.binary(min_size=200, max_size=400)).map(
        lambda line: line.replace(b"\n", b"")
    ),
    max_size=30,
)


@pytest.mark.parametrize("form", FORMS)
@given(
    lines=LINES,
    ended=st.booleans(),
    marked=st.booleans(),
    text_bytes=st.integers(1, 500),
    read_bytes=st.integers(1, 300),
    range_bytes=st.integers(1, 700) | st.just(1 << 20),
    block=st.integers(1, 300),
)
@settings(**FEW, max_examples=60)
def test_every_form_in_any_ranges_gives_each_line_once(
    tmp_path: Path,
    form: str,
    lines: list[bytes],
    ended: bool,
    marked: bool,
    text_bytes: int,
    read_bytes: int,
    range_bytes: int,
    block: int,
) -> None:
    """Cases 13 and 22: all forms, ended or not, with a byte order mark or not; lines longer than ranges and blocks."""
    text = b"a\tb\n" + b"\n".join(lines) + b"\n" * ended
    mark = b"\xef\xbb\xbf" * marked
    path = written(tmp_path, bgzf(mark + text, block) if form == "bgzf" else FORMS[form](mark + text))
    with patch("annatac_scale.ingest.bgzf.READ_BYTES", read_bytes):
        ranges = read(path, text_bytes, range_bytes)
    assert all(buffer.endswith(b"\n") for buffers in ranges for buffer in buffers)
    assert joined(ranges) == text + b"\n" * (not text.endswith(b"\n"))


def test_a_mark_over_the_border_of_ranges_and_blocks_is_left_out(tmp_path: Path) -> None:
    """Case 22 at a border."""
    for form in (bytes, lambda data: bgzf(data, 1), many_members):
        path = written(tmp_path, form(b"\xef\xbb\xbf" + TEXT[:90]))
        for range_bytes in (1, 2, 3, 30):
            assert joined(read(path, 1, range_bytes)).removesuffix(b"\n") == TEXT[:90].removesuffix(b"\n")


@pytest.mark.parametrize("form", ["plain", "bgzf"])
def test_all_ranges_have_lines_when_they_are_large_enough(tmp_path: Path, form: str) -> None:
    ranges = read(written(tmp_path, FORMS[form](TEXT)), 1 << 20, 700)
    assert len(ranges) > 5
    assert all(ranges[:-1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("range_bytes", [1, 100, 1000, 1 << 20])
def test_all_bytes_are_reported_once_and_digested(tmp_path: Path, form: str, range_bytes: int) -> None:
    data = FORMS[form](TEXT[:2000])
    path = written(tmp_path, data)
    file = look_at(path, range_bytes)
    told: list[int] = []
    readers = [RangeReader(file, i, told.append) for i in range(file.n_ranges)]
    for reader in readers:
        list(reader.buffers())
    assert sum(told) == len(data)
    assert sum(file.bytes_of_range(i) for i in range(file.n_ranges)) == len(data)
    digest = digest_of_parts(reader.digest() for reader in readers)
    assert digest == digest_of_pieces(path, range_bytes)
    pieces = [hashlib.sha256(data[i : i + range_bytes]).digest() for i in range(0, len(data), range_bytes)]
    assert digest == (pieces[0] if len(pieces) == 1 else hashlib.sha256(b"".join(pieces)).digest()).hex()


def test_an_empty_file_has_one_empty_range(tmp_path: Path) -> None:
    path = written(tmp_path, b"")
    assert read(path) == [[]]
    assert digest_of_parts([RangeReader(look_at(path), 0).digest()]) == hashlib.sha256().hexdigest()


def test_lines_before_a_range_are_counted(tmp_path: Path) -> None:
    path = written(tmp_path, bgzf(TEXT, 90))
    file = look_at(path, 500)
    for number in range(file.n_ranges):
        first = next(RangeReader(file, number).buffers(), None)
        if first is not None:
            assert first.startswith(TEXT.splitlines()[n_lines_before(file, number)])


# Forms that were put together


def test_a_file_of_both_kinds_of_members_and_zeros_behind_is_read_whole(tmp_path: Path) -> None:
    for data in (bgzf(TEXT) + gzip.compress(TEXT) + bytes(512), gzip.compress(TEXT) + bgzf(TEXT)):
        assert joined(read(written(tmp_path, data), range_bytes=200)) == TEXT + TEXT


def test_concatenated_bgzf_with_empty_blocks_inside_is_read_whole(tmp_path: Path) -> None:
    path = written(tmp_path, bgzf(TEXT) + bgzf(b"") + bgzf(TEXT, 33))
    for range_bytes in (50, 333, 1 << 20):
        assert joined(read(path, range_bytes=range_bytes)) == TEXT + TEXT


def test_blocks_that_tell_more_than_their_size_are_read_whole(tmp_path: Path) -> None:
    """The SAM specification lets blocks have further fields of their own."""
    plain_blocks = [bgzf_block(TEXT[i : i + 100]) for i in range(0, len(TEXT), 100)]
    blocks = []
    for block in plain_blocks:
        size = int.from_bytes(block[16:18], "little") + 6
        blocks.append(
            block[:10] + b"\x0c\0" + b"XY\x02\0??" + b"BC\x02\0" + size.to_bytes(2, "little") + block[18:]
        )
    path = written(tmp_path, b"".join(blocks) + END_OF_BGZF)
    assert gzip.decompress(path.read_bytes()) == TEXT
    for range_bytes in (300, 1 << 20):
        assert joined(read(path, range_bytes=range_bytes)) == TEXT


# Damage


def until_damage(path: Path) -> tuple[bytes, str | None]:
    """The text before the damage, and what is said of that."""
    given_out: list[bytes] = []
    try:
        given_out.extend(RangeReader(look_at(path), 0, text_bytes=64).buffers())
    except (BrokenTextError, InputError) as error:
        return b"".join(given_out), str(error)
    return b"".join(given_out), None


@pytest.mark.parametrize("form", ["gzip", "many members", "bgzf", "zstd"])
def test_data_cut_off_anywhere_are_found_after_the_lines_before(tmp_path: Path, form: str) -> None:
    """Case 1: at every place but the borders of members and frames: there a torn line alone may tell."""
    text = TEXT[: TEXT.index(b"\n", 600) + 1]
    whole = FORMS[form](text)
    starts = {
        "gzip": {0},
        "many members": {i for i in range(len(whole)) if whole.startswith(b"\x1f\x8b\x08", i)},
        "bgzf": {0},
        "zstd": {i for i in range(len(whole)) if whole.startswith(b"\x28\xb5\x2f\xfd", i)},
    }[form]
    unseen = set()
    for size in range(4 if form == "zstd" else 3, len(whole)):
        given_out, message = until_damage(written(tmp_path, whole[:size]))
        if message is None:
            unseen.add(size)
            given_out = given_out.removesuffix(b"\n")
        else:
            assert "byte" in message
        assert text.startswith(given_out)
    assert unseen <= starts


def test_bgzf_without_its_last_block_is_cut_off(tmp_path: Path) -> None:
    """Case 1: what SnapATAC2 and BPCells accept without a word."""
    path = written(tmp_path, bgzf(TEXT, end=b""))
    with pytest.raises(InputError, match=r"f, after line 400: found .* without BGZF's empty last block"):
        look_at(path)


@pytest.mark.parametrize("form", ["gzip", "many members", "bgzf"])
@pytest.mark.parametrize("range_bytes", [150, 1 << 20])
def test_a_changed_byte_is_found_or_changes_nothing(tmp_path: Path, form: str, range_bytes: int) -> None:
    text = TEXT[: TEXT.index(b"\n", 600) + 1]
    whole = FORMS[form](text)
    missed = []
    for place in range(2, len(whole)):
        data = bytearray(whole)
        data[place] ^= 0x55
        try:
            ranges = read(written(tmp_path, bytes(data)), range_bytes=range_bytes)
        except (BrokenTextError, InputError):
            continue
        if joined(ranges) != text:
            missed.append(place)
    # A range may pass over a block without a proper head: that is found when ranges are put together (test_cells.py).
    heads = {i + k for i in range(len(whole)) if whole.startswith(b"\x1f\x8b\x08\x04", i) for k in range(18)}
    assert set(missed) <= (heads if range_bytes == 150 and form == "bgzf" else set())


def test_other_bytes_behind_the_gzip_data_are_refused(tmp_path: Path) -> None:
    for rest in (b"\0\0rest", b"chr1\t1\t2\tA\n"):
        with pytest.raises(BrokenTextError, match="not gzip data"):
            read(written(tmp_path, gzip.compress(TEXT) + rest))


def test_other_members_among_bgzf_blocks_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, bgzf(TEXT) + gzip.compress(TEXT) + bgzf(TEXT))
    with pytest.raises(BrokenTextError, match="no BGZF block"):
        read(path)


@pytest.mark.parametrize("form", FORMS)
def test_a_line_without_end_is_refused(tmp_path: Path, form: str) -> None:
    path = written(
        tmp_path, TEXT + bytes(6_000_000) if form == "plain" else FORMS["gzip"](TEXT + bytes(9_000_000))
    )
    given_out: list[bytes] = []
    with pytest.raises(BrokenTextError, match="a line of over"):
        given_out.extend(RangeReader(look_at(path), 0, text_bytes=256).buffers())
    assert b"".join(given_out) == TEXT


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"BZh9", "bzip2"),
        (b"PK\x03\x04", "zip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"PAR1", "Parquet"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, start: bytes, kind: str) -> None:
    with pytest.raises(InputError, match=f"found {kind} data"):
        read(written(tmp_path, start + bytes(50)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: cannot be read"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["shrunk", "grown", "replaced", "gone"])
def test_a_file_that_changes_after_it_was_looked_at_is_refused(
    tmp_path: Path, form: str, change: str
) -> None:
    path = written(tmp_path, FORMS[form](TEXT))
    file = look_at(path, 500)
    data = path.read_bytes()
    path.unlink()
    if change != "gone":
        path.write_bytes(
            {"shrunk": data[:-1], "grown": data + data, "replaced": FORMS[form](TEXT[::-1])}[change]
        )
    with pytest.raises(InputError, match=r"f: (changed|cannot be read)"):
        list(RangeReader(file, 0).buffers())


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, form: str) -> None:
    path = written(tmp_path, FORMS[form](TEXT))
    with patch("annatac_scale.ingest.bgzf.READ_BYTES", 100):
        buffers = RangeReader(look_at(path), 0, text_bytes=1).buffers()
        next(buffers)
        path.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(InputError, match="f: changed while it was read"):
            list(buffers)
