"""A process that streams and says, a line a batch, which cells it has handed out; killed by the tests.

python stream_process.py STORE STATE|- RANK WORLD_SIZE [STEPS]
"""

import json
import sys
import time

from annatac_scale.stream.loader import BatchStream

OPTIONS = {"global_batch_size": 48, "seed": 5, "lanes": 4, "window": 1}


def main() -> None:
    store, state, rank, world_size = sys.argv[1:5]
    stream = BatchStream(store, rank=int(rank), world_size=int(world_size), **OPTIONS)
    if state != "-":
        stream.load_state_dict(json.loads(state))
    for batch in stream:
        print(json.dumps({"cells": batch.cell_ids.tolist(), "state": stream.state_dict()}), flush=True)
        time.sleep(0.01)


if __name__ == "__main__":
    main()
