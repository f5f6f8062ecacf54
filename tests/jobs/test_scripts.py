"""The scripts of jobs/ are sound, and every command line of annatac in there is one that annatac understands."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from manifests import AWS_DEFINITION, AWS_SUBMISSION, GOOGLE, JOBS, RAYJOB, read_json, read_yaml

from annatac_scale.cli import main

SCRIPTS = sorted([*JOBS.glob("*/*.sh"), *JOBS.glob("slurm/*.sbatch")])
PAGES = sorted(JOBS.rglob("*.md"))

# What a script finds in its PATH in place of the real thing: each writes down its words. A Ray node runs until it is
# ended, so that a script that forgets to end one is found out; annatac begins when the nodes in WAITS_FOR have begun.
STAND_IN = f"""#!{sys.executable}
import json, os, sys, time
name = os.path.basename(sys.argv[0])
with open(os.environ["WORDS"], "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "ray" and sys.argv[1] in os.environ.get("RAY_FAILS", "").split():
    sys.exit(1)
if "--block" in sys.argv:
    import signal
    signal.pause()
if name == "squeue":
    print("RUNNING")
while name == "annatac" and not all(
    f'"{{word}}"' in open(os.environ["WORDS"]).read() for word in os.environ.get("WAITS_FOR", "").split()
):
    time.sleep(0.05)
if name == "annatac":
    sys.exit(int(os.environ.get("STATUS", 0)))
"""
OF_SLURM = {
    "SLURM_JOB_ID": "123",
    "SLURM_JOB_NAME": "job",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_ARRAY_TASK_ID": "2",
    "SLURM_ARRAY_TASK_MAX": "16",
}


def words_of(script: Path, folder: Path, *arguments: str, **environment: str) -> list[list[str]]:
    """What a script calls, in the order of the calls, when all of that is there and does nothing."""
    for name in ("annatac", "ray", "srun", "squeue", "scontrol"):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(STAND_IN)
        (folder / "bin" / name).chmod(0o755)
    (folder / "bin" / "activate").touch()
    given = {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "WORDS": str(folder / "words"), "VENV": str(folder),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(script), *arguments],
        cwd=folder, env={**os.environ, **OF_SLURM, **given, **environment},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == int(environment.get("STATUS", 0)), done.stderr
    return [json.loads(line) for line in (folder / "words").read_text().splitlines()]


def check_words(words: list[str]) -> None:
    """Raises click.UsageError where annatac would not understand its command line."""
    name, *arguments = words[1:]
    if name not in main.commands:
        raise click.UsageError(f"no command {name}")
    main.commands[name].make_context(name, arguments)


def lines_of_page(page: Path) -> Iterator[list[str]]:
    """Command lines in the code of a page: inline, in blocks, or indented; a command's mere name is none."""
    text = page.read_text().replace("\\\n", " ")
    code = re.findall(r"```\w*\n(.*?)```", text, re.S) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    code += re.findall(r"^    (.*)", text, re.M)
    for line in "\n".join(code).splitlines():
        found = re.search(r"(?:^|\s)(?:annatac|-m annatac_scale) ([a-z]+ .+)", line)
        if found is not None:
            yield ["annatac", *shlex.split(found[1], comments=True)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found is not None, "shellcheck is not there; it comes with the extra test"
    done = subprocess.run([found, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_call_annatac_as_it_understands(script: Path, tmp_path: Path) -> None:
    arguments = ("in", "out") if script.suffix == ".sh" else ()
    called = [words for words in words_of(script, tmp_path, *arguments) if words[0] == "annatac"]
    assert called
    for words in called:
        check_words(words)


def test_a_wrong_command_line_is_noticed() -> None:
    for wrong in (
        "annatac pretrain s --outt o",
        "annatac pretrain s --out o --preset huge",
        "annatac pretend s",
    ):
        with pytest.raises(click.UsageError):
            check_words(wrong.split())


def test_manifests_call_annatac_as_it_understands() -> None:
    given = {**read_json(AWS_DEFINITION)["parameters"], **read_json(AWS_SUBMISSION)["parameters"]}
    command = read_json(AWS_DEFINITION)["containerProperties"]["command"]
    check_words([given[word[5:]] if word.startswith("Ref::") else word for word in command])
    (group,) = read_json(GOOGLE)["taskGroups"]
    (runnable,) = group["taskSpec"]["runnables"]
    check_words(runnable["container"]["commands"])
    check_words(shlex.split(read_yaml(RAYJOB)["spec"]["entrypoint"]))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(JOBS)))
def test_pages_show_command_lines_that_annatac_understands(page: Path) -> None:
    for words in lines_of_page(page):
        check_words(words)


def test_command_lines_are_found_in_pages(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`annatac info s --cost` and `annatac pretrain` alone\n\n    X=1 annatac predict s\n\n"
        "```sh\ntorchrun -m annatac_scale pretrain s \\\n  --out o\n```\n"
    )
    assert sorted(lines_of_page(page)) == [
        ["annatac", "info", "s", "--cost"],
        ["annatac", "predict", "s"],
        ["annatac", "pretrain", "s", "--out", "o"],
    ]


def test_every_folder_of_jobs_has_a_page_and_its_links_lead_somewhere() -> None:
    for folder in filter(Path.is_dir, JOBS.iterdir()):
        assert (folder / "README.md").exists(), folder
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_pretraining_on_slurm_starts_a_ray_node_on_each_machine_and_asks_for_all_workers(
    tmp_path: Path,
) -> None:
    asked = {"ADDRESS": "10.0.0.1", "PER_NODE": "4", "WAITS_FOR": "--head srun"}
    called = words_of(JOBS / "slurm" / "pretrain.sbatch", tmp_path, **asked)
    (head,) = [words for words in called if words[:3] == ["ray", "start", "--head"]]
    assert {"--node-ip-address=10.0.0.1", "--port=20123", "--num-cpus=8"} <= set(head)
    (others,) = [words for words in called if words[0] == "srun"]
    assert {"--relative=1", "--nodes=2", "--ntasks=2", "--address=10.0.0.1:20123"} <= set(others)
    (run,) = [words for words in called if words[0] == "annatac"]
    assert run[run.index("--workers") + 1] == "12"
    assert "--gpus" in run
    assert not any(words[0] == "scontrol" for words in called)


def test_a_run_that_was_asked_to_leave_queues_its_job_again_and_a_failed_one_does_not(tmp_path: Path) -> None:
    for status, again in (("143", True), ("2", False)):
        folder = tmp_path / status
        folder.mkdir()
        called = words_of(JOBS / "slurm" / "pretrain.sbatch", folder, STATUS=status)
        assert (["scontrol", "requeue", "123"] in called) is again


def test_a_job_whose_ray_does_not_start_ends(tmp_path: Path) -> None:
    job = JOBS / "slurm" / "pretrain.sbatch"
    called = words_of(job, tmp_path, RAY_FAILS="health-check start", STATUS="1")
    assert not any(words[0] == "annatac" for words in called)


def test_prediction_on_slurm_takes_its_share(tmp_path: Path) -> None:
    asked = {"STORE": "s3://bucket/two.zarr", "OUT": "s3://bucket/labels"}
    (run,) = words_of(JOBS / "slurm" / "predict.sbatch", tmp_path, **asked)
    assert run[2] == "s3://bucket/two.zarr"
    assert run[run.index("--out") + 1] == "s3://bucket/labels"
    assert run[run.index("--part") + 1] == "2/16"
