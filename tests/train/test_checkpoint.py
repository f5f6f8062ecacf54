import errno
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.errors import InputError, ModelError, StoreError
from annatac_scale.progress import Silent
from annatac_scale.store.place import place_of
from annatac_scale.train.checkpoint import (
    FORMAT,
    Checkpoints,
    best_until,
    checkpoint_name,
    checkpoint_steps,
    state_of,
)

SAY = Silent().say


def state(step=3):
    return {"module": {"w": torch.arange(5000.0)}, "state": {"step": step, "best_score": float("-inf")}}


class Written:
    """Checkpoints in a folder, closed at the end of a test."""

    def __init__(self, path, keep=3):
        self.path = path
        self.lines = []
        self.checkpoints = Checkpoints(place_of(path), keep, self.lines.append)

    def save(self, step, bests=()):
        self.checkpoints.save(step, state(step), bests, needed=True)
        self.checkpoints.settle()

    def damage(self, step, change):
        file = self.path / checkpoint_name(step)
        file.write_bytes(change(file.read_bytes()))

    @property
    def steps(self):
        return checkpoint_steps(place_of(self.path))


@pytest.fixture
def written(tmp_path):
    found = Written(tmp_path / "checkpoints")
    yield found
    found.checkpoints.close()


def test_a_checkpoint_comes_back_as_it_was(written):
    assert written.checkpoints.newest() is None
    written.save(3)
    found = state_of(written.checkpoints.newest())
    assert found["state"] == state()["state"]
    assert torch.equal(found["module"]["w"], state()["module"]["w"])


def test_what_is_saved_is_the_state_of_that_moment(written):
    weights = torch.zeros(1000, 1000)
    written.checkpoints.save(1, {"w": weights, "nested": [{"w": weights}]}, [])
    weights += 1
    written.checkpoints.settle()
    found = state_of(written.checkpoints.read(1))
    assert not found["w"].any()
    assert not found["nested"][0]["w"].any()


@given(st.integers(1, 4), st.lists(st.booleans(), min_size=1, max_size=12))
def test_the_newest_stay_and_the_best_that_each_of_them_had(tmp_path_factory, keep, gained):
    written = Written(tmp_path_factory.mktemp("kept"), keep)
    bests = []
    for step, gains in enumerate(gained, 1):
        bests += [step] if gains else []
        written.save(step, bests)
    written.checkpoints.close()
    newest = range(1, len(gained) + 1)[-keep:]
    of_each = [max([b for b in bests if b <= step], default=step) for step in newest]
    assert written.steps == sorted({*newest, *of_each})


DAMAGES = [
    lambda data: data[:2000],
    lambda data: b"",
    lambda data: b"no checkpoint" * 50,
    lambda data: bytes(len(data)),
    lambda data: data[:9000] + bytes([data[9000] ^ 1]) + data[9001:],
]


@pytest.mark.parametrize("format_number", [FORMAT + 1, None])
def test_a_checkpoint_of_another_format_is_refused_and_left_alone(written, format_number):
    written.save(1)
    torch.save({**state(2), "format": format_number}, written.path / checkpoint_name(2))
    message = rf"step-000000002\.pt: found format {format_number}, expected {FORMAT}; go on with the version"
    with pytest.raises(InputError, match=message):
        written.checkpoints.newest()
    assert written.steps == [1, 2]


@pytest.mark.parametrize("damage", DAMAGES, ids=["cut_short", "empty", "text", "zeros", "one_bit"])
def test_a_damaged_checkpoint_is_passed_over_removed_and_told_of(written, damage):
    for step in (1, 2, 3):
        written.save(step)
    written.damage(3, damage)
    assert state_of(written.checkpoints.newest())["state"]["step"] == 2
    (line,) = written.lines
    assert "step-000000003.pt: damaged (" in line
    assert line.endswith("going back to the checkpoint before it")
    assert written.steps == [1, 2]


def test_a_checkpoint_is_not_passed_over_for_a_damaged_best_one(written):
    for step in (1, 2, 3):
        written.save(step, bests=[1])
    written.damage(1, lambda data: data[: len(data) // 2])
    assert state_of(written.checkpoints.newest())["state"]["step"] == 3
    assert [written.checkpoints.has_whole(step) for step in (1, 2, 3, 4)] == [False, True, True, False]


def test_an_old_checkpoint_that_cannot_be_removed_is_told_of(written, monkeypatch):
    for step in (1, 2, 3):
        written.save(step)

    def remove(self, name):
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(type(written.checkpoints._place), "remove", remove)
    written.save(4)
    assert written.steps == [1, 2, 3, 4]
    assert written.lines == ["an old checkpoint could not be removed, training goes on: [Errno 16] busy"]


def test_checkpoints_that_are_all_damaged_are_an_error_that_says_what_to_remove(written):
    for step in (1, 2):
        written.save(step)
        written.damage(step, lambda data: data[:100])
    with pytest.raises(ModelError, match="none of 2 checkpoints is whole; remove this folder"):
        written.checkpoints.newest()
    assert written.steps == [1, 2]


def test_a_checkpoint_that_would_run_code_is_refused(written):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    written.save(1)
    torch.save({"module": Harm(), "format": FORMAT}, written.path / checkpoint_name(2))
    assert state_of(written.checkpoints.newest())["state"]["step"] == 1


def fail_to_write(monkeypatch, checkpoints):
    """The disk is full from now on."""

    def write(name, data, wait=False):
        raise StoreError(f"{name}: {errno.errorcode[errno.ENOSPC]}")

    monkeypatch.setattr(
        type(checkpoints._place), "write", lambda self, *args, **kwargs: write(*args, **kwargs)
    )


def test_a_full_disk_is_told_of_and_the_checkpoint_before_stays(written, monkeypatch):
    written.save(1)
    with monkeypatch.context() as full:
        fail_to_write(full, written.checkpoints)
        written.checkpoints.save(2, state(2), [])
        written.checkpoints.settle()
    (line,) = written.lines
    assert line.startswith("checkpoint not written, training goes on: ")
    assert "ENOSPC" in line
    assert state_of(written.checkpoints.newest())["state"]["step"] == 1
    written.save(3)
    assert written.steps == [1, 3]


def test_a_checkpoint_that_is_needed_and_cannot_be_written_is_an_error(written, monkeypatch):
    with monkeypatch.context() as full:
        fail_to_write(full, written.checkpoints)
        written.checkpoints.save(2, state(2), [], needed=True)
        with pytest.raises(StoreError, match="ENOSPC"):
            written.checkpoints.settle()


def test_saving_does_not_wait_for_the_disk_but_for_the_checkpoint_before(written, monkeypatch):
    go_on, began = threading.Event(), threading.Event()
    write = written.checkpoints._write

    def slow(*arguments):
        began.set()
        assert go_on.wait(60)
        write(*arguments)

    monkeypatch.setattr(written.checkpoints, "_write", slow)
    written.checkpoints.save(1, state(1), [])
    assert began.wait(60)
    assert written.checkpoints.is_writing
    assert written.steps == []
    go_on.set()
    written.checkpoints.save(2, state(2), [])
    assert written.steps[0] == 1
    written.checkpoints.settle()
    assert written.steps == [1, 2]


def test_files_of_other_names_are_no_checkpoints(written):
    written.save(7)
    for name in ("step-8.pt", "best.pt", ".step-000000009.pt.1.partial", "step-000000010.pt.tmp"):
        (written.path / name).write_bytes(b"")
    assert written.steps == [7]


@given(st.integers(0, 50), st.sets(st.integers(0, 50)))
def test_the_best_until_a_step_is_the_last_one_not_after_it(step, bests):
    expected = next((b for b in range(step, -1, -1) if b in bests), None)
    assert best_until(step, np.sort(list(bests)).tolist()) == expected
