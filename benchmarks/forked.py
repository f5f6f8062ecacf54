"""Runs the work of a script in a fork of a process that has imported it, which spares quick benchmarks the imports.

Each run is a process of its own all the same. Its CPU seconds leave imports out, its peak memory holds them.
"""

import importlib
import io
import multiprocessing
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import commands


def measured(script: Path, task: Path, env: Mapping[str, str], more: Sequence[str]) -> dict[str, Any]:
    """Figures of ``python script task`` as those of measure.py; ``failed``: the last lines of its error.

    more: modules that are imported before the fork, as the script is
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", script.stem, *more])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(script.stem, str(task), dict(env), sender))
    # The first of them starts the server, which looks for modules where its environment says.
    path = os.pathsep.join([str(script.parent), str(commands.ROOT)])
    with _environment({**commands.ENVIRONMENT, "PYTHONPATH": path}):
        process.start()
    sender.close()
    try:
        figures: dict[str, Any] = receiver.recv()
    except EOFError:
        figures = {"printed": ""}
    process.join()
    if process.exitcode:
        figures["failed"] = f"exit {process.exitcode}: {figures['printed']}"
    return figures


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(name: str, task: str, env: Mapping[str, str], sender: Connection) -> None:
    os.environ.update(env)
    sys.argv = [name, task]
    output, begin = io.StringIO(), time.perf_counter()
    try:
        with redirect_stdout(output):
            importlib.import_module(name).main()
    except Exception:
        sender.send({"printed": " | ".join(traceback.format_exc().strip().splitlines()[-2:])})
        raise SystemExit(1) from None
    used = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024
    sender.send(
        {
            "printed": output.getvalue().strip().splitlines()[-1],
            "cpu_s": round(used.ru_utime + used.ru_stime, 3),
            "wall_s": round(time.perf_counter() - begin, 3),
            "rss_mb": round(used.ru_maxrss * unit / 1e6, 1),
            "load": os.getloadavg()[0],
        }
    )
