"""Processes that write a sample and are killed at a given moment."""

import multiprocessing
import os
import signal
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
    """Write the sample in a process of its own, and see it killed."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_write, args=(variables, when, str(store)))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def _write(variables: dict[str, str], when: str, store: str) -> None:
    os.environ.update(variables)  # whoever forked this process may have been started before they were set
    write_sample_until(when, store)


def damage(path: Path) -> None:
    """What a power cut may leave of a file: zeros."""
    path.write_bytes(np.zeros(path.stat().st_size, np.uint8).tobytes())
