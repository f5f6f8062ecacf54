"""However many jobs, processes and threads do the work, and however often they are killed: the same table."""

import itertools
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from object_storage import ObjectStorage
from predicted import assert_same_bytes
from small_atlas import add_sample, draw_sample, small_known, small_model, small_store

from annatac_scale import api
from annatac_scale.annotate import predictor
from annatac_scale.annotate.labels import MANIFEST, LabelsFolder, Part, read_manifest
from annatac_scale.annotate.labels_writer import Share
from annatac_scale.annotate.predict import PredictReport, Workers, predict
from annatac_scale.annotate.processes import MOST_DEATHS
from annatac_scale.errors import AnnatacError, ConfigError, InputError, ModelError, RunInterruptedError
from annatac_scale.model.folder import read_model
from annatac_scale.progress import Advance, Silent
from annatac_scale.store.store import IslandStore

SIZES = {"a": 9_000, "b": 0, "c": 5, "d": 12_300}
"""3 + 1 + 1 + 4 parts."""
ADAPTED: dict[str, Any] = {"novelty": "joint", "novel_rate": 0.1, "novel_adapt": True}
"""What is said of a cell hangs on the whole sample then."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """atlas.zarr, model, and labels of an undisturbed run in one process."""
    path = tmp_path_factory.mktemp("shared")
    small_store(
        path / "atlas.zarr", {name: draw_sample(n, seed) for seed, (name, n) in enumerate(SIZES.items())}
    )
    # As `tiny` makes it: the head reads no encoder, and is a sum over islands.
    small_model(path / "model", "linear", known=small_known(80), reads="none")
    predict(path / "atlas.zarr", path / "model", path / "labels", **ADAPTED)
    return path


def run(folder: Path, out: Path, **options: Any) -> PredictReport:
    return predict(folder / "atlas.zarr", folder / "model", out, **ADAPTED, **options)


def assert_undisturbed(folder: Path, out: Path) -> None:
    assert_same_bytes(folder / "labels", out)
    assert (out / MANIFEST).read_text() == (folder / "labels" / MANIFEST).read_text()
    assert not list(out.glob(".*"))


def test_shares_in_any_order_make_the_table_of_one_run_and_the_last_completes_it(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "labels"
    for number in (3, 1, 4, 2):
        assert not out.exists() or not read_manifest(out).complete
        report = run(folder, out, workers=Workers(share=Share(number, 4)))
        assert report.complete == (number == 2)
        assert report.n_cells == sum(
            part.n_cells for part in Share(number, 4).of_parts(read_manifest(out).parts)
        )
    assert_undisturbed(folder, out)
    assert run(folder, out).n_skipped == 9


@given(st.integers(0, 50), st.integers(1, 60))
def test_shares_hold_every_part_once_in_order(n_parts: int, n_shares: int) -> None:
    parts = [Part("s", unit, 1) for unit in range(n_parts)]
    shares = [Share(number, n_shares).of_parts(parts) for number in range(1, n_shares + 1)]
    assert list(itertools.chain(*shares)) == parts
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1.5/4"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected K/N, as 3/64"):
        Share.parsed(text)


def test_the_same_share_is_not_written_by_two_and_others_may_be(folder: Path, tmp_path: Path) -> None:
    class Meanwhile(Silent):
        def say(self, line: str) -> None:
            said.append(line)

        def task(self, *arguments: Any) -> Any:
            with pytest.raises(InputError, match="another process is writing part 1/2 here"):
                run(folder, tmp_path / "labels", workers=Workers(share=Share(1, 2)))
            run(folder, tmp_path / "labels", workers=Workers(share=Share(2, 2)))
            return super().task(*arguments)

    said: list[str] = []
    assert run(folder, tmp_path / "labels", workers=Workers(share=Share(1, 2)), progress=Meanwhile()).complete
    assert_undisturbed(folder, tmp_path / "labels")


@pytest.mark.parametrize("reads", ["none", "gate"])
def test_bits_do_not_depend_on_the_number_of_threads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    limit = "SUMMED_BATCH_TOKENS" if reads == "none" else "BATCH_TOKENS"
    monkeypatch.setattr(predictor, limit, 2_000)  # below it the cells here would be cut by their number alone
    small_model(tmp_path / "model", "linear", known=small_known(80), reads=reads)
    # Small as these models are, sums may round alike in other batches: so the batches have to be the same ones.
    batches: dict[int, Counter[bytes]] = {1: Counter(), 3: Counter()}
    cut = predictor.cut_batches

    def spy(n_tokens: np.ndarray, most_tokens: int) -> list[np.ndarray]:
        found = list(cut(n_tokens, most_tokens))
        batches[torch_threads].update(cells.tobytes() for cells in found)
        return found

    monkeypatch.setattr(predictor, "cut_batches", spy)
    before = torch.get_num_threads()
    for torch_threads in (1, 3):
        torch.set_num_threads(torch_threads)
        try:
            predict(folder / "atlas.zarr", tmp_path / "model", tmp_path / str(torch_threads), **ADAPTED)
            assert torch.get_num_threads() == torch_threads
        finally:
            torch.set_num_threads(before)
    assert_same_bytes(tmp_path / "1", tmp_path / "3")
    assert batches[1] == batches[3]
    assert len(batches[1]) > 40


def test_processes_make_the_table_of_one(folder: Path, tmp_path: Path) -> None:
    report = run(folder, tmp_path / "labels", workers=Workers(2))
    assert (report.n_parts, report.n_skipped, report.complete) == (9, 0, True)
    assert_undisturbed(folder, tmp_path / "labels")
    assert not [
        child for child in psutil.Process().children() if "annotate.worker" in " ".join(child.cmdline())
    ]


class Killing(Silent):
    """Kills a worker whenever a part is done, so many times."""

    def __init__(self, n: int) -> None:
        self.left, self.lines = n, list[str]()

    def say(self, line: str) -> None:
        self.lines.append(line)

    def task(self, *arguments: Any) -> Any:
        killing = self

        class Counted(Advance):
            def __call__(self, n: int, lines: int = 0, sample: str = "") -> None:
                if killing.left:
                    killing.left -= 1
                    workers()[0].kill()

            def __enter__(self) -> Advance:
                return self

            def __exit__(self, *error: object) -> None:
                pass

        return Counted()


def workers() -> list[psutil.Process]:
    return [
        child for child in psutil.Process().children() if "annatac_scale.annotate.worker" in child.cmdline()
    ]


def test_a_worker_that_is_killed_is_replaced_and_its_parts_come_once(folder: Path, tmp_path: Path) -> None:
    progress = Killing(2)
    run(folder, tmp_path / "labels", workers=Workers(2), progress=progress)
    assert len([line for line in progress.lines if "killed by signal 9" in line]) == 2
    assert_undisturbed(folder, tmp_path / "labels")


def test_workers_that_always_end_are_given_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = tmp_path / "ends"
    ending.write_text("#!/bin/sh\nexit 7\n")
    ending.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(ending))
    with pytest.raises(
        AnnatacError, match=f"sample a, cells from 0: {MOST_DEATHS} workers ended while.*exit code 7"
    ):
        run(folder, tmp_path / "labels", workers=Workers(1))
    monkeypatch.undo()
    run(folder, tmp_path / "labels")
    assert_undisturbed(folder, tmp_path / "labels")


def test_what_a_worker_meets_is_raised_here(folder: Path, tmp_path: Path) -> None:
    store = small_store(tmp_path / "atlas.zarr", {"a": draw_sample(300, 1)})
    files = [file for file in (tmp_path / "atlas.zarr/samples/a/X").rglob("*") if file.is_file()]
    shard = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 0xFF
    shard.write_bytes(data)
    for n in (0, 1):
        with pytest.raises(AnnatacError, match="samples/a"):
            predict(store.path, folder / "model", tmp_path / f"labels{n}", workers=Workers(n))


def start_and_leave(folder: str, out: str) -> str:
    return (
        "from annatac_scale.annotate.predict import Workers, predict\n"
        f"predict({folder + '/atlas.zarr'!r}, {folder + '/model'!r}, {out!r}, workers=Workers(2), "
        f"**{ADAPTED!r})\n"
    )


def test_workers_end_with_the_process_that_started_them(folder: Path, tmp_path: Path) -> None:
    import subprocess

    process = subprocess.Popen([sys.executable, "-c", start_and_leave(str(folder), str(tmp_path / "labels"))])
    until = time.monotonic() + 100
    own: list[psutil.Process] = []
    while len(own) < 2 and time.monotonic() < until:
        own = psutil.Process(process.pid).children()
        time.sleep(0.05)
    assert len(own) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(own, timeout=60)
    assert not alive
    run(folder, tmp_path / "labels")
    assert_undisturbed(folder, tmp_path / "labels")


def test_labels_in_object_storage_are_those_on_a_disk(
    folder: Path, tmp_path: Path, s3: ObjectStorage
) -> None:
    out = f"{s3.bucket()}/run/labels"
    options: dict[str, Any] = {**ADAPTED, "embeddings": True}
    predict(folder / "atlas.zarr", folder / "model", tmp_path / "labels", **options)
    for number in (2, 1):
        share = Share(number, 2)
        report = predict(
            folder / "atlas.zarr", folder / "model", out, workers=Workers(1, share=share), **options
        )
        assert report.complete == (number == 1)
    names = sorted(
        str(file.relative_to(tmp_path / "labels"))
        for file in (tmp_path / "labels").rglob("*")
        if file.is_file()
    )
    assert s3.keys(out) == names
    theirs, ours = LabelsFolder.open(out), LabelsFolder.open(tmp_path / "labels")
    for part in ours.manifest.parts:
        columns = list(ours.manifest.columns)
        assert theirs.read(part, columns).equals(ours.read(part, columns))
        np.testing.assert_array_equal(theirs.read_embeddings(part), ours.read_embeddings(part))
    again = predict(folder / "atlas.zarr", folder / "model", out, **options)
    assert (again.n_skipped, again.complete) == (9, True)
    small_model(tmp_path / "other", "linear", known=small_known(80), seed=9, reads="none")
    with pytest.raises(ModelError, match="holds labels of model"):
        predict(folder / "atlas.zarr", tmp_path / "other", out, **options)


def test_embeddings_are_what_the_logits_stand_on_and_zarr_reads_them(folder: Path, tmp_path: Path) -> None:
    import zarr

    predict(folder / "atlas.zarr", folder / "model", tmp_path / "labels", embeddings=True)
    group = zarr.open_group(tmp_path / "labels/_embeddings.zarr", mode="r")
    assert sorted(group.array_keys()) == sorted(SIZES)
    model = read_model(folder / "model")
    store = IslandStore.open(folder / "atlas.zarr")
    for name, n in SIZES.items():
        assert group[name].shape == (n, 6)
        assert group[name].dtype == np.float16
        sample = store.samples[name]
        for cell in [0, n // 2, n - 1] if n else []:
            from annatac_scale.stream.batch import Batch

            ids = np.array([sample.first_cell + cell])
            rows = store.read(ids).renumber(model.vocabulary.new_of_old())
            _, expected = model.typer.predict_with_embedding(Batch.from_open(ids, rows))
            np.testing.assert_allclose(group[name][cell], expected[0], rtol=2e-3, atol=2e-3)
    assert not (folder / "labels/_embeddings.zarr").exists()
    assert len(pd.read_parquet(tmp_path / "labels")) == sum(SIZES.values())
    with pytest.raises(InputError, match="made with embeddings True, now asked for False"):
        predict(folder / "atlas.zarr", folder / "model", tmp_path / "labels")


def test_embeddings_that_were_lost_are_made_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    predict(folder / "atlas.zarr", folder / "model", out, embeddings=True)
    chunks = [out / "_embeddings.zarr/a/c.1.0", out / "_embeddings.zarr/d/c.3.0"]
    before = [chunk.read_bytes() for chunk in chunks]
    chunks[0].unlink()
    chunks[1].write_bytes(b"")
    report = predict(folder / "atlas.zarr", folder / "model", out, embeddings=True)
    assert report.n_parts - report.n_skipped == 2
    assert [chunk.read_bytes() for chunk in chunks] == before


def test_a_model_that_was_left_in_training_predicts_without_dropout(folder: Path, tmp_path: Path) -> None:
    small_model(tmp_path / "model", known=small_known(80))  # whose pooled layer drops islands in training
    predict(folder / "atlas.zarr", tmp_path / "model", tmp_path / "expected", **ADAPTED)
    model = read_model(tmp_path / "model")
    assert model.typer is not None
    model.typer.train()
    predict(folder / "atlas.zarr", model, tmp_path / "labels", **ADAPTED)
    assert_same_bytes(tmp_path / "expected", tmp_path / "labels")


def test_samples_that_came_while_shares_ran_are_completed_by_whoever_ends_last(
    folder: Path, tmp_path: Path
) -> None:
    before = small_store(tmp_path / "a.zarr", {"x": draw_sample(8_010, 3)})
    out = tmp_path / "labels"

    class Meanwhile(Silent):
        def task(self, *arguments: Any) -> Any:
            add_sample(before.path, "y", draw_sample(20, 4))
            later = predict(before.path, folder / "model", out, workers=Workers(share=Share(2, 2)))
            assert not later.complete
            return super().task(*arguments)

    # It opened the store without sample y, whose part the other share wrote, and ends last.
    first = predict(before, folder / "model", out, workers=Workers(share=Share(1, 2)), progress=Meanwhile())
    assert first.complete == (not LabelsFolder.open(out).missing(LabelsFolder.open(out).manifest.parts))
    predict(before.path, folder / "model", out)
    assert list(read_manifest(out).samples) == ["x", "y"]
    assert read_manifest(out).complete
    assert len(pd.read_parquet(out)) == 8_030


def test_what_a_worker_prints_disturbs_nobody(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noisy").mkdir()
    (tmp_path / "noisy/sitecustomize.py").write_text("print('good morning')\n")
    path = os.pathsep.join([str(tmp_path / "noisy"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    run(folder, tmp_path / "labels", workers=Workers(1))
    assert_undisturbed(folder, tmp_path / "labels")


def test_asked_to_end_it_leaves_no_lock_and_goes_on(folder: Path, tmp_path: Path) -> None:
    class Asking(Silent):
        def task(self, *arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().task(*arguments)

    with pytest.raises(RunInterruptedError) as raised:
        run(folder, tmp_path / "labels", progress=Asking())
    assert raised.value.number == signal.SIGTERM
    assert not list((tmp_path / "labels").glob(".*"))
    run(folder, tmp_path / "labels")
    assert_undisturbed(folder, tmp_path / "labels")


def test_labels_go_into_the_obs_of_a_store_and_again(folder: Path, tmp_path: Path) -> None:
    store = small_store(
        tmp_path / "a.zarr", {"x": draw_sample(4_010, 3), "y": draw_sample(7, 4), "z": draw_sample(0, 1)}
    )
    before = {name: sample.x_sha256 for name, sample in store.samples.items()}
    for threshold in (0.3, 0.9):
        out = tmp_path / f"labels{threshold}"
        predict(store.path, folder / "model", out, write_obs=True, novel_threshold=threshold)
        found = IslandStore.open(store.path)
        assert {name: sample.x_sha256 for name, sample in found.samples.items()} == before
        for name, sample in found.samples.items():
            obs = sample.obs()
            parts = sorted(out.glob(f"{name}-*.parquet"))
            expected = pd.concat([pq.read_table(file).to_pandas() for file in parts])
            assert obs["annatac_label"].astype(object).tolist() == expected["label"].tolist()
            assert obs["annatac_confidence"].tolist() == expected["confidence"].tolist()
            assert len([name for name in obs if name == "annatac_label"]) == 1
    with pytest.raises(ConfigError, match=r"--part 1/2: found --write-obs too"):
        predict(
            store.path,
            folder / "model",
            out,
            write_obs=True,
            novel_threshold=0.9,
            workers=Workers(share=Share(1, 2)),
        )


def test_gpus_need_ray(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--gpus: found no --ray"):
        api.predict(folder / "atlas.zarr", model=folder / "model", out=folder / "x", gpus=True, workers=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_actors_make_the_same_table_though_one_is_killed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ended = threading.Event()
    killed: list[int] = []

    def kill_one() -> None:
        while not ended.wait(0.05):
            actors = [p for p in psutil.Process().children(recursive=True) if "_PartActor" in title_of(p)]
            if len(list((tmp_path / "labels").glob("*.parquet"))) >= 2 and actors and not killed:
                killed.append(actors[0].pid)
                actors[0].kill()

    thread = threading.Thread(target=kill_one)
    thread.start()
    progress = Killing(0)
    try:
        run(folder, tmp_path / "labels", workers=Workers(2, "local"), progress=progress)
    finally:
        ended.set()
        thread.join()
    assert len(killed) == 1
    assert any("a worker was lost" in line for line in progress.lines)
    assert_undisturbed(folder, tmp_path / "labels")


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
