"""A run's folder, on a disk or in object storage: its configuration, log and checkpoints, for one process at a time.

run.json              what the run is of; a run with other settings or inputs is refused
config.toml           the configuration; ``--config`` takes it back
metrics.jsonl         one line a logged step or validation (train/metrics.py); tensorboard/: the same
checkpoints/          where to go on (train/checkpoint.py)
split.parquet         which labelled cell trained, validated, calibrated or tested; heldout.parquet: what is said of
                      those that the fit did not see (fine-tuning)
cells/                the ids of the cells that each rank saw, where that was asked for
model/                the model folder, written last: a run that has one is complete
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from annatac_scale.config import to_dict, to_toml
from annatac_scale.errors import ConfigError, InputError
from annatac_scale.store.place import PARTIAL, Location, is_url, joined, place_of
from annatac_scale.train.checkpoint import CHECKPOINTS, checkpoint_steps

LOCK = ".lock"
MODEL = "model"
_RUN, _CONFIG = "run.json", "config.toml"
_PATIENCE_S = 600.0
"""A lease in object storage whose owner died is taken over when nobody renewed it for five minutes."""
_LOOK_S = 2.0

Say = Callable[[str], None]


class RunFolder:
    """The folder of one training run.

    location: a path, or a URL in object storage
    config: the configuration, a frozen dataclass
    identity: JSON-able facts that a resumed run must share with the first one: digests of its inputs
    """

    def __init__(self, location: Location, config: Any, identity: Mapping[str, Any]) -> None:
        self.location = str(location).rstrip("/") if is_url(location) else Path(location)
        self.place = place_of(self.location)
        self.model = joined(self.location, MODEL)
        self._config = config
        self._identity = json.loads(json.dumps({"config": to_dict(config), **identity}))

    @contextmanager
    def use(self, say: Say) -> Iterator["RunFolder"]:
        """Hold the folder for this process, and make it where there is none.

        Raises InputError when it holds something else or another process uses it; ConfigError when it holds a run
        of another configuration or other inputs.
        """
        self._check_kind()
        with self._lease(say) if is_url(self.location) else self._lock():
            self._begin()
            yield self

    @property
    def complete(self) -> bool:
        """Whether the run ended and wrote its model."""
        return self.place.size(f"{MODEL}/config.json") is not None

    def _check_kind(self) -> None:
        if self.place.size(_RUN) is not None:
            return
        if isinstance(self.location, Path) and self.location.exists() and not self.location.is_dir():
            raise InputError(f"{self.location}: found a file, expected a folder; choose another --out")
        # What a run leaves that was killed before it began.
        if any(not name.startswith(".") and name != _CONFIG for name in self._names()):
            raise InputError(f"{self.location}: exists and holds no run; choose another --out")

    def _names(self) -> list[str]:
        if isinstance(self.location, Path):
            return os.listdir(self.location) if self.location.exists() else []
        return self.place.names()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        path = Path(self.location)
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(self._in_use()) from error
            except OSError as error:
                raise InputError(
                    f"{path}: cannot be locked ({error.strerror}), so that two processes could write into it; mount it "
                    "with locks (Lustre: -o flock), or choose another --out"
                ) from error
            yield
        finally:
            os.close(lock)

    @contextmanager
    def _lease(self, say: Say) -> Iterator[None]:
        from annatac_scale.store.leases import try_lease
        from annatac_scale.store.objects import Prefix

        place, begin, seen = Prefix(str(self.location)), time.monotonic(), b""
        while (lease := try_lease(place, LOCK)) is None:
            try:
                found = place.read(LOCK)
            except FileNotFoundError:
                continue  # given back meanwhile
            if not seen:
                say(f"{self.location}: in use, or its user died; waiting to see which, a minute or some")
            if (seen and found != seen) or time.monotonic() - begin > _PATIENCE_S:
                raise InputError(self._in_use())
            seen = found
            time.sleep(_LOOK_S)
        try:
            yield
        finally:
            lease.release()

    def _in_use(self) -> str:
        return f"{self.location}: another process is using this run; wait for it"

    def _begin(self) -> None:
        # A run that never got as far as a checkpoint has nothing to lose: another may take its place.
        started = self.place.size(_RUN) is not None
        if started and (self.complete or checkpoint_steps(self.place.below(CHECKPOINTS))):
            self._check_identity()
        else:
            self.place.write(_CONFIG, to_toml(self._config).encode())
            self.place.write(_RUN, (json.dumps(self._identity, indent=1) + "\n").encode())
        if isinstance(self.location, Path):
            for left_over in self.location.glob(f".{MODEL}.*"):
                shutil.rmtree(left_over, ignore_errors=True)
            for left_over in self.location.rglob(f".*{PARTIAL}"):
                left_over.unlink(missing_ok=True)

    def _check_identity(self) -> None:
        here, there = _flat(self._identity), _flat(self._read_identity())
        differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        if differing:
            shown = "; ".join(
                f"{key.removeprefix('config.')} {_short(there.get(key))} (now {_short(here.get(key))})"
                for key in differing[:5]
            )
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise ConfigError(
                f"{self.location}: holds a run with other settings or inputs: {shown}{more}; "
                "use the same ones to resume it, or choose another --out"
            )

    def _read_identity(self) -> dict[str, Any]:
        try:
            found = json.loads(self.place.read(_RUN))
        except ValueError as error:
            raise InputError(
                f"{joined(self.location, _RUN)}: cannot be read as JSON ({error}); choose another --out"
            ) from error
        return found if isinstance(found, dict) else {}


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
