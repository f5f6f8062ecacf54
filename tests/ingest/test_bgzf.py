"""The text of fragment files in every compression, and data that break off."""

import gzip
from pathlib import Path

import pytest
from compressed_files import FORMS, bgzf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from annatac_scale.errors import InputError
from annatac_scale.ingest.bgzf import BrokenTextError, whole_lines

TEXT = b"".join(b"chr1\t%d\t%d\tAAAC-%d\n" % (i, i + 50, i % 7) for i in range(400))


def read(path: Path, text_bytes: int = 256) -> list[bytes]:
    return list(whole_lines(path, lambda _: None, text_bytes))


@pytest.mark.parametrize("form", FORMS)
@given(
    lines=st.lists(st.binary(max_size=80).map(lambda line: line.replace(b"\n", b"")), max_size=30),
    ended=st.booleans(),
    text_bytes=st.integers(1, 500),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_every_form_gives_the_same_whole_lines(
    tmp_path: Path, form: str, lines: list[bytes], ended: bool, text_bytes: int
) -> None:
    text = b"a\tb\n" + b"\n".join(lines) + b"\n" * ended
    path = tmp_path / "f"
    path.write_bytes(FORMS[form](text))
    buffers = read(path, text_bytes)
    assert all(buffer.endswith(b"\n") for buffer in buffers)
    assert b"".join(buffers) == text + b"\n" * (not text.endswith(b"\n"))


@pytest.mark.parametrize("form", FORMS)
def test_a_byte_order_mark_is_left_out(tmp_path: Path, form: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(FORMS[form](b"\xef\xbb\xbf" + TEXT))
    assert b"".join(read(path)) == TEXT


def test_a_file_of_both_kinds_of_members_and_zeros_behind_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bgzf(TEXT) + gzip.compress(TEXT) + bytes(512))
    assert b"".join(read(path)) == TEXT + TEXT


@pytest.mark.parametrize("form", ["gzip", "many members", "bgzf"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_data_that_break_off_are_found_after_the_lines_before(
    tmp_path: Path, form: str, share: float
) -> None:
    whole = FORMS[form](TEXT)
    path = tmp_path / "f"
    path.write_bytes(whole[: int(len(whole) * share)])
    given_out = []
    with pytest.raises(BrokenTextError, match="byte"):
        given_out.extend(whole_lines(path, lambda _: None, 256))
    assert TEXT.startswith(b"".join(given_out))


def test_bgzf_without_its_last_block_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bgzf(TEXT, end=b""))
    with pytest.raises(BrokenTextError, match="without BGZF's empty last block"):
        read(path)


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for form in ("gzip", "bgzf"):
        data = bytearray(FORMS[form](TEXT))
        data[len(data) // 2] ^= 0x55
        path.write_bytes(data)
        with pytest.raises(BrokenTextError):
            read(path)


def test_other_bytes_behind_the_gzip_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(gzip.compress(TEXT) + b"\0\0rest")
    with pytest.raises(BrokenTextError, match="not gzip data"):
        read(path)


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(3_000_000))
    with pytest.raises(BrokenTextError, match="a line of over"):
        read(path)


@pytest.mark.parametrize(
    ("start", "kind"), [(b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh9", "bzip2"), (b"PK\x03\x04", "zip")]
)
def test_other_compressions_are_named(tmp_path: Path, start: bytes, kind: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(start + bytes(50))
    with pytest.raises(InputError, match=f"found {kind} data"):
        read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: cannot be read"):
        read(tmp_path / "nowhere")


def test_all_bytes_of_the_file_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bgzf(TEXT))
    counted = []
    list(whole_lines(path, counted.append))
    assert sum(counted) == path.stat().st_size
