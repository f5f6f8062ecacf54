"""Runs that were killed, damaged or repeated give the same table, and nothing else is overwritten."""

import json
import multiprocessing
import multiprocessing.synchronize
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from predicted import assert_same_bytes
from small_atlas import add_sample, draw_sample, small_model, small_store, write_split

from annatac_scale.annotate.labels import MANIFEST
from annatac_scale.annotate.labels_writer import Share
from annatac_scale.annotate.predict import predict
from annatac_scale.annotate.predictor import IN_FLIGHT
from annatac_scale.errors import InputError, ModelError
from annatac_scale.progress import Advance, Silent
from annatac_scale.store.locks import try_folder_lock
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import replace_obs


class Hanging(Advance):
    """Hangs for good at the given number of steps."""

    def __init__(self, steps: int, reached: multiprocessing.synchronize.Event) -> None:
        self.left, self.reached = steps, reached

    def __call__(self, n: int, lines: int = 0, sample: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            self.reached.set()
            signal.pause()


class Interrupted(Silent):
    """Stops the process for good after the given number of steps of a task."""

    def __init__(self, steps: int, reached: multiprocessing.synchronize.Event) -> None:
        self.steps, self.reached = steps, reached

    @contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        yield Hanging(self.steps, self.reached)


def predict_and_hang(
    store: Path, model: Path, out: Path, steps: int, reached: multiprocessing.synchronize.Event
) -> None:
    predict(store, model, out, progress=Interrupted(steps, reached))


def test_a_run_that_was_killed_goes_on_and_gives_the_same_table(tmp_path: Path) -> None:
    store = small_store(tmp_path / "atlas.zarr", {"big": draw_sample(24_100, 1), "small": draw_sample(5, 2)})
    small_model(tmp_path / "model")
    predict(store, tmp_path / "model", tmp_path / "undisturbed")
    out = tmp_path / "labels"
    context = multiprocessing.get_context("forkserver")
    reached = context.Event()
    process = context.Process(target=predict_and_hang, args=(store.path, tmp_path / "model", out, 1, reached))
    process.start()
    assert reached.wait(100)
    with pytest.raises(InputError, match="another process is writing labels here"):
        predict(store, tmp_path / "model", out)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    there = sorted(file.name for file in out.glob("*.parquet"))
    assert 1 <= len(there) <= 1 + IN_FLIGHT
    assert json.loads((out / MANIFEST).read_text())["complete"] is False
    (out / ".big-00006.parquet.0a1b.partial").write_bytes(b"torn")
    kept = (out / there[0]).stat().st_ino
    report = predict(store, tmp_path / "model", out)
    assert (report.n_skipped, report.n_parts, report.n_cells) == (len(there), 8, 24_105)
    assert report.complete
    assert (out / there[0]).stat().st_ino == kept
    assert not list(out.glob(".*"))
    assert_same_bytes(tmp_path / "undisturbed", out)
    assert (out / MANIFEST).read_text() == (tmp_path / "undisturbed" / MANIFEST).read_text()
    table = pd.read_parquet(out)
    assert sorted(table["barcode"]) == sorted(store.obs([])["barcode"])


def test_running_again_writes_nothing(tmp_path: Path, store: IslandStore, model: Path) -> None:
    first = predict(store, model, tmp_path / "labels")

    def stamps() -> dict[str, tuple[int, int]]:
        stats = {file.name: file.stat() for file in (tmp_path / "labels").iterdir()}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}

    before = stamps()
    again = predict(store, model, tmp_path / "labels")
    assert stamps() == before
    assert again.n_skipped == again.n_parts == 4
    assert (again.labels, again.dropped) == (first.labels, first.dropped)


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-20]), lambda file: file.write_text("")],
)
def test_a_part_that_is_lost_or_cut_is_made_again(
    tmp_path: Path, store: IslandStore, model: Path, damage: object
) -> None:
    predict(store, model, tmp_path / "labels")
    part = tmp_path / "labels/many-00000.parquet"
    before = part.read_bytes()
    damage(part)  # type: ignore[operator]
    assert predict(store, model, tmp_path / "labels").n_skipped == 3
    assert part.read_bytes() == before


def test_a_part_of_other_labels_is_made_again(tmp_path: Path, store: IslandStore, model: Path) -> None:
    predict(store, model, tmp_path / "labels")
    predict(store, model, tmp_path / "other", novel_threshold=0.9)
    part = tmp_path / "labels/many-00000.parquet"
    before = part.read_bytes()
    part.write_bytes((tmp_path / "other/many-00000.parquet").read_bytes())
    assert predict(store, model, tmp_path / "labels").n_skipped == 3
    assert part.read_bytes() == before


def test_other_models_options_and_cells_are_refused_over_the_same_folder(
    tmp_path: Path, store: IslandStore, model: Path
) -> None:
    out = tmp_path / "labels"
    predict(store, model, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    small_model(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match=r"holds labels of model \w{12}, now asked for model \w{12}; choose"):
        predict(store, tmp_path / "other", out)
    with pytest.raises(InputError, match=r"novel_threshold 0\.8, now asked for 0\.6; choose another --out"):
        predict(store, model, out, novel_threshold=0.6)
    changed = small_store(tmp_path / "changed.zarr", {"many": draw_sample(300, 9)})
    with pytest.raises(InputError, match="labels of sample 'many', but the store has other cells under that"):
        predict(changed, model, out)
    fewer = small_store(tmp_path / "fewer.zarr", {"new": draw_sample(3, 9)})
    with pytest.raises(InputError, match="labels of sample 'many', but the store has no such sample"):
        predict(fewer, model, out)
    write_split(tmp_path / "split.parquet", [("many", "many-0", "test")], {})
    with pytest.raises(InputError, match=r"split_sha256 none, now asked for \w{12}"):
        predict(store, model, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_new_samples_are_added_and_new_obs_changes_nothing(tmp_path: Path, model: Path) -> None:
    store = small_store(tmp_path / "atlas.zarr", {"a": draw_sample(20, 1)})
    predict(store, model, tmp_path / "labels")
    replace_obs(store.path, "a", store.samples["a"].obs().assign(cell_type="x"))
    assert predict(store.path, model, tmp_path / "labels").n_skipped == 1
    add_sample(store.path, "b", draw_sample(10, 2))
    report = predict(store.path, model, tmp_path / "labels")
    assert (report.n_skipped, report.n_parts, report.n_cells) == (1, 2, 30)
    assert len(pd.read_parquet(tmp_path / "labels")) == 30


def test_folders_that_hold_something_else_are_left_alone(
    tmp_path: Path, store: IslandStore, model: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"found 'thesis\.txt', expected a new folder or one of labels"):
        predict(store, model, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="found a file, expected a folder"):
        predict(store, model, tmp_path / "full/thesis.txt")
    for wrong in (store.path, model):
        with pytest.raises(InputError, match="expected a new folder or one of labels"):
            predict(store, model, wrong)


def test_a_folder_left_by_a_kill_before_its_manifest_is_gone_on_with(
    tmp_path: Path, store: IslandStore, model: Path
) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / f".{MANIFEST}.partial").write_text('{"form')
    assert predict(store, model, tmp_path / "labels").n_cells == 304


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": "annatac_scale.labels", "version": "3.0"}', "\xff"]
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, store: IslandStore, model: Path, content: str) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / MANIFEST).write_bytes(content.encode("latin1"))
    with pytest.raises(InputError, match=r"_manifest\.json: cannot be read"):
        predict(store, model, tmp_path / "labels")


def test_a_manifest_of_a_newer_format_is_refused(tmp_path: Path, store: IslandStore, model: Path) -> None:
    predict(store, model, tmp_path / "labels")
    file = tmp_path / "labels" / MANIFEST
    file.write_text(file.read_text().replace('"version": "3.0"', '"version": "4.0"'))
    with pytest.raises(InputError, match=r"found format annatac_scale\.labels 4\.0, expected"):
        predict(store, model, tmp_path / "labels")


def test_a_folder_locked_by_another_writer_is_refused(
    tmp_path: Path, store: IslandStore, model: Path
) -> None:
    (tmp_path / "labels").mkdir()
    lock = try_folder_lock(tmp_path / "labels", Share().lock)
    assert lock is not None
    with pytest.raises(InputError, match="another process is writing labels here"):
        predict(store, model, tmp_path / "labels")
    lock.release()
    assert predict(store, model, tmp_path / "labels").n_cells == 304
