"""Processes that write a model into object storage and are killed on the way; run as ``python killed_writes.py URL``.

Prints, as JSON, how the process ended that was to die before change 0, 1, 2 ... of ``URL/0``, ``URL/1``, ``URL/2`` ...;
the last one came to its end.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from model_folders import toy_model

from annatac_scale.model.folder import write_model
from annatac_scale.store.objects import Prefix

CARD = "# New\n"


def new_model() -> Any:
    """What is written: a pretrained model, of fewer files than a fine-tuned one."""
    return toy_model(None)


def ends_of(url: str) -> list[int]:
    """Run this file in a process of its own; how each of its writers ended."""
    done = subprocess.run([sys.executable, __file__, url], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def die_before(change: int) -> None:
    """Let this process die just before its ``change``-th change of the object storage."""
    made, lock = 0, threading.Lock()

    def counted(method: Callable[..., None]) -> Callable[..., None]:
        def changing(*arguments: Any, **options: Any) -> None:
            nonlocal made
            with lock:
                if made == change:
                    os.kill(os.getpid(), signal.SIGKILL)
                made += 1
            method(*arguments, **options)

        return changing

    for name in ("write", "remove"):
        setattr(Prefix, name, counted(getattr(Prefix, name)))


def main(base: str) -> None:
    ends: list[int] = []
    while not ends or ends[-1] != 0:
        assert len(ends) < 20
        writer = os.fork()
        if not writer:
            die_before(len(ends))
            write_model(f"{base}/{len(ends)}", new_model(), CARD)
            os._exit(0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    main(sys.argv[1])
