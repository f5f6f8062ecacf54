"""Parts of a prediction in several processes of this machine; one that is killed is started again, its parts redone."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from annatac_scale import errors
from annatac_scale.annotate.labels import Part
from annatac_scale.annotate.predictor import IN_FLIGHT, PredictTask
from annatac_scale.annotate.worker import END
from annatac_scale.errors import AnnatacError
from annatac_scale.progress import Progress

MOST_DEATHS = 3
"""Processes that may end with the same part at work: what ended them will end the next one too."""


def run_in_processes(
    task: PredictTask, n: int, parts: Sequence[Part], progress: Progress, done: Callable[[Part], None]
) -> None:
    """Do all parts on ``n`` processes. done: is told each part that is written, by this thread

    Raises what a process met, and AnnatacError where processes end again and again.
    """
    left, told, deaths = deque(parts), queue.Queue[_Told](), Counter[Part]()
    workers = [_Worker(task, told) for _ in range(min(n, len(parts)))]
    try:
        for worker in workers:
            worker.give(left)
        while any(worker.at_work for worker in workers):
            worker, what = told.get()
            match what:
                case ["say", line]:
                    progress.say(line)
                case ["done", [sample, unit, n_cells]]:
                    part = Part(sample, unit, n_cells)
                    worker.at_work.remove(part)
                    done(part)
                    worker.give(left)
                case ["error", kind, text]:
                    raise getattr(errors, kind)(text) if kind else RuntimeError(text)
                case None if worker.at_work:
                    deaths.update(worker.at_work)
                    if deaths[worker.at_work[0]] >= MOST_DEATHS:
                        raise _died(worker)
                    progress.say(
                        f"a worker ended ({worker.code}); another one does its {len(worker.at_work)} parts again"
                    )
                    left.extendleft(reversed(worker.at_work))
                    workers[workers.index(worker)] = again = _Worker(task, told)
                    again.give(left)
                case _:
                    pass
        for worker in workers:
            worker.end()
    finally:
        for worker in workers:
            worker.kill()


class _Worker:
    """A process, and the parts that it has at work."""

    def __init__(self, task: PredictTask, told: "queue.Queue[_Told]") -> None:
        self.at_work: list[Part] = []
        # It tells by a pipe of its own: whatever it prints goes where this process complains. In a session of its own,
        # too: Ctrl-C is for this process, which ends the others.
        hears, tells = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "annatac_scale.annotate.worker", str(tells)],
            stdin=subprocess.PIPE,
            stdout=2,
            text=True,
            pass_fds=(tells,),
            start_new_session=True,
        )
        os.close(tells)
        threading.Thread(target=self._listen, args=(os.fdopen(hears), told), daemon=True).start()
        self._send(task.to_dict())

    def _listen(self, hears: TextIO, told: "queue.Queue[_Told]") -> None:
        with hears:
            for line in hears:
                with contextlib.suppress(ValueError):  # torn, by its end
                    told.put((self, json.loads(line)))
        told.put((self, None))

    def _send(self, what: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: the end of what it told says so too

    def give(self, left: "deque[Part]") -> None:
        """Give it parts of those that are left, so many that it always has the next one."""
        while left and len(self.at_work) < IN_FLIGHT:
            part = left.popleft()
            self.at_work.append(part)
            self._send([part.sample, part.unit, part.n_cells])

    def end(self) -> None:
        """Tell it that there are no more parts, and wait for its end."""
        self._send(END)
        self._process.wait()

    def kill(self) -> None:
        """End it at once, if it is there."""
        self._process.kill()
        self._process.wait()

    @property
    def code(self) -> str:
        """How it ended, in words."""
        code = self._process.wait()
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


_Told = tuple[_Worker, list[Any] | None]


def _died(worker: _Worker) -> AnnatacError:
    part = worker.at_work[0]
    return AnnatacError(
        f"sample {part.sample}, cells from {part.first:,}: {MOST_DEATHS} workers ended while they were at it, the last "
        f"one {worker.code}; expected them to live, as they do where there is memory for each; ask for fewer --workers "
        "and run the same command again"
    )
