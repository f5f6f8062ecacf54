import json
import struct
import threading
import time

import pytest
from tensorboardX.proto.event_pb2 import Event

from annatac_scale.errors import StoreError
from annatac_scale.store.objects import Prefix
from annatac_scale.train.metrics import LossTotal, Meter, MetricsLog, StepFacts


def events(folder):
    """(tag, step, value) of every scalar, read as TensorFlow's record format says: length, crc, data, crc."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_and_scalars_are_there_as_soon_as_they_are_written(tmp_path):
    log = MetricsLog(tmp_path, pytest.fail)
    log.write({"step": 20, "epoch": 1, "loss": 0.5})
    (line,) = lines(tmp_path)
    assert line.pop("time") > 1.6e9
    assert line == {"attempt": 1, "step": 20, "epoch": 1, "loss": 0.5}
    assert events(tmp_path) == [("epoch", 20, 1.0), ("loss", 20, 0.5)]


def test_attempts_are_counted_and_go_on_below_each_other(tmp_path):
    for number in (1, 2, 3):
        log = MetricsLog(tmp_path, pytest.fail)
        assert log.attempt == number
        log.write({"step": number, "began": True})
        log.close()
    assert [line["attempt"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_line_that_a_killed_attempt_left_unfinished_does_not_swallow_the_next_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"attempt": 1, "step": 0, "began": true}\n{"attempt": 1, "st')
    log = MetricsLog(tmp_path, pytest.fail)
    assert log.attempt == 2
    log.write({"step": 5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 5


def test_training_does_not_wait_for_object_storage(s3, monkeypatch):
    go_on, write = threading.Event(), Prefix.write

    def slowly(*arguments, **options):
        go_on.wait(20)
        write(*arguments, **options)

    monkeypatch.setattr(Prefix, "write", slowly)
    url = f"{s3.bucket()}/run"
    log = MetricsLog(url, pytest.fail)
    for step in range(50):
        log.write({"step": step})
    assert s3.keys(url) == []
    go_on.set()
    log.close()
    assert [json.loads(line)["step"] for line in s3.get(f"{url}/metrics.jsonl").splitlines()] == [*range(50)]


def test_object_storage_that_takes_no_metrics_is_told_of_once_and_ends_nothing(s3, monkeypatch):
    def refuse(*arguments, **options):
        raise StoreError("s3://b/metrics.jsonl: cannot be written (403)")

    monkeypatch.setattr(Prefix, "write", refuse)
    said = []
    log = MetricsLog(f"{s3.bucket()}/run", said.append)
    until = time.monotonic() + 20
    while not said and time.monotonic() < until:
        log.write({"step": 1})
        time.sleep(0.01)
    log.close()
    assert said == [
        "metrics are not written any more, training goes on: s3://b/metrics.jsonl: cannot be written (403)"
    ]


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_what_cannot_be_written_is_told_of_once_and_ends_nothing(tmp_path, name):
    said = []
    log = MetricsLog(tmp_path, said.append)
    (tmp_path / name).write_text("") if name == "tensorboard" else (tmp_path / name).mkdir()
    for step in range(20):
        log.write({"step": step, "loss": 0.5})
    log.close()
    (line,) = said
    assert line.startswith("metrics are not written any more, training goes on: ")
    assert name in line


def test_a_meter_forms_means_over_targets_and_shares_of_time():
    meter = Meter()
    meter.add(StepFacts({"it": LossTotal(6.0, 3.0, 1.0)}, 10, 0.1, 0.0, 0.0))
    meter.add(StepFacts({"it": LossTotal(2.0, 1.0, 1.0)}, 10, 0.1, 0.0, 0.0))
    figures = meter.figures()
    assert (figures["it_loss"], figures["it_accuracy"]) == (2.0, 0.5)
    assert (figures["waiting_share"], figures["computing_share"]) == (0.0, 0.0)
    assert figures["cells_per_s"] > 0
