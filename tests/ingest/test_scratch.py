"""What a conversion puts down on the way: in a folder of the user's choice, and on a disk that is full."""

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compressed_files import bgzf
from killing import convert_apart
from stores import FRAGMENTS, Convert, all_bytes, digests, write_lines, write_peaks
from told import Said

from annatac_scale.errors import InputError, StoreError
from annatac_scale.ingest import convert as conversion
from annatac_scale.ingest import graph


@pytest.fixture
def fragments(tmp_path: Path) -> Path:
    path = tmp_path / "s.gz"
    path.write_bytes(bgzf(write_lines(tmp_path / "s.tsv", FRAGMENTS).read_bytes(), 500))
    return path


def stop(convert: Convert, fragments: Path, **options: Any) -> None:
    with pytest.raises(InputError, match="no barcode with 1,000 fragments"):
        convert(fragments, range_bytes=4000, **options)


def test_a_scratch_folder_holds_all_ranges_until_the_commit(
    tmp_path: Path, toy_convert: Convert, fragments: Path, said: Any
) -> None:
    scratch = tmp_path / "scratch"
    stop(toy_convert, fragments, scratch=scratch)
    (found,) = scratch.iterdir()
    assert re.fullmatch("annatac-s-[0-9a-f]{16}", found.name)
    n_ranges = -(-fragments.stat().st_size // 4000)
    assert len(list(found.glob("ranges/*"))) == n_ranges
    assert not (tmp_path / "atlas.zarr").exists()
    toy_convert(fragments, range_bytes=4000, min_fragments=0, scratch=scratch, progress=said)
    assert (said.found, said.done) == (fragments.stat().st_size, 0)
    assert list(scratch.iterdir()) == []
    toy_convert(fragments, "whole.zarr", min_fragments=0)
    assert digests(tmp_path / "atlas.zarr") == digests(tmp_path / "whole.zarr")


def test_stores_and_plans_share_a_scratch_folder_without_meeting(
    tmp_path: Path, toy_convert: Convert, fragments: Path, said: Any
) -> None:
    scratch, peaks = tmp_path / "scratch", write_peaks(tmp_path / "p.bed")
    stop(toy_convert, fragments, scratch=scratch)
    stop(toy_convert, fragments, scratch=scratch, peaks=peaks)
    stop(toy_convert, fragments, scratch=scratch, out="other.zarr")
    assert len(list(scratch.iterdir())) == 3
    options = {"range_bytes": 4000, "min_fragments": 0}
    toy_convert(fragments, "other.zarr", progress=said, scratch=scratch, **options)
    assert said.found == fragments.stat().st_size
    toy_convert(fragments, peaks=peaks, scratch=scratch, **options)
    assert len(list(scratch.iterdir())) == 1
    toy_convert(fragments, "whole.zarr", peaks=peaks, min_fragments=0)
    assert digests(tmp_path / "atlas.zarr") == digests(tmp_path / "whole.zarr")


def test_a_scratch_folder_that_was_emptied_costs_time_alone(
    tmp_path: Path, toy_convert: Convert, fragments: Path, said: Any
) -> None:
    stop(toy_convert, fragments, scratch=tmp_path / "scratch")
    shutil.rmtree(tmp_path / "scratch")
    options = {"scratch": tmp_path / "scratch", "range_bytes": 4000, "min_fragments": 0}
    toy_convert(fragments, progress=said, **options)
    assert said.found == 0


def test_what_a_kill_after_the_commit_left_in_scratch_is_removed_by_the_next_run(
    tmp_path: Path, toy_convert: Convert, fragments: Path
) -> None:
    scratch = tmp_path / "scratch"
    stop(toy_convert, fragments, scratch=scratch)
    shutil.copytree(scratch, tmp_path / "copy")
    options = {"scratch": scratch, "range_bytes": 4000, "min_fragments": 0}
    toy_convert(fragments, **options)
    shutil.copytree(tmp_path / "copy", scratch, dirs_exist_ok=True)
    (scratch / "mine").touch()
    assert toy_convert(fragments, **options).skipped == ["s"]
    assert [path.name for path in scratch.iterdir()] == ["mine"]


@pytest.mark.parametrize("in_scratch", [True, False], ids=["scratch", "store"])
def test_a_folder_that_takes_no_more_is_named_and_the_same_command_goes_on(
    tmp_path: Path, toy_convert: Convert, chrom_sizes: Path, in_scratch: bool
) -> None:
    """Case 4, with a limit to the size of files, which any user may set."""
    rows = [
        (chrom, start, end, f"{barcode}{i % 707}") for i, (chrom, start, end, barcode) in enumerate(FRAGMENTS)
    ]
    (tmp_path / "s.gz").write_bytes(bgzf(write_lines(tmp_path / "s.tsv", rows).read_bytes(), 500))
    options = {"min_fragments": 0, "range_bytes": 1 << 14, "workers": 2}
    options |= {"scratch": tmp_path / "scratch"} if in_scratch else {}
    message = convert_apart(
        _with_small_files, tmp_path / "s.gz", assembly="toy", chrom_sizes=chrom_sizes, select="all",
        out=tmp_path / "atlas.zarr", **options,
    )  # fmt: skip
    folder = tmp_path / "scratch" if in_scratch else tmp_path / "atlas.zarr"
    assert re.fullmatch(
        f"{folder}.*/ranges/[0-9]+: cannot be written .File too large.; expected room for it; free some, then .*",
        message,
    )
    toy_convert(tmp_path / "s.gz", **options)
    toy_convert(tmp_path / "s.gz", "whole.zarr", min_fragments=0)
    assert digests(tmp_path / "atlas.zarr") == digests(tmp_path / "whole.zarr")


def _with_small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() or not mount:
        pytest.skip("only root may mount a file system")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr!r}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("is_foreseen", [True, False])
def test_a_disk_that_fills_is_named_and_the_same_command_goes_on(
    tmp_path: Path,
    toy_convert: Convert,
    fragments: Path,
    small_disk: Path,
    is_foreseen: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Case 4, whether the room is missed before the work or in its middle."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes((1 << 20) - 40_000))
    options = {"scratch": small_disk, "range_bytes": 4000, "min_fragments": 0}
    with monkeypatch.context() as patched:
        if not is_foreseen:
            patched.setattr(conversion, "check_disks", lambda *_: None)
        with pytest.raises(StoreError) as caught:
            toy_convert(fragments, **options)
    assert str(caught.value).startswith(str(small_disk))
    assert "free some" in str(caught.value)
    how_much = "expected" if is_foreseen else f"another 0.[0-9] MB in {small_disk} for what is put down"
    assert re.search(how_much, str(caught.value))
    ballast.unlink()
    said = Said()
    toy_convert(fragments, progress=said, **options)
    assert (said.found > 0) is not is_foreseen
    assert said.found + said.done == fragments.stat().st_size
    assert all_bytes(small_disk) == {}
    toy_convert(fragments, "whole.zarr", min_fragments=0)
    assert digests(tmp_path / "atlas.zarr") == digests(tmp_path / "whole.zarr")


def test_what_was_put_down_for_other_islands_is_never_used(
    tmp_path: Path, toy_convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the store that it was for is gone, and another stands in its place."""
    fragments = write_lines(tmp_path / "s.tsv", FRAGMENTS)
    windows = str(write_lines(tmp_path / "w.bed", [("chr1", 0, 500), ("chr2", 100, 900)]))
    options = {"scratch": tmp_path / "scratch", "min_fragments": 0}

    def stop(*_: Any) -> None:
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(graph, "commit_fragments", stop)
        with pytest.raises(RuntimeError):
            toy_convert(fragments, **options)
    shutil.rmtree(tmp_path / "atlas.zarr")
    toy_convert(fragments, select=windows, **options)
    toy_convert(fragments, "anew.zarr", select=windows, min_fragments=0)
    assert digests(tmp_path / "atlas.zarr") == digests(tmp_path / "anew.zarr")
