"""Conversions in processes of their own that are killed by SIGKILL at a chosen change of the disk."""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from annatac_scale.ingest.convert import convert

_CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")


def n_changes(folder: Path, **conversion: Any) -> int:
    """How often a whole conversion into ``folder`` changes what is in there."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    code = _run(folder, None, sender, conversion)
    assert code == 0
    return int(receiver.recv())


def convert_and_die(folder: Path, change: int, **conversion: Any) -> None:
    """Convert into ``folder`` until just before the ``change``-th change, where the process is killed."""
    assert _run(folder, change, None, conversion) in (
        -signal.SIGKILL,
        0,
    )  # threads are not equally fast each time


def _run(folder: Path, change: int | None, sender: Any, conversion: dict[str, Any]) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["annatac_scale.ingest.convert"])
    process = context.Process(target=_convert, args=(str(folder), change, sender, conversion))
    process.start()
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _convert(folder: str, change: int | None, sender: Any, conversion: dict[str, Any]) -> None:
    n, lock = 0, threading.Lock()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal n
        if event not in _CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        # Names without a folder are relative to a folder that is being removed.
        path = str(arguments[0])
        if not path.startswith(folder) and os.path.isabs(path):
            return
        with lock:
            n += 1
            if n == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    convert(**conversion)
    if sender is not None:
        sender.send(n)
