"""The peers of the stream, each where it runs: environments of their own, made once below a folder.

annbatch needs Python 3.12 and gets a virtual environment; scDataset needs torch and runs with our Python, from a folder
of its own on the path, so that no second torch is installed.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ANNBATCH = ("annbatch==0.3.1", "zarrs==0.2.3", "zarr==3.4.2", "anndata==0.13.4")
SCDATASET = ("scDataset==0.3.0",)
PYTHONS = ("python3.12", "python3.13")
_MADE = "made.json"


class Peer(NamedTuple):
    """python: to run it with; path: what PYTHONPATH must name, or nothing"""

    python: Path
    path: str = ""


def make(folder: Path, given: Path | None) -> dict[str, Peer]:
    """The peers that could be made; says which could not, and why. given: Python for annbatch; None looks for one."""
    found = {}
    python = given or find_python()
    if python is None:
        print(f"annbatch: skipped, found none of {', '.join(PYTHONS)} on the PATH; give --peer-python")
    elif _install(folder / "annbatch", ANNBATCH, python):
        found["annbatch"] = Peer(folder / "annbatch" / "bin" / "python")
    if _install(folder / "scdataset", SCDATASET, None):
        found["scdataset"] = Peer(Path(sys.executable), str(folder / "scdataset"))
    return found


def find_python() -> Path | None:
    """A Python for annbatch on the PATH that does start: a shim of pyenv may not."""
    for name in PYTHONS:
        path = shutil.which(name)
        if path and _runs([path, "-c", "import venv, sys; sys.exit(sys.version_info < (3, 12))"]) == "":
            return Path(path)
    return None


def _install(folder: Path, packages: Sequence[str], python: Path | None) -> bool:
    """Packages into a new environment of ``python``, or without what they need into a bare folder; kept once made."""
    made = [str(python or sys.executable), *packages]
    marker = folder / _MADE
    if marker.exists() and json.loads(marker.read_text())[1:] == made[1:]:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if python is None:
        steps = [[sys.executable, *pip, "--no-deps", "--target", str(folder), *packages]]
    else:
        own = str(folder / "bin" / "python")
        steps = [[str(python), "-m", "venv", str(folder)], [own, *pip, *packages]]
    for step in steps:
        failure = _runs(step)
        if failure:
            print(f"{packages[0]}: skipped, cannot be installed ({failure})")
            return False
    marker.write_text(json.dumps(made))
    return True


def _runs(command: Sequence[str]) -> str:
    """Why a command failed, in a line; empty where it did not."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
