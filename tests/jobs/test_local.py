"""The job for this machine, for real: two workers on Ray, asked to leave in the middle."""

import os
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

import anndata
import pytest
from waiting import wait_until

from annatac_scale import api

JOB = Path(__file__).parents[2] / "jobs" / "local" / "pretrain.sh"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_local_run_that_is_asked_to_leave_resumes_with_the_same_line(tmp_path: Path) -> None:
    store, out = tmp_path / "atlas.zarr", tmp_path / "run"
    with as_file(files("annatac_scale") / "data" / "cerebellum.h5ad") as shipped:
        cells = anndata.read_h5ad(shipped)
    # Fast steps: what is looked at are the starts and the end.
    cells[:, cells.var_names.str.startswith("chr1:")].copy().write_h5ad(tmp_path / "cells.h5ad")
    api.convert([tmp_path / "cells.h5ad"], assembly="mm9", select="all", out=store)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MORE": "--epochs 12 --checkpoint-steps 5"}
    command = ["bash", str(JOB), str(store), str(out)]
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_until(lambda: any(out.glob("checkpoints/step-*.pt")), "there was a checkpoint")
        first.terminate()
        assert first.wait(120) == 143, (tmp_path / "first.log").read_text()
    finally:
        first.kill()
    assert not (out / "model").exists()
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "resuming" in second.stderr
    assert (out / "model" / "weights.safetensors").exists()
