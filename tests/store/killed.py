"""Processes that write a sample and are killed at a given moment; run as ``python killed.py WHEN STORE``."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from random_stores import MEASURED, random_cells, random_obs

from annatac_scale.store import draft as drafts
from annatac_scale.store import place as places
from annatac_scale.store.draft import Draft, open_draft
from annatac_scale.store.open_islands import OpenIslands

N_CELLS = 9000
N_SHARDS = 3
PLAN = {"input": "x.tsv.gz", "shards": [0, 1, 2]}


def rows_of(shard: int) -> OpenIslands:
    """The cells of one shard."""
    n_cells = min(4000, N_CELLS - 4000 * shard)
    return OpenIslands.from_csr(random_cells(n_cells, 10 + shard, density=0.005))


def finish(draft: Draft) -> str:
    """Write the shards that are not written, and commit; returns the digest."""
    records = [draft.written(shard) or draft.write_shard(shard, rows_of(shard)) for shard in range(N_SHARDS)]
    return draft.commit(records, random_obs(N_CELLS, 3), MEASURED, {"kind": "fragments"})


def kill(*_: Any, **__: Any) -> None:
    """Die as by a power cut: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(path: str, data: bytes, wait: bool = False) -> None:
    """Half of a file, then death."""
    Path(path).write_bytes(data[: len(data) // 2])
    kill()


def write_sample_until(when: str, store: str) -> None:
    """Write the sample "s" and be killed at the moment ``when``."""
    with open_draft(store, "s", PLAN) as draft:
        if when != "before shards":
            draft.write_shard(1, rows_of(1))
        if when == "within a shard":
            places.write_new = write_half
        if when == "between shard and record":
            drafts._record = kill
        if when in ("before shards", "between shards"):
            kill()
        if when == "within commit":
            drafts.Draft._publish = kill
        if when == "between rename and index":
            drafts.move = lambda source, target: (os.replace(source, target), kill())
        if when == "after commit":
            publish = drafts.Draft._publish
            drafts.Draft._publish = lambda draft, entry: (publish(draft, entry), kill())
        finish(draft)


def run_until_killed(when: str, store: Path | str) -> None:
    """Run this file in a process of its own, and see it killed."""
    done = subprocess.run(
        [sys.executable, __file__, when, str(store)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def damage(path: Path) -> None:
    """What a power cut may leave of a file: zeros."""
    path.write_bytes(np.zeros(path.stat().st_size, np.uint8).tobytes())


if __name__ == "__main__":
    write_sample_until(*sys.argv[1:])
