"""A run's folder: its configuration, log and checkpoints. Checkpoints are written aside and renamed.

config.toml           the configuration, as used
metrics.jsonl         one line a logged step or validation
checkpoints/last.pt   where to go on; best.pt: the weights that validated best
model/                the model folder, written when the run is complete
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from annatac_scale.config import to_dict, to_toml
from annatac_scale.errors import ConfigError, InputError, ModelError


class RunFolder:
    """The folder of one training run.

    Raises InputError when the folder holds something else or another process uses it; ConfigError when it holds
    a run of another configuration.
    """

    def __init__(self, path: Path | str, config: Any, identity: Mapping[str, Any]) -> None:
        """identity: JSON-able facts that a resumed run must share with the first one: store digests, inputs."""
        self.path = Path(path)
        self.model = self.path / "model"
        self.config = config
        self._identity = {"config": to_dict(config), **identity}

    @contextmanager
    def use(self) -> Iterator["RunFolder"]:
        """Hold the folder for this process."""
        started = self.path / "run.json"
        if self.path.exists() and not started.exists() and any(self.path.iterdir()):
            raise InputError(f"{self.path}: exists and holds no run; choose another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{self.path}: another process is using this run; wait for it") from error
            if started.exists():
                self._check_identity(json.loads(started.read_text()))
            else:
                write_aside(started, json.dumps(self._identity, indent=1).encode())
                (self.path / "config.toml").write_text(to_toml(self.config))
            yield self
        finally:
            os.close(lock)

    def _check_identity(self, found: dict[str, Any]) -> None:
        here, there = _flat(json.loads(json.dumps(self._identity))), _flat(found)
        differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        if differing:
            shown = "; ".join(f"{key} {there.get(key)} (now {here.get(key)})" for key in differing[:5])
            raise ConfigError(
                f"{self.path}: holds a run with other settings: {shown}; use the same settings to resume it, "
                "or choose another --out"
            )

    @property
    def complete(self) -> bool:
        """Whether the run ended and wrote its model."""
        return (self.model / "config.json").exists()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Write checkpoint ``name``: nested dicts of tensors and plain values."""
        target = self.path / "checkpoints" / f"{name}.pt"
        target.parent.mkdir(exist_ok=True)
        aside = target.with_suffix(".part")
        with aside.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)

    def load(self, name: str) -> dict[str, Any] | None:
        """Read checkpoint ``name``, None when there is none. Raises ModelError when it is damaged."""
        source = self.path / "checkpoints" / f"{name}.pt"
        if not source.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise ModelError(
                f"{source}: damaged checkpoint ({error}); delete the run and start again"
            ) from error
        return state


def write_aside(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(data)
    os.replace(aside, path)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
