"""The command line in a process of its own, of which each range takes a while: ``FOLDER ARGUMENT ...``.

It makes the file ``started`` in the folder as soon as the first range is done.
"""

import signal
import sys
import time
from pathlib import Path
from typing import Any

from annatac_scale.cli import main
from annatac_scale.ingest import fragment_tasks


def slowly(count: Any) -> Any:
    def run(*arguments: Any) -> Any:
        result = count(*arguments)
        Path(sys.argv[1], "started").touch()
        time.sleep(0.2)
        return result

    return run


if __name__ == "__main__":
    # Whoever starts the tests in the background may have had SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fragment_tasks.count_range = slowly(fragment_tasks.count_range)
    main(sys.argv[2:])
