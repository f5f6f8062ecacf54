"""The command line in processes of its own: ``python -m``, and Ctrl-C."""

import gzip
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest
from command_line import N_CELLS, Atlas, done, files_below, strict_json

from annatac_scale.store.metadata import committed_samples


def start(*words: Any) -> "subprocess.Popen[str]":
    """A process of its own, which Ctrl-C interrupts even where this one ignores it."""
    return subprocess.Popen(
        [sys.executable, "-m", "annatac_scale", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def test_the_package_runs_as_a_module(atlas: Atlas) -> None:
    process = start("info", atlas.store, "--json")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert strict_json(stdout)["n_cells"] == N_CELLS
    process = start("info", "nosuch")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.startswith("annatac: error: nosuch: ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
def test_training_that_was_asked_to_end_keeps_its_last_step_and_goes_on_to_the_same_model(
    atlas: Atlas, number: signal.Signals
) -> None:
    words = ("--preset", "tiny", "--epochs", 20, "--set", "train.patience=100")
    cut, uncut = atlas.folder / f"cut{number}", atlas.folder / "uncut"
    process = start("pretrain", atlas.store, "--out", cut, *words)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("epoch 2:"):
            process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    found = re.fullmatch(
        r"annatac: .*: asked to end, and ended after (\d+) steps, which are kept; the same command goes on\n",
        lines[-1],
    )
    assert found
    assert not any("Traceback" in line for line in lines)
    assert not (cut / "model").exists()
    resumed = done("pretrain", atlas.store, "--out", cut, *words)
    assert f"resuming {cut} after {found[1]} steps: " in resumed.stderr
    done("pretrain", atlas.store, "--out", uncut, *words)
    assert files_below(cut / "model") == files_below(uncut / "model")


def test_conversion_that_was_interrupted_leaves_no_sample_and_goes_on(atlas: Atlas) -> None:
    lines = gzip.decompress(atlas.fragments.read_bytes())
    large = atlas.folder / "large.tsv"
    large.write_bytes(lines * 200)
    words = ("convert", large, *atlas.toy, "--min-fragments", 1, "--out", atlas.folder / "large.zarr")
    process = start(*words)
    while not (atlas.folder / "large.zarr").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the machine converted faster than it was interrupted")
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "annatac: interrupted; run the same command again to go on"
    store = atlas.folder / "large.zarr"
    # A range that was counted before the interrupt is kept for the next run; a store without any is removed.
    assert not store.exists() or committed_samples(store) == []
    assert done(*words).stdout.splitlines()[0] == "converted: large"
    found = strict_json(done("info", store, "--json").stdout)
    assert [sample["name"] for sample in found["samples"]] == ["large"]
    assert found["unfinished"] == []
