"""Files that can only be read from their beginning: counted by strands, put down by parts."""

import gzip
import hashlib
from pathlib import Path
from unittest.mock import patch

import pytest
from counted import Way, count, counting_of
from stores import FRAGMENTS

from annatac_scale.ingest import fragments
from annatac_scale.ingest.cells import choose_cells
from annatac_scale.ingest.fragments import count_stream, spill_names
from annatac_scale.ingest.spill import Spill
from annatac_scale.ingest.text import RangeReader, TextFile, look_at
from annatac_scale.store.place import Folder

TEXT = "".join("\t".join(map(str, row)) + "\n" for row in FRAGMENTS).encode()
BUFFER_BYTES = 1000


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two buffers of about 40 lines."""

    def reader(*arguments: object) -> RangeReader:
        return RangeReader(*arguments, text_bytes=BUFFER_BYTES)  # type: ignore[arg-type]

    monkeypatch.setattr(fragments, "_BUFFERS_OF_PART", 2)
    monkeypatch.setattr(fragments, "RangeReader", reader)
    monkeypatch.setattr("annatac_scale.ingest.bgzf.READ_BYTES", 100)


@pytest.fixture
def stream(tmp_path: Path) -> TextFile:
    path = tmp_path / "s.tsv.gz"
    path.write_bytes(gzip.compress(TEXT))
    return look_at(path)


def counted_lines(file: TextFile, n_strands: int, place: Folder) -> int:
    """Count a stream; the lines that were counted in this run."""
    lines = []
    count_stream(file, n_strands, counting_of(Way()), place, lambda n_bytes, n_lines: lines.append(n_lines))
    return sum(lines)


@pytest.mark.parametrize("n_strands", [1, 3])
@pytest.mark.usefixtures("small_parts")
def test_no_part_holds_more_than_its_buffers_and_the_file_is_digested_once(
    tmp_path: Path, stream: TextFile, n_strands: int
) -> None:
    place = Folder(str(tmp_path / "scratch"))
    assert counted_lines(stream, n_strands, place) == len(FRAGMENTS)
    names = spill_names(stream, place)
    lines = [Spill(place, name).summary["lines"]["lines"] for name in names]
    assert sum(lines) == len(FRAGMENTS)
    assert len(names) > 3 * n_strands
    assert max(lines) < 0.1 * len(FRAGMENTS)
    cells = choose_cells(stream, place, names, counting_of(Way()), 0, 0)
    assert cells.digest == hashlib.sha256(Path(stream.location).read_bytes()).hexdigest()
    assert cells.lines["lines"] == len(FRAGMENTS)


@pytest.mark.parametrize("n_strands", [1, 3])
def test_parts_do_not_change_what_is_counted(stream: TextFile, n_strands: int) -> None:
    path = Path(stream.location)
    whole = count(path, Way(n_strands=n_strands)).essence()
    for buffers in (1, 2, 7):
        with patch.object(fragments, "_BUFFERS_OF_PART", buffers):
            assert count(path, Way(n_strands=n_strands, text_bytes=500, read_bytes=100)).essence() == whole


@pytest.mark.parametrize("n_strands", [1, 3])
@pytest.mark.usefixtures("small_parts")
def test_parts_that_a_stopped_run_left_are_not_counted_again(
    tmp_path: Path, stream: TextFile, n_strands: int
) -> None:
    place = Folder(str(tmp_path / "scratch"))
    counted_lines(stream, n_strands, place)
    names = spill_names(stream, place)
    expected = choose_cells(stream, place, names, counting_of(Way()), 0, 0)
    assert counted_lines(stream, n_strands, place) == 0
    lost = names[1], names[-1]
    n_lost = sum(Spill(place, name).summary["lines"]["lines"] for name in lost)
    for name in (*lost, "parts.json"):
        place.remove(name)
    assert counted_lines(stream, n_strands, place) == n_lost
    assert spill_names(stream, place) == names
    again = choose_cells(stream, place, names, counting_of(Way()), 0, 0)
    assert (again.lines, again.digest, again.barcodes) == (expected.lines, expected.digest, expected.barcodes)
    assert (again.quality == expected.quality).all()
