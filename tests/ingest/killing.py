"""Conversions in processes of their own, that may be killed by SIGKILL at a chosen change of the disk."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from annatac_scale.errors import AnnatacError
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


def convert_apart(prepare: Callable[[], None], *inputs: Any, **conversion: Any) -> str:
    """Convert in a process that calls ``prepare`` first; returns the message of the error, "" if there is none."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    _end(_convert_apart, prepare, sender, inputs, conversion)
    return str(receiver.recv())


def _convert_apart(
    prepare: Callable[[], None], sender: Any, inputs: tuple[Any, ...], conversion: dict[str, Any]
) -> None:
    prepare()
    try:
        convert(*inputs, **conversion)
        sender.send("")
    except AnnatacError as error:
        sender.send(str(error))


def _end(target: Callable[..., None], *arguments: Any) -> int:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _run(folder: Path, change: int | None, sender: Any, conversion: dict[str, Any]) -> int:
    return _end(_convert, str(folder), change, sender, conversion)


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
