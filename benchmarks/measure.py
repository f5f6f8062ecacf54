"""Runs one command and says what it cost: CPU and wall seconds and peak memory of its process tree.

    python benchmarks/measure.py FIGURES.json command argument ...

It is a small process of its own, since a child's peak memory counts what its parent held when it was forked.
CPU seconds are of all processes that were waited for; ``rss_mb`` is the largest peak of one process, as the kernel
keeps it; ``tree_rss_mb`` the largest sum over the tree, sampled (shared pages count in each process).
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SAMPLE_S = 0.1


def measured(
    command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> dict[str, Any]:
    """Figures of a whole command; ``failed`` holds the last lines it wrote where it did not end well."""
    with tempfile.TemporaryDirectory() as folder:
        figures, output = Path(folder) / "figures.json", Path(folder) / "output"
        launcher = [sys.executable, "-S", __file__, str(figures), *command]
        with output.open("wb") as file:
            done = subprocess.run(
                launcher,
                cwd=cwd,
                env={**os.environ, **(env or {}), "MEASURE_TIMEOUT": str(timeout or "")},
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        result = json.loads(figures.read_text()) if figures.exists() else {}
        lines = output.read_text(errors="replace").strip().splitlines()
    result["printed"] = lines[-1] if lines else ""
    if done.returncode != 0:
        result["failed"] = f"exit {done.returncode}: {' | '.join(lines[-2:])}"
    return result


def _children(pid: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        found: list[int] = []
        for task in tasks:
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    except OSError:
        return []
    return found


def _tree_rss(pid: int) -> int:
    """Resident bytes of a process and its descendants; 0 where there is no /proc."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            own = int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0
    return own + sum(_tree_rss(child) for child in _children(pid))


def _run(command: list[str], timeout: float | None) -> dict[str, Any]:
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    over, peak = threading.Event(), [0]

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            peak[0] = max(peak[0], _tree_rss(process.pid))
            if timeout is not None and time.perf_counter() - begin > timeout:
                process.kill()

    watcher = threading.Thread(target=sample)
    watcher.start()
    code = process.wait()
    wall = time.perf_counter() - begin
    over.set()
    watcher.join()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "cpu_s": round(used.ru_utime + used.ru_stime, 3),
        "user_s": round(used.ru_utime, 3),
        "sys_s": round(used.ru_stime, 3),
        "wall_s": round(wall, 3),
        "rss_mb": round(used.ru_maxrss * unit / 1e6, 1),
        "tree_rss_mb": round(peak[0] / 1e6, 1),
        "load": os.getloadavg()[0],
        "exit": code,
    }


def main() -> None:
    limit = os.environ.pop("MEASURE_TIMEOUT", "")
    figures = _run(sys.argv[2:], float(limit) if limit else None)
    Path(sys.argv[1]).write_text(json.dumps(figures))
    sys.exit(figures["exit"] if figures["exit"] >= 0 else 128 - figures["exit"])


if __name__ == "__main__":
    main()
