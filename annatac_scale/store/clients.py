"""Clients of object storage, made once for a bucket, an environment and a process; they work in forked processes too.

obstore runs its requests on threads that it starts once. A forked process has none of them, and would wait for them for
ever. So a process forked from one that had loaded obstore loads its compiled part once more, from a copy in memory, for
the same file would be the same library to the system; the copy starts threads of its own. This costs a child that
reads object storage some 20 ms and 15 MB, others nothing. What came with the fork is never used, nor given back.
"""

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterable
from datetime import timedelta
from importlib.machinery import ExtensionFileLoader
from types import ModuleType
from typing import Any

from annatac_scale.errors import StoreError

RETRIES: dict[str, Any] = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=90),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
STALLED = timedelta(seconds=30)
"""A read that gets no byte for so long is begun again."""

_COMPILED = "obstore._obstore"
_VARIABLES = ("AWS_", "GOOGLE_")
_MOST_CLIENTS = 64

_Key = tuple[str, tuple[tuple[str, str], ...], bool]


class _Process:
    """What this process, and none that it was forked from, may use.

    forks: how many forks lie between it and the first one that had loaded obstore
    """

    def __init__(self, forks: int = 0) -> None:
        self.forks = forks
        self.loading = threading.Lock()
        self.obstore: Any = None
        self.clients: dict[_Key, Any] = {}


_here = _Process()
_inherited: list[_Process] = []


def obstore() -> Any:
    """obstore's compiled module, with its functions, ``exceptions`` and ``Bytes``, as this process may use it.

    Raises StoreError in a forked process that cannot have one of its own.
    """
    if _here.obstore is None:
        with _here.loading:
            if _here.obstore is None:
                _here.obstore = _own_copy(_here.forks) if _here.forks else importlib.import_module(_COMPILED)
    return _here.obstore


def client(root: str, reading: bool = False) -> Any:
    """The client for ``scheme://bucket``, by the environment as it is now.

    reading: for requests whose answer may be asked for again when it does not come on. As many requests may be in
    flight as there are threads that ask; each has a connection of its own, which the next one uses again.
    """
    key = (root, _environment(), reading)
    found = _here.clients.get(key)
    if found is not None:
        return found
    obstore()
    with _here.loading:
        if len(_here.clients) >= _MOST_CLIENTS:
            _here.clients.clear()
        if key not in _here.clients:
            _here.clients[key] = _connect(*key)
        return _here.clients[key]


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple((name, os.environ[name]) for name in sorted(os.environ) if name.startswith(_VARIABLES))


def _connect(root: str, environment: Iterable[tuple[str, str]], reading: bool) -> Any:
    endpoint = next((value for name, value in environment if name == "AWS_ENDPOINT_URL"), "")
    options = {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=10),
        "timeout": timedelta(seconds=300),
    }
    if reading:
        options["read_timeout"] = STALLED
    return obstore()._store.from_url(root, client_options=options, retry_config=RETRIES)


def _forked() -> None:
    """In a child: leave alone what is the parent's. Nothing is freed, for that would talk to threads that are gone."""
    global _here
    _inherited.append(_here)
    _here = _Process(_here.forks + 1 if _here.forks or _COMPILED in sys.modules else 0)


os.register_at_fork(after_in_child=_forked)


def _own_copy(forks: int) -> ModuleType:
    """obstore's compiled module, loaded once more, and not to be imported by others."""
    found = importlib.util.find_spec(_COMPILED)
    try:
        if found is None or found.origin is None:
            raise ImportError(f"{_COMPILED} is not there")
        copy = os.memfd_create("obstore")
        try:
            with open(found.origin, "rb") as file:
                while os.sendfile(copy, file.fileno(), None, 1 << 30):
                    pass
            # The system tells libraries apart by their path first: each fork needs one that no parent used.
            return _load(f"/proc/self/{'./' * forks}fd/{copy}")
        finally:
            os.close(copy)
    except (OSError, ImportError, AttributeError) as error:  # AttributeError: a system without memfd_create
        raise StoreError(
            f"object storage cannot be read in this forked process ({error}); expected one that was not forked; start "
            "it by forkserver or spawn: multiprocessing.get_context('forkserver'), or DataLoader(..., "
            "multiprocessing_context='forkserver')"
        ) from error


def _load(path: str) -> ModuleType:
    kept = {name: module for name, module in sys.modules.items() if name.startswith("obstore")}
    loader = ExtensionFileLoader(_COMPILED, path)
    spec = importlib.util.spec_from_file_location(_COMPILED, path, loader=loader)
    if spec is None:
        raise ImportError(f"{path}: no compiled module")
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    finally:
        sys.modules.update(kept)  # its parts enter themselves
    return module
