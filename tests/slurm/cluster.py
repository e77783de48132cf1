"""A throw-away SLURM on this machine: a controller, and nodes with their own networks.

Everything runs in one PID namespace. Its first process waits for the end of its input, so that
everything ends and the folder is deleted when the Cluster is left or the process that made it dies.
A node has its own host name, address and loopback, as on a real cluster: a job that looks for
another node at 127.0.0.1 fails here, too, and a node that is killed takes all its processes along.
Needs root and Debian's slurm-wlm, munge and iproute2.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.helpers.processes import HANG_SECONDS

_TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")
# This Python's commands, and where Debian keeps daemons.
_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
_NAMESPACES = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc")

# The first process of the cluster. Its /run is private, and so are munge's socket and what `ip`
# notes about networks.
_CONTROLLER = """
set -e
hostname controller
mount --bind hosts /etc/hosts
mount -t tmpfs tmpfs /run
mkdir /run/munge
ip link set lo up
ip link add switch type bridge
ip address add 10.77.0.254/24 dev switch
ip link set switch up
munged --key-file "$PWD/munge.key" --seed-file "$PWD/munge.seed" --log-file "$PWD/munged.log" \
  --pid-file "$PWD/munged.pid" --force
slurmctld -D -c &
boot() {
  while :; do  # whenever it was switched off
    while [[ -e $1.off ]]; do sleep 0.1; done
    nsenter --net="/run/netns/$1" unshare --uts --mount --pid --fork --mount-proc bash -c '
      hostname "$1"
      while :; do
        slurmd -D -N "$1" || true
        while [[ -e $1.dead ]]; do sleep 0.1; done
      done' node "$1" || true
  done
}
for node in "$@"; do
  ip netns add "$node"
  ip link add "$node" type veth peer name eth0 netns "$node"
  ip link set "$node" master switch up
  ip -netns "$node" link set lo up
  ip -netns "$node" address add "10.77.0.${node#node}/24" dev eth0
  ip -netns "$node" link set eth0 up
  boot "$node" &
done
read -r _ || true  # its end
kill -KILL -1      # everything but this process
rm -r "$PWD"
"""

_SLURM_CONF = """\
ClusterName=throwaway
SlurmctldHost=controller(10.77.0.254)
SlurmUser=root
# A requeued job starts when its old credential has expired: after 120 seconds by default.
AuthInfo=cred_expire=5
# A node that does not answer is given up after about 20 seconds: by default after 300.
SlurmdTimeout=6
# Long enough to save a checkpoint on a busy machine: by default 30.
KillWait=300
MessageTimeout=5
TCPTimeout=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-{nodes}] CPUs={cpus} Sockets={sockets} CoresPerSocket={cores} Gres=gpu:{gpus}
PartitionName=all Nodes=ALL Default=YES GraceTime=300
PartitionName=urgent Nodes=ALL PriorityTier=9
"""


def what_is_missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "a throw-away SLURM needs root"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    if missing:
        return f"a throw-away SLURM needs slurm-wlm, munge and iproute2: no {', '.join(missing)}"
    probe = [*_NAMESPACES, "ip", "link", "add", "probe", "type", "bridge"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        return "a throw-away SLURM needs network namespaces, which are forbidden here"
    return None


class Cluster:
    """Nodes node1, node2, ... with `cpus` CPUs and `gpus` devices that SLURM treats as GPUs.

    sockets: over which the CPUs seem to be spread; jobs can use those that this machine has
    """

    def __init__(self, nodes: int = 1, cpus: int = 2, gpus: int = 2, sockets: int = 1) -> None:
        self._names = [f"node{number}" for number in range(1, nodes + 1)]
        self._cpus = cpus
        self._gpus = gpus
        self._sockets = sockets

    def __enter__(self) -> "Cluster":
        self._folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._write_files()
        with (self._folder / "controller.log").open("wb") as log:
            self._controller = subprocess.Popen(
                [*_NAMESPACES, "bash", "-c", _CONTROLLER, "controller", *self._names],
                cwd=self._folder,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_until("idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._controller.communicate(timeout=HANG_SECONDS)  # ends its input
        shutil.rmtree(self._folder, ignore_errors=True)  # normally deleted already

    def run(self, *command: str, folder: Path | None = None, **environment: str) -> str:
        """Runs a command on the controller, in `folder`; what it prints. Raises if it fails."""
        controller = self._controller.pid
        inside = ["nsenter", f"--target={controller}", "--net", "--uts", "--mount"]
        inside += [f"--pid=/proc/{controller}/ns/pid_for_children"]
        inside += ["env", f"--chdir={folder or self._folder}", *command]
        result = subprocess.run(
            inside,
            env=self._environment() | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {result.stdout}")
        return result.stdout

    def kill_node(self, name: str) -> None:
        """Switches a node off without notice; its processes die. See `restore`."""
        self.run("ip", "link", "set", name, "down")
        (self._folder / f"{name}.off").touch()
        self._kill(lambda command: command[:2] == ["bash", "-c"] and command[3:] == ["node", name])

    def kill_daemon(self, name: str) -> None:
        """Kills a node's daemon but leaves its jobs running. See `restore`."""
        (self._folder / f"{name}.dead").touch()
        self._kill(lambda command: command == ["slurmd", "-D", "-N", name])

    def restore(self, name: str) -> None:
        """Brings back what was killed on a node, and waits until it can be used."""
        self.run("ip", "link", "set", name, "up")
        (self._folder / f"{name}.off").unlink(missing_ok=True)
        (self._folder / f"{name}.dead").unlink(missing_ok=True)
        self._wait_until("idle", "mixed", "allocated")

    def processes(self) -> list[psutil.Process]:
        """All processes of the cluster, on all nodes."""
        return psutil.Process(self._controller.pid).children(recursive=True)

    def submit(self, *arguments: str, folder: Path, **environment: str) -> str:
        """The number of the job that `sbatch arguments` in `folder` has made."""
        return self.run("sbatch", "--parsable", *arguments, folder=folder, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, ExitCode, Restarts, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, **expected: str) -> dict[str, str]:
        """The job, once it is as expected; fails if it ends otherwise, or hangs."""
        deadline = time.monotonic() + HANG_SECONDS
        while True:
            job = self.job(number)
            if expected.items() <= job.items():
                return job
            if job["JobState"] in _ENDED or time.monotonic() > deadline:
                log = Path(job["StdOut"])
                text = log.read_text() if log.exists() else "(no log)"
                actual = {key: job[key] for key in ("JobState", "Reason", "ExitCode", "Restarts")}
                raise AssertionError(f"job {number} is not {expected}, but {actual}\n{text}")
            time.sleep(0.2)

    def _kill(self, is_target: Callable[[list[str]], bool]) -> None:
        targets = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if is_target(process.cmdline()):
                    targets.append(process)
        assert targets
        for process in targets:
            process.kill()

    def _environment(self) -> dict[str, str]:
        """Without variables of a SLURM job that runs the tests: sbatch would pass them on."""
        own = {name: value for name, value in os.environ.items() if "SLURM" not in name}
        folder = str(self._folder)
        own |= {"PATH": _PATH, "SLURM_CONF": f"{folder}/slurm.conf", "TMPDIR": folder}
        if self._sockets > 1:  # what the daemons of the nodes take for the machine
            own["HWLOC_COMPONENTS"] = "synthetic"
            own["HWLOC_SYNTHETIC"] = (
                f"Package:{self._sockets} NUMANode:1 Core:{self._cpus // self._sockets} PU:1"
            )
        return own

    def _write_files(self) -> None:
        folder = self._folder
        (folder / "state").mkdir()
        for name in self._names:
            (folder / "spool" / name).mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        hosts = {"127.0.0.1": "localhost", "::1": "localhost", "10.77.0.254": "controller"}
        hosts |= {f"10.77.0.{number}": name for number, name in enumerate(self._names, 1)}
        (folder / "hosts").write_text("".join(f"{ip} {name}\n" for ip, name in hosts.items()))
        (folder / "slurm.conf").write_text(
            _SLURM_CONF.format(
                folder=folder,
                nodes=len(self._names),
                cpus=self._cpus,
                sockets=self._sockets,
                cores=self._cpus // self._sockets,
                gpus=self._gpus,
            )
        )
        # SLURM accepts any character devices, and hands them out by number.
        devices = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")[: self._gpus]
        (folder / "gres.conf").write_text("".join(f"Name=gpu File={path}\n" for path in devices))

    def _wait_until(self, *good_states: str) -> None:
        """Until every node is in one of these states."""
        deadline = time.monotonic() + HANG_SECONDS
        is_listening = (self._folder / "slurmctld.pid").exists  # in its own network, not in ours
        problem = "no controller"
        while time.monotonic() < deadline:
            try:
                states = is_listening() and self.run("sinfo", "--noheader", "--Node", "--format=%T")
            except RuntimeError as error:
                states, problem = "", str(error)
            if states and {*states.split()} <= {*good_states}:
                return
            problem = states or problem
            time.sleep(0.1)
        logs = [f"{path.name}:\n{path.read_text()}" for path in self._folder.glob("*.log")]
        raise RuntimeError(f"SLURM does not come up: {problem}\n" + "\n".join(logs))
