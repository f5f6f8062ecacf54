"""The record of where a sample came from, and what it takes for the same."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from annatac_scale.errors import InputError
from annatac_scale.ingest.provenance import difference, digested, stamps

OPTIONS = {"qc": True, "min_fragments": 5}


def record(files: dict[str, Path], piece_bytes: int = 10) -> dict[str, Any]:
    return {
        "kind": "fragments",
        "inputs": digested(stamps(files), {}, piece_bytes),
        "options": dict(OPTIONS),
    }


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "data").write_bytes(b"twenty-five bytes of data")
    (tmp_path / "peaks").write_bytes(b"peaks")
    return {"data": tmp_path / "data", "peaks": tmp_path / "peaks"}


def test_files_are_digested_whole_or_in_pieces(files: dict[str, Path]) -> None:
    data, peaks = digested(stamps(files), {}, 10)
    pieces = [hashlib.sha256(piece).digest() for piece in (b"twenty-fiv", b"e bytes of", b" data")]
    assert (data["role"], data["size"], data["path"]) == ("data", 25, str(files["data"]))
    assert data["sha256"] == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert peaks["sha256"] == hashlib.sha256(b"peaks").hexdigest()
    known = digested(stamps(files), {"data": "known"}, 10)
    assert [entry["sha256"] for entry in known] == ["known", peaks["sha256"]]


def test_moved_copied_and_touched_files_are_the_same(tmp_path: Path, files: dict[str, Path]) -> None:
    then = record(files)
    assert difference(then, "fragments", files, OPTIONS) == ""
    os.utime(files["data"], ns=(1, 1))
    moved = {**files, "peaks": files["peaks"].rename(tmp_path / "moved")}
    assert difference(then, "fragments", moved, OPTIONS) == ""


def test_a_file_of_the_same_size_and_time_elsewhere_is_read(tmp_path: Path, files: dict[str, Path]) -> None:
    then = record(files)
    other = tmp_path / "other"
    other.write_bytes(b"twenty-five bytes of DATA")
    os.utime(other, ns=(1, files["data"].stat().st_mtime_ns))
    assert "other (data) has other content" in difference(
        then, "fragments", {**files, "data": other}, OPTIONS
    )


def test_what_differs_is_named(files: dict[str, Path]) -> None:
    then = record(files)
    for kind, now, options, message in [
        ("h5ad", files, OPTIONS, "it was made from fragments, now h5ad"),
        ("fragments", files, {**OPTIONS, "qc": False}, "it was made with qc = True, now False"),
        ("fragments", files, {"qc": True}, "it was made with min_fragments = 5, now None"),
        ("fragments", {"data": files["data"]}, OPTIONS, "it was made with a file for peaks"),
        (
            "fragments",
            files | {"barcodes": files["peaks"]},
            OPTIONS,
            "it was made without a file for barcodes",
        ),
    ]:
        assert difference(then, kind, now, options) == message
    files["peaks"].write_bytes(b"PEAKS, and more")
    assert difference(then, "fragments", files, OPTIONS).endswith("peaks (peaks) has other content than then")


def test_a_file_that_is_gone_is_named(tmp_path: Path, files: dict[str, Path]) -> None:
    files["data"].unlink()
    with pytest.raises(InputError, match="data: cannot be read"):
        stamps(files)
