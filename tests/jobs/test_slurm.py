"""The jobs of jobs/slurm on a Slurm that runs on this machine. Needs Debian's packages slurm-wlm and munge."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import pandas as pd
import pytest
from slurm_daemons import Slurm, missing_programs, running_slurm
from waiting import wait_until

from annatac_scale import api
from annatac_scale.annotate.labels import LabelsFolder

JOBS = Path(__file__).parents[2] / "jobs" / "slurm"
N_CELLS = 801
EPOCHS, CHECKPOINT_STEPS = 20, 5
ON_CPUS = ("--gres=none", "--cpus-per-task=1", "--mem=2G")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
]


@dataclass
class Site:
    """A cluster, and a folder that its nodes share."""

    slurm: Slurm
    shared: Path

    def submit(self, job: str, *options: str, **lines: str) -> str:
        """Submit a job with the lines of its top edited."""
        # Ray keeps the token of its cluster at home: not in that of whoever tests.
        lines |= {"VENV": str(self.shared), "HOME": str(self.shared)}
        return self.slurm.submit(JOBS / job, *options, cwd=self.shared, **lines)

    def pretrain(self, name: str) -> str:
        """Submit a pretraining on two machines with a worker each."""
        more = f"--epochs {EPOCHS} --checkpoint-steps {CHECKPOINT_STEPS} --set train.min_steps=0"
        return self.submit(
            "pretrain.sbatch", "--nodes=2", *ON_CPUS, f"--job-name={name}", STORE=str(self.shared / "atlas.zarr"),
            OUT=str(self.shared / name), PRESET="tiny", PER_NODE="1", DEVICE="", MORE=more,
        )  # fmt: skip

    def finish(self, job: str) -> None:
        """Wait for the end of a job, which has to be a good one."""
        wait_until(lambda: self.slurm.has_ended(job), f"job {job} ended")
        assert self.slurm.states(job) == {"COMPLETED"}, self.log()

    def newest(self, name: str) -> int:
        """Steps that the newest checkpoint of a run has behind it; 0 without one."""
        return max(
            (int(path.stem[5:]) for path in (self.shared / name / "checkpoints").glob("step-*.pt")), default=0
        )

    def log(self, name: str = "*") -> str:
        """What all jobs said, or one."""
        return "\n".join(path.read_text() for path in sorted(self.shared.glob(f"{name}.log")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    shared = tmp_path_factory.mktemp("shared")
    (shared / "bin").mkdir()
    (shared / "bin" / "activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    with as_file(files("annatac_scale") / "data" / "cerebellum.h5ad") as shipped:
        shutil.copy(shipped, shared / "cells.h5ad")
    (shared / "samples.tsv").write_text("sample\tpath\none\tcells.h5ad\n")
    with running_slurm() as slurm:
        yield Site(slurm, shared)


@pytest.fixture(scope="module")
def atlas(site: Site) -> Path:
    """The store that the job converts a sheet into."""
    store = site.shared / "atlas.zarr"
    sheet = str(site.shared / "samples.tsv")
    site.finish(
        site.submit(
            "convert.sbatch", *ON_CPUS[1:], SHEET=sheet, STORE=str(store), ASSEMBLY="mm9", SELECT="all"
        )
    )
    return store


@pytest.fixture(scope="module")
def beside(site: Site, atlas: Path) -> dict[str, str]:
    """Two jobs that pretrain side by side, each with a Ray node on each machine; "cancelled" is, in the middle."""
    jobs = {name: site.pretrain(name) for name in ("undisturbed", "cancelled")}
    wait_until(lambda: site.newest("cancelled") > 0, "there was a checkpoint")
    site.slurm.call("scancel", jobs["cancelled"])
    wait_until(lambda: site.slurm.has_ended(jobs["cancelled"]), "the job ended")
    site.finish(jobs["undisturbed"])
    return jobs


@pytest.fixture(scope="module")
def undisturbed(site: Site, beside: dict[str, str]) -> Path:
    """The model of a pretraining that nothing happened to."""
    return site.shared / "undisturbed" / "model"


def test_a_sheet_is_converted(atlas: Path) -> None:
    assert api.info(str(atlas)).to_dict()["n_cells"] == N_CELLS


def test_two_machines_pretrain_one_model(site: Site, undisturbed: Path) -> None:
    assert (undisturbed / "weights.safetensors").exists()
    assert "2 workers" in site.log("undisturbed-*")


def test_a_job_that_is_warned_and_then_queued_again_ends_with_the_same_weights(
    site: Site, undisturbed: Path
) -> None:
    job = site.pretrain("disturbed")
    wait_until(lambda: site.newest("disturbed") > 0, "there was a checkpoint")
    # As Slurm does 120 s before the time limit: the job itself has to see to it that it is queued again.
    site.slurm.call("scancel", "--batch", "--signal=TERM", job)
    wait_until(lambda: site.slurm.facts(job)[0]["Restarts"] == "1", "the job had queued itself again")
    kept = site.newest("disturbed")
    assert kept > 0
    wait_until(lambda: site.newest("disturbed") > kept, "there was another checkpoint")
    # As Slurm does in a preemption.
    site.slurm.call("scontrol", "requeue", job)
    site.finish(job)
    assert site.slurm.facts(job)[0]["Restarts"] == "2"
    assert site.log("disturbed-*").count("resuming") == 2
    weights = [path / "weights.safetensors" for path in (undisturbed, site.shared / "disturbed" / "model")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_cancelled_job_stays_cancelled(site: Site, beside: dict[str, str]) -> None:
    assert site.slurm.states(beside["cancelled"]) == {"CANCELLED"}
    assert site.slurm.facts(beside["cancelled"])[0]["Restarts"] == "0"
    assert not (site.shared / "cancelled" / "model").exists()


@pytest.mark.parametrize(
    ("asked", "state"),
    [
        pytest.param(("scancel",), "CANCELLED", id="cancelled"),
        pytest.param(("scancel", "--batch", "--signal=TERM"), "PENDING", id="warned"),
    ],
)
def test_a_run_that_leaves_in_order_is_queued_again_unless_its_job_was_cancelled(
    site: Site, tmp_path: Path, asked: tuple[str, ...], state: str
) -> None:
    # Stand-ins: cancelled, a real run may be faster killed than gone.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f"export PATH={tmp_path / 'bin'}:$PATH\n")
    for name, text in (
        ("ray", 'case "$*" in *--block*) exec sleep 1000;; esac'),
        ("annatac", f"trap 'kill $!; exit 143' TERM; touch {tmp_path / 'started'}; sleep 1000 & wait"),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = site.slurm.submit(
        JOBS / "pretrain.sbatch", "--nodes=2", *ON_CPUS, cwd=tmp_path, VENV=str(tmp_path), PER_NODE="1"
    )
    wait_until((tmp_path / "started").exists, "the run had started")
    site.slurm.call(*asked, job)
    wait_until(lambda: site.slurm.n_idle() == 2, "the nodes were free")
    assert site.slurm.states(job) == {state}
    site.slurm.call("scancel", job)


def test_the_tasks_of_an_array_share_the_labels_of_a_store(
    site: Site, atlas: Path, undisturbed: Path, tmp_path: Path
) -> None:
    tuned = site.shared / "tuned"
    api.finetune(atlas, model=undisturbed, labels="cell_type", out=tuned, epochs=1)
    labels = site.shared / "labels"
    given = {"STORE": str(atlas), "MODEL": str(tuned / "model"), "OUT": str(labels)}
    site.finish(site.submit("predict.sbatch", "--array=1-2", *ON_CPUS, **given))
    found = pd.read_parquet(labels)
    assert len(found) == N_CELLS
    assert LabelsFolder.open(labels).manifest.complete
    api.predict(atlas, model=tuned / "model", out=tmp_path / "alone")
    pd.testing.assert_frame_equal(found, pd.read_parquet(tmp_path / "alone"))
