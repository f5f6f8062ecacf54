"""A run's folder: its configuration, log and checkpoints. Checkpoints are written aside and renamed.

run.json              what the run is of; a run with other settings or inputs is refused
config.toml           the configuration; ``--config`` takes it back
metrics.jsonl         one line a logged step or validation
checkpoints/last.pt   where to go on; best.pt: the weights that validated best
model/                the model folder, written last: a run that has one is complete
"""

import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from annatac_scale.config import to_dict, to_toml
from annatac_scale.errors import ConfigError, InputError, ModelError

_CHECKPOINTS = "checkpoints"
_BEFORE_THE_RUN = frozenset({".lock", "config.toml", ".run.json.part", ".config.toml.part"})
"""What a folder may hold in which a run was killed before it began."""


class RunFolder:
    """The folder of one training run.

    config: the configuration, a frozen dataclass
    identity: JSON-able facts that a resumed run must share with the first one: digests of its inputs
    """

    def __init__(self, path: Path | str, config: Any, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.model = self.path / "model"
        self._config = config
        self._identity = json.loads(json.dumps({"config": to_dict(config), **identity}))

    @contextmanager
    def use(self) -> Iterator["RunFolder"]:
        """Hold the folder for this process, and make it where there is none.

        Raises InputError when it holds something else or another process uses it; ConfigError when it holds a run
        of another configuration or other inputs.
        """
        self._check_kind()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{self.path}: another process is using this run; wait for it") from error
            self._begin()
            yield self
        finally:
            os.close(lock)

    def _check_kind(self) -> None:
        if not self.path.exists() or (self.path / "run.json").exists():
            return
        if not self.path.is_dir() or any(file.name not in _BEFORE_THE_RUN for file in self.path.iterdir()):
            raise InputError(f"{self.path}: exists and holds no run; choose another --out")

    def _begin(self) -> None:
        started = self.path / "run.json"
        # A run that never got as far as a checkpoint has nothing to lose: another may take its place.
        if started.exists() and (self.complete or (self.path / _CHECKPOINTS / "last.pt").exists()):
            self._check_identity(_read_json(started))
        else:
            _write_aside(self.path / "config.toml", to_toml(self._config))
            _write_aside(started, json.dumps(self._identity, indent=1) + "\n")
        (self.path / _CHECKPOINTS).mkdir(exist_ok=True)
        for left_over in self.path.glob(f".{self.model.name}.*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def _check_identity(self, found: Mapping[str, Any]) -> None:
        here, there = _flat(self._identity), _flat(found)
        differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        if differing:
            shown = "; ".join(
                f"{key.removeprefix('config.')} {_short(there.get(key))} (now {_short(here.get(key))})"
                for key in differing[:5]
            )
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise ConfigError(
                f"{self.path}: holds a run with other settings or inputs: {shown}{more}; "
                "use the same ones to resume it, or choose another --out"
            )

    @property
    def complete(self) -> bool:
        """Whether the run ended and wrote its model."""
        return (self.model / "config.json").exists()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def has(self, name: str) -> bool:
        """Whether there is a checkpoint ``name``."""
        return self._checkpoint(name).exists()

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Write checkpoint ``name``: nested dicts of tensors and plain values."""
        target = self._checkpoint(name)
        aside = target.with_suffix(".part")
        with aside.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)

    def load(self, name: str) -> dict[str, Any]:
        """Read checkpoint ``name``. Raises ModelError when it is damaged, FileNotFoundError when there is none."""
        source = self._checkpoint(name)
        try:
            # torch does not look at the sums that it writes.
            with zipfile.ZipFile(source) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            state: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=True)
        except (zipfile.BadZipFile, EOFError, KeyError, RuntimeError, ValueError, UnpicklingError) as error:
            found = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{source}: damaged checkpoint ({found}); delete {source.parent} to train from the start"
            ) from error
        return state

    def _checkpoint(self, name: str) -> Path:
        return self.path / _CHECKPOINTS / f"{name}.pt"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); choose another --out") from error
    return found if isinstance(found, dict) else {}


def _write_aside(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text)
    os.replace(aside, path)


def _short(value: Any) -> str:
    """The value for a message; of a digest the first digits."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, its keys dotted."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
