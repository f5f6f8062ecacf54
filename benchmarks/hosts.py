"""Several hosts on one machine: network namespaces with addresses of their own, joined by a bridge. Needs root.

Processes in one of them see only its network. Cutting a host off takes its link down: its connections get no answer
any more, as when a machine loses power.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INTERFACE = "eth0"


def missing() -> str:
    """Why there can be no hosts here; "" where there can."""
    if shutil.which("ip") is None:
        return "found no `ip` command: install iproute2"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    tried = subprocess.run(
        ["ip", "netns", "add", f"try-{os.getpid()}"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    _ip("netns", "del", f"try-{os.getpid()}")
    return ""


@dataclass(frozen=True)
class Host:
    """A host: the name of its namespace and of its end of the cable at the bridge, and its address."""

    name: str
    port: str
    hub: str
    address: str

    def command(self, *command: str) -> list[str]:
        """The command, run on this host."""
        return ["ip", "netns", "exec", self.name, *command]

    def cut_off(self) -> None:
        """Take its link down."""
        _ip("-n", self.hub, "link", "set", self.port, "down")


@contextmanager
def hosts(n: int) -> Iterator[list[Host]]:
    """``n`` hosts that reach each other, for the time of the context."""
    own = f"ats{os.getpid()}"
    hub = f"{own}-hub"
    found = [Host(f"{own}-{i}", f"port{i}", hub, f"10.77.0.{i + 1}") for i in range(n)]
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for host in found:
            _ip("netns", "add", host.name)
            _ip("link", "add", INTERFACE, "netns", host.name, "type", "veth", "peer", host.port, "netns", hub)
            _ip("-n", hub, "link", "set", host.port, "master", "bridge", "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            for link in ("lo", INTERFACE):
                _ip("-n", host.name, "link", "set", link, "up")
        yield found
    finally:
        for name in [*(host.name for host in found), hub]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
