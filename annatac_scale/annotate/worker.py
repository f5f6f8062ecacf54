"""One process of several that predict parts of a data set: takes parts as lines of JSON, and tells what it did.

    python -m annatac_scale.annotate.worker FD     started by annotate/processes.py, never by hand

In come the task, then a part a line; out, by the open file FD, go lines [what, ...]: ["say", text], ["done", part] or
["error", kind, text]. It ends when nothing more comes, and at once where whoever started it is gone.
"""

import json
import os
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from annatac_scale.annotate.labels import LabelsFolder, Part
from annatac_scale.annotate.predictor import IN_FLIGHT, Predictor, PredictTask, one_thread_an_operation
from annatac_scale.errors import AnnatacError
from annatac_scale.progress_lines import LineProgress

END = "end"
"""In place of a part: there are no more."""


class _Teller:
    """Tells the process that started this one, from any thread."""

    def __init__(self) -> None:
        self._out = os.fdopen(int(sys.argv[1]), "w")
        self._lock = threading.Lock()

    def __call__(self, *what: Any) -> None:
        with self._lock:
            self._out.write(json.dumps(what) + "\n")
            self._out.flush()


def main() -> None:
    """Serve until told to end."""
    tell = _Teller()
    task = PredictTask.from_dict(json.loads(sys.stdin.readline()))
    try:
        predictor, folder = task.open(LineProgress(lambda line: tell("say", line)))
    except AnnatacError as error:
        tell("error", type(error).__name__, str(error))
        return
    with one_thread_an_operation(), ThreadPoolExecutor(IN_FLIGHT, "parts") as pool:
        for line in sys.stdin:
            given = json.loads(line)
            if given == END:
                return
            pool.submit(_run, predictor, folder, Part(*given), tell)
        os._exit(1)  # without a word: whoever started this is gone, and parts at work need not be ended


def _run(predictor: Predictor, folder: LabelsFolder, part: Part, tell: _Teller) -> None:
    try:
        predictor.run(part, folder)
    except AnnatacError as error:
        tell("error", type(error).__name__, str(error))
        return
    except BaseException:
        tell("error", "", traceback.format_exc())
        raise
    tell("done", [part.sample, part.unit, part.n_cells])


if __name__ == "__main__":
    main()
