"""Locks in object storage: an object that is put if it is not there, and kept fresh while its owner lives.

A lease names its owner. Its process rewrites it every minute; one that nobody rewrote for five minutes, or whose owner
is a process of this machine that is no more, is taken over. Whoever takes over makes sure with a conditional write that
the lease did not change meanwhile. A commit does not rest on leases but on conditional writes of the index (see
metadata.py); they keep two runs from doing the same work, and an obs from being replaced twice at once.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from annatac_scale.errors import StoreError
from annatac_scale.store.objects import Found, Prefix

REFRESH_S = 60.0
STALE_S = 300.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Owner:
    """Who holds a lease. host: machine and process namespace; started: of the process, in ticks of its machine"""

    host: str
    pid: int
    started: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    renewed: int = 0

    @classmethod
    def me(cls) -> "Owner":
        """This process, with an id of its own for each lease."""
        return cls(_host(), os.getpid(), _started(os.getpid()))

    def is_dead(self) -> bool:
        """Whether it was a process of this machine that is gone."""
        return self.host == _host() and _started(self.pid) != self.started

    def body(self) -> bytes:
        """The content of the lease."""
        return json.dumps(asdict(self)).encode()


def _host() -> str:
    """Tells machines, boots, and containers apart, where the system says."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str:
    """When a process started; "" where there is none, "?" where the system does not say."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            return "?"
        return "?"
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


@dataclass
class Lease:
    """A lease that this process holds until ``release``."""

    place: Prefix
    name: str
    owner: Owner
    etag: str

    def renew(self) -> bool:
        """Rewrite it; False where another took it over."""
        owner = Owner(
            self.owner.host, self.owner.pid, self.owner.started, self.owner.id, self.owner.renewed + 1
        )
        etag = self.place.replace(self.name, owner.body(), self.etag)
        if etag is None:
            return False
        self.owner, self.etag = owner, etag
        return True

    def release(self) -> None:
        """Give it back, if it is still ours."""
        _KEEPER.drop(self)
        with suppress(FileNotFoundError):
            if self.place.find(self.name).etag == self.etag:
                self.place.remove(self.name)


class _Keeper:
    """The thread that renews the leases of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, Lease] = {}
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()

    def add(self, lease: Lease) -> None:
        with self._lock:
            self._held[id(lease)] = lease
            if self._thread is None or not self._thread.is_alive():
                self._wake = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._wake,), daemon=True, name="leases"
                )
                self._thread.start()

    def drop(self, lease: Lease) -> None:
        with self._lock:
            self._held.pop(id(lease), None)
            if not self._held:
                self._wake.set()
                self._thread = None

    def _run(self, wake: threading.Event) -> None:
        while not wake.wait(REFRESH_S):
            with self._lock:
                held = list(self._held.values())
            for lease in held:
                self._renew(lease)

    def _renew(self, lease: Lease) -> None:
        with self._lock:  # none is renewed while, or after, it is dropped
            if id(lease) not in self._held:
                return
            with suppress(StoreError):  # the storage does not answer: the next turn tries again
                if not lease.renew():
                    del self._held[id(lease)]


_KEEPER = _Keeper()


def try_lease(place: Prefix, name: str) -> Lease | None:
    """Take a lease; None where another holds it."""
    while True:
        owner = Owner.me()
        etag = place.write_new(name, owner.body())
        if etag is None:
            try:
                found = place.find(name)
            except FileNotFoundError:
                continue  # given back meanwhile
            if not _is_abandoned(place, name, found):
                return None
            etag = place.replace(name, owner.body(), found.etag)
        if etag is not None:
            lease = Lease(place, name, owner, etag)
            _KEEPER.add(lease)
            return lease


def wait_for_lease(place: Prefix, name: str) -> Lease:
    """Take a lease; waits for other holders."""
    while (lease := try_lease(place, name)) is None:
        time.sleep(_POLL_S)
    return lease


def _is_abandoned(place: Prefix, name: str, found: Found) -> bool:
    try:
        owner = Owner(**json.loads(found.data))
    except (ValueError, TypeError):
        owner = None
    if owner is not None and owner.is_dead():
        return True
    if (datetime.now(UTC) - found.modified).total_seconds() < STALE_S:
        return False
    # It looks old by our clock, which may be wrong: one that lives is renewed before we have waited twice as long.
    until = time.monotonic() + 2 * REFRESH_S
    while time.monotonic() < until:
        time.sleep(min(_POLL_S, REFRESH_S))
        try:
            if place.find(name).etag != found.etag:
                return False
        except FileNotFoundError:
            return True  # given back: the conditional write will fail, and the next turn put a new one
    return True
