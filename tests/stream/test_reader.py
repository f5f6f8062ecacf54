"""Reads that fail, or do not end, under a stream that goes on, or is dropped."""

import os
import signal
import threading

import pytest

from annatac_scale.errors import StoreError
from annatac_scale.store.store import Sample
from annatac_scale.stream import reader
from annatac_scale.stream.loader import BatchStream

OPTIONS = {"global_batch_size": 48, "seed": 5, "lanes": 4, "window": 1, "threads": 1}
HANGS_S = 60


class Gate:
    """Lets ``n`` reads through; the others wait until it is opened. n_done: reads that came to an end"""

    def __init__(self, n):
        self.left, self.opened, self.waiting = n, threading.Event(), threading.Event()
        self.n_done = 0

    def read_chunks(self, sample, blocks):
        self.left -= 1
        if self.left < 0:
            self.waiting.set()
            self.opened.wait(HANGS_S)
        self.n_done += 1
        return ORIGINAL(sample, blocks)


ORIGINAL = Sample.read_chunks


def test_a_stream_that_waits_for_a_read_can_be_dropped(unequal_store, monkeypatch):
    gate = Gate(5)
    monkeypatch.setattr(reader, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(Sample, "read_chunks", lambda sample, blocks: gate.read_chunks(sample, blocks))
    stream = BatchStream(unequal_store.store, **OPTIONS)
    batches = iter(stream)
    next(batches)
    assert gate.waiting.wait(HANGS_S)
    closing = threading.Thread(target=batches.close)
    closing.start()
    closing.join(HANGS_S / 2)
    assert not closing.is_alive()
    gate.opened.set()
    state = stream.state_dict()
    assert sum(len(batch) for batch in stream) == 2065 - 48 * state["step"]


class InterruptedLoopError(Exception):
    pass


def interrupt(signal_number, frame):
    raise InterruptedLoopError


def test_an_interrupted_loop_ends_though_the_read_that_it_waits_for_does_not(unequal_store, monkeypatch):
    gate = Gate(5)
    monkeypatch.setattr(reader, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(Sample, "read_chunks", lambda sample, blocks: gate.read_chunks(sample, blocks))
    stream = BatchStream(unequal_store.store, **OPTIONS)
    loop_waits = threading.Timer(1, os.kill, (os.getpid(), signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, interrupt)
    loop_waits.start()
    try:
        with pytest.raises(InterruptedLoopError):
            list(stream)
        assert gate.waiting.is_set()
        assert gate.n_done == 5
    finally:
        signal.signal(signal.SIGUSR1, before)
        gate.opened.set()


def test_a_read_that_fails_is_an_error_of_the_loop_and_the_stream_can_go_on(unequal_store, monkeypatch):
    def fails(sample, blocks):
        if sample.name == "s4" and 2 in blocks:
            raise StoreError("the disk is on fire")
        return ORIGINAL(sample, blocks)

    monkeypatch.setattr(Sample, "read_chunks", fails)
    stream = BatchStream(unequal_store.store, **OPTIONS)
    with pytest.raises(StoreError, match="on fire"):
        list(stream)
    step = stream.state_dict()["step"]
    assert step < len(stream)
    monkeypatch.setattr(Sample, "read_chunks", ORIGINAL)
    assert sum(len(batch) for batch in stream) == 2065 - 48 * step
