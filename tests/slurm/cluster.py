"""A throw-away SLURM on this machine: a controller, and nodes with networks of their own.

Everything runs in one PID namespace, whose first process waits for its input to end: when the
Cluster is closed, or the process that made it dies, the kernel ends whatever is left in it. A node
has its own host name, addresses and loopback, as on a real cluster: a job that calls another node
127.0.0.1 fails here too. Needs root and Debian's slurm-wlm, munge and iproute2.
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

_TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")
_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"  # where Debian keeps daemons
_NAMESPACES = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc")

# The first process of the cluster; /run is private, so munge's socket is not the machine's.
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
for node in "$@"; do
  ip netns add "$node"
  ip link add "$node" type veth peer name eth0 netns "$node"
  ip link set "$node" master switch up
  ip -netns "$node" link set lo up
  ip -netns "$node" address add "10.77.0.${node#node}/24" dev eth0
  ip -netns "$node" link set eth0 up
  nsenter --net="/run/netns/$node" unshare --uts --mount --pid --fork --mount-proc \
    bash -c 'hostname "$1"; slurmd -D -N "$1"; exit' node "$node" &
done
read -r _
"""

_SLURM_CONF = """
ClusterName=throwaway
SlurmctldHost=controller(10.77.0.254)
SlurmUser=root
# A requeued job waits until its old credential has expired: 120 seconds by default.
AuthInfo=cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=1
ReturnToService=2
SlurmdParameters=config_overrides
"""


def what_is_missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "a throw-away SLURM needs root"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    if missing:
        return f"a throw-away SLURM needs {', '.join(missing)} (slurm-wlm, munge, iproute2)"
    probe = [*_NAMESPACES, "ip", "link", "add", "probe", "type", "bridge"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        return "a throw-away SLURM needs namespaces, which this kernel or container forbids"
    return None


class Cluster:
    """Nodes node1, node2, ... of `cpus` CPUs and `gpus` devices that SLURM takes for GPUs."""

    def __init__(self, nodes: int = 1, cpus: int = 2, gpus: int = 0) -> None:
        self._names = [f"node{number}" for number in range(1, nodes + 1)]
        self._cpus = cpus
        self._gpus = gpus

    def __enter__(self) -> "Cluster":
        self._folder = tempfile.TemporaryDirectory(prefix="slurm-")
        self._root = Path(self._folder.name)
        self._write_files()
        with (self._root / "controller.log").open("wb") as log:
            self._controller = subprocess.Popen(
                [*_NAMESPACES, "bash", "-c", _CONTROLLER, "controller", *self._names],
                cwd=self._root,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._controller.communicate(timeout=30)  # ends its input, and so everything in it
        self._folder.cleanup()

    def run(
        self, *command: str, folder: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A command on the controller, in `folder`: sbatch, scontrol, scancel, ..."""
        inside = ["nsenter", f"--target={self._controller.pid}", "--net", "--uts", "--mount"]
        inside += [f"--pid=/proc/{self._controller.pid}/ns/pid_for_children"]
        inside += ["env", f"--chdir={folder or self._root}", *command]
        return subprocess.run(
            inside,
            env=self._environment() | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def _environment(self) -> dict[str, str]:
        """Without the variables of a SLURM job in which the tests may run."""
        own = {name: value for name, value in os.environ.items() if "SLURM" not in name}
        return own | {"PATH": _PATH, "SLURM_CONF": f"{self._root}/slurm.conf"}

    def _write_files(self) -> None:
        root = self._root
        (root / "state").mkdir()
        for name in self._names:
            (root / "spool" / name).mkdir(parents=True)
        (root / "munge.key").write_bytes(os.urandom(128))
        (root / "munge.key").chmod(0o400)
        hosts = {"127.0.0.1": "localhost", "10.77.0.254": "controller"}
        hosts |= {f"10.77.0.{number}": name for number, name in enumerate(self._names, 1)}
        (root / "hosts").write_text("".join(f"{ip} {name}\n" for ip, name in hosts.items()))
        lines = [_SLURM_CONF.format(root=root)]
        gres = ""
        if self._gpus:
            # SLURM wants character devices, and hands them out by number.
            devices = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random"][: self._gpus]
            (root / "gres.conf").write_text("".join(f"Name=gpu File={d}\n" for d in devices))
            lines += ["GresTypes=gpu\n"]
            gres = f"Gres=gpu:{self._gpus}"
        for name in self._names:
            lines += [f"NodeName={name} NodeAddr={name} CPUs={self._cpus} {gres}\n"]
        lines += ["PartitionName=all Nodes=ALL Default=YES\n"]
        (root / "slurm.conf").write_text("".join(lines))

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%t").stdout.split()
            if states == ["idle"] * len(self._names):
                return
            time.sleep(0.1)
        raise RuntimeError(f"no SLURM after 20 seconds\n{self.logs()}")

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        texts = {path.name: path.read_text(errors="replace") for path in self._root.glob("*.log")}
        return "\n".join(f"--- {name}\n{text[-3000:]}" for name, text in sorted(texts.items()))
