"""Pretrains on a Ray cluster of three hosts, cuts one off in the middle of an epoch, and looks at what becomes of it.

    python benchmarks/lost_node.py [--steps 300] [--save]

Hosts are network namespaces of this machine (benchmarks/hosts.py), which needs root. Two to three workers train; after
the cut two go on. Compared are the losses of all steps with a run in one process that nothing disturbed, and the cells
of the attempts that the final weights come from: each has to come once an epoch. ``recovery_s``: from the cut until
the next attempt is about to take its first step. Ends with one line of JSON; exit 1 where a loss differs by more than
1e-4 or a cell came twice or not at all.
"""

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import commands
from hosts import INTERFACE, Host, hosts, missing
from kill_pretrain import EVERY_STEPS, Run, cells_wrong, finish, recoveries

RESULTS = Path(__file__).with_name("results") / "lost_node.json"
N_HOSTS = 3
PORT = 6379
TOLERANCE = 1e-4
RAY = str(Path(sys.executable).with_name("ray"))
CLUSTER_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "GLOO_SOCKET_IFNAME": INTERFACE,
    "RAY_USAGE_STATS_ENABLED": "0",
    # A host that does not answer for 5 seconds is lost; Ray's own settings take about 30.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}


@contextmanager
def cluster(of: Sequence[Host], folder: Path) -> Iterator[str]:
    """A Ray cluster on the hosts, the first one its head, one CPU each; gives its address."""
    address = f"{of[0].address}:{PORT}"
    environment = {**os.environ, **commands.ENVIRONMENT, **CLUSTER_ENVIRONMENT}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number, host in enumerate(of):
            role = ["--head", "--port", str(PORT), "--include-dashboard", "false"]
            if number:
                role = ["--address", address]
            command = [
                *host.command(RAY, "start", "--block", "--node-ip-address", host.address, "--num-cpus", "1"),
                "--object-store-memory", "100000000", *role,
            ]  # fmt: skip
            with (folder / f"host{number}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
            _wait_until_up(of[0], address, number + 1)
        yield address
    finally:
        for process in reversed(started):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


_COUNT = """
import ray, sys
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
sys.exit(sum(node["Alive"] for node in ray.nodes()) != int(sys.argv[2]))
"""


def _wait_until_up(head: Host, address: str, n: int) -> None:
    until = time.monotonic() + 120
    while True:
        command = head.command(sys.executable, "-c", _COUNT, address, str(n))
        environment = {**os.environ, **CLUSTER_ENVIRONMENT}
        if subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0:
            return
        if time.monotonic() > until:
            raise SystemExit(f"the cluster has not come up: {n} hosts expected")


@dataclass(frozen=True)
class ClusterRun(Run):
    """The run on a cluster, started on its head."""

    head: Host | None = None
    address: str = ""

    @property
    def command(self) -> list[str]:
        assert self.head is not None
        return self.head.command(*super().command, "--ray", self.address)

    def start(self) -> subprocess.Popen[bytes]:
        os.environ.update(CLUSTER_ENVIRONMENT)
        return super().start()


def losses(run: Run) -> dict[int, float]:
    """Loss by step, as the last attempt that took the step gave it."""
    return {line["step"]: line["vector_loss"] for line in run.metrics() if "rate" in line}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save", action="store_true", help=f"write the JSON into results/{RESULTS.name} too")
    options = parser.parse_args()
    if why := missing():
        parser.error(why)
    with tempfile.TemporaryDirectory() as temporary, hosts(N_HOSTS) as of:
        folder = Path(temporary)
        store = folder / "cells.zarr"
        with as_file(files("annatac_scale") / "data" / "cerebellum.h5ad") as data:
            commands.printed([
                *commands.ANNATAC, "convert", str(data), "--assembly", "mm9", "--select", "all", "--out", str(store),
            ])  # fmt: skip
        alone = Run(store, folder / "alone" / "run", options.steps, workers="0")
        finish(alone, alone.start())
        with cluster(of, folder) as address:
            run = ClusterRun(store, folder / "cut" / "run", options.steps, f"2:{N_HOSTS}", of[0], address)
            process = run.start()
            try:
                run.wait_for_step(2 * EVERY_STEPS, process)
                of[-1].cut_off()
                cut = {"step": run.newest_step(), "at": time.time()}
                print(f"cut off a host after step {cut['step']}", flush=True)
                finish(run, process)
            finally:
                process.kill()
        expected, found = losses(alone), losses(run)
        differences = [abs(found.get(step, float("inf")) - loss) for step, loss in expected.items()]
        report = {
            "benchmark": "lost_node",
            "hosts": N_HOSTS,
            "steps": len(expected),
            "cut_after_step": cut["step"],
            "world_sizes": [line["world_size"] for line in run.metrics() if "began" in line],
            "recovery_s": recoveries(run, [cut])[0],
            "largest_difference_of_a_loss": max(differences),
            "cells_wrong": cells_wrong(run, alone),
            **commands.conditions(),
        }
    report["failed"] = [] if max(differences) <= TOLERANCE and not report["cells_wrong"] else ["lost_node"]
    commands.end(report, RESULTS if options.save else None)


if __name__ == "__main__":
    main()
