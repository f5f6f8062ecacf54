"""A Slurm of two nodes on this machine, from Debian's packages slurm-wlm and munge, in a folder of its own."""

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import wait_until

PATH = os.pathsep.join(
    [os.environ["PATH"], "/usr/sbin"]
)  # where the daemons are, for a user that is not root
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
NODES = ("one", "two")

# cred_expire: so long waits a job that is queued again, 120 s by default. MinJobAge: so long is an ended job known.
_CONFIG = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=60
MinJobAge=3600
SchedulerParameters=sched_interval=2
NodeName=one NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4096
NodeName=two NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4096
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing_programs() -> list[str]:
    """What has to be installed yet."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Slurm:
    """A running cluster: submits jobs and tells how they are. folder: of its daemons"""

    def __init__(self, folder: Path) -> None:
        self._environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *words: str, cwd: Path | None = None, **environment: str) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(
            words, cwd=cwd, env={**self._environment, **environment}, capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def n_idle(self) -> int:
        """Nodes without a job; 0 also where the controller is not there yet."""
        words = ["sinfo", "--noheader", "--Node", "--format=%T"]
        done = subprocess.run(words, env=self._environment, capture_output=True, text=True, check=False)
        return done.stdout.split().count("idle")

    def submit(self, script: Path, *options: str, cwd: Path, **environment: str) -> str:
        """Put a job into the queue; returns its id."""
        return self.call("sbatch", "--parsable", *options, str(script), cwd=cwd, **environment).strip()

    def facts(self, job: str) -> list[dict[str, str]]:
        """What Slurm says of a job, or of each task of an array."""
        shown = self.call("scontrol", "--oneliner", "show", "job", job)
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in shown.strip().splitlines()]

    def states(self, job: str) -> set[str]:
        """The state of a job, or of all tasks of an array."""
        return {facts["JobState"] for facts in self.facts(job)}

    def has_ended(self, job: str) -> bool:
        """Whether a job will do no more."""
        return not self.states(job) & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"}


@contextmanager
def running_slurm() -> Iterator[Slurm]:
    """Slurm's daemons, for the time of the context."""
    # Not in pytest's own folder: the path of a socket may have no more than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged's clients have to reach its socket
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in _commands(folder):
            program = shutil.which(command[0], path=PATH)
            assert program is not None
            with (folder / f"{len(daemons)}.{command[0]}.log").open("wb") as log:
                daemons.append(
                    subprocess.Popen(
                        [program, *command[1:]], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                )
            if command[0] == "munged":
                wait_until((folder / "munge.sock").exists, "munged was there", 60)
        slurm = Slurm(folder)
        wait_until(lambda: slurm.n_idle() == len(NODES), f"the nodes were there; see {folder}", 60)
        try:
            yield slurm
        finally:
            slurm.call("scancel", f"--user={getpass.getuser()}")
            wait_until(lambda: slurm.n_idle() == len(NODES), "all jobs had ended", 120)
        shutil.rmtree(folder)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(60)


def _commands(folder: Path) -> list[list[str]]:
    key, config = folder / "key", folder / "slurm.conf"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    (folder / "state").mkdir()
    config.write_text(_CONFIG.format(folder=folder, user=getpass.getuser(), ports=_free_ports(3)))
    own = [f"--{what}={folder}/munge.{what}" for what in ("pid-file", "log-file", "seed-file")]
    return [
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock", *own],
        ["slurmctld", "-D", "-f", str(config)],
        *(["slurmd", "-D", "-f", str(config), "-N", node] for node in NODES),
    ]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
