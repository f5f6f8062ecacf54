"""Ctrl-C and SIGTERM while a conversion runs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compressed_files import bgzf
from stores import FRAGMENTS, Convert, digests, write_lines
from told import Said

from annatac_scale.store.info import describe
from annatac_scale.store.store import IslandStore

INTERRUPTED = Path(__file__).parent / "interrupted.py"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)], ids=["ctrl-c", "term"]
)
def test_a_conversion_that_is_interrupted_ends_in_time_and_goes_on(
    tmp_path: Path, chrom_sizes: Path, toy_convert: Convert, number: signal.Signals, code: int
) -> None:
    path = tmp_path / "s.gz"
    path.write_bytes(bgzf(write_lines(tmp_path / "s.tsv", FRAGMENTS * 4).read_bytes(), 500))
    options = ["--assembly", "toy", "--chrom-sizes", chrom_sizes, "--select", "all", "--min-fragments", "5"]
    options += ["--range-bytes", "4000"]
    command = [
        sys.executable,
        INTERRUPTED,
        tmp_path,
        "convert",
        path,
        "--out",
        tmp_path / "atlas.zarr",
        *options,
    ]
    process = subprocess.Popen([*map(str, command), "--workers", "2"], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in told
    assert ("interrupted; run the same command again to go on" in told) == (code == 130)
    assert describe(IslandStore.open(tmp_path / "atlas.zarr")).unfinished == ["s"]
    if number == signal.SIGINT:
        assert list((tmp_path / "atlas.zarr").rglob("*.partial")) == []
    else:  # it may end the process in the middle of a file
        (ranges,) = (tmp_path / "atlas.zarr" / ".incoming").rglob("ranges")
        (ranges / ".31.0123456789abcdef0123456789abcdef.partial").write_bytes(b"half")
    said = Said()
    toy_convert(path, range_bytes=4000, min_fragments=5, progress=said)
    assert 0 < said.found < path.stat().st_size
    assert said.found + said.done == path.stat().st_size
    assert list((tmp_path / "atlas.zarr").rglob("*.partial")) == []
    toy_convert(path, "whole.zarr", min_fragments=5)
    assert digests(tmp_path / "atlas.zarr") == digests(tmp_path / "whole.zarr")
