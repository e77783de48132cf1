"""What the launcher has told this process: its rank, and where to find rank 0."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ganscale.errors import UserError
from ganscale.runtime import launcher_number

_LAST_PORT = 65_535


@dataclass
class Placement:
    """The rank that the launcher gave this process, and where rank 0 can be found."""

    rank: int
    world_size: int
    local_world_size: int
    main_host: str
    main_port: int
    hosts: list[str]  # of all ranks, machine by machine; empty if only the launcher knows them
    run: str = ""  # what this process trains; the same on all ranks that belong together
    _store: Any = None

    @classmethod
    def from_environment(cls) -> "Placement":
        """Raises UserError for what the launcher has left out, and for numbers that cannot be."""
        world_size = launcher_number("WORLD_SIZE", 1)
        names = ("RANK", "MASTER_ADDR", "MASTER_PORT") if world_size > 1 else ()
        if missing := [name for name in names if not os.environ.get(name)]:
            raise UserError(
                f"WORLD_SIZE is {world_size}, but {' and '.join(missing)} is not set: start the "
                "ranks with `accelerate launch`, torchrun or the scripts in slurm/"
            )
        rank, port = launcher_number("RANK", 0), launcher_number("MASTER_PORT", 0)
        if rank >= world_size:
            raise UserError(f"RANK is {rank}, but WORLD_SIZE is {world_size}: ranks count from 0")
        if port > _LAST_PORT:
            raise UserError(f"MASTER_PORT is {port}: the last port is {_LAST_PORT}")
        return cls(
            rank,
            world_size,
            launcher_number("LOCAL_WORLD_SIZE", 1),
            os.environ.get("MASTER_ADDR", ""),
            port,
            os.environ.get("GANSCALE_HOSTS", "").split(),
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def host(self) -> str:
        """This machine, by the name that SLURM gives it if SLURM has started this rank."""
        return os.environ.get("SLURMD_NODENAME") or socket.gethostname()

    @property
    def address(self) -> str:
        return f"{self.main_host}:{self.main_port}"

    def host_of(self, rank: int) -> str:
        """The machine of any rank; empty if it is not known."""
        machine = rank // self.local_world_size
        return self.hosts[machine] if machine < len(self.hosts) else ""

    def name_of(self, rank: int) -> str:
        host = self.host if rank == self.rank else self.host_of(rank)
        return f"rank {rank} on {host}" if host else f"rank {rank}"

    def is_store_open(self) -> bool:
        """Whether something listens where `open_store` connects to."""
        try:
            socket.create_connection((self.main_host, self.main_port), timeout=1).close()
        except OSError:
            return False
        return True

    def open_store(self, timeout_seconds: float) -> dist.Store:
        """The keys and values that the launcher or rank 0 keeps for all ranks, before there is a
        process group; rank 0 needs nobody else for it. Raises ConnectionError."""
        is_server = self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:  # torch would print a stack of C++
            socket.getaddrinfo(self.main_host, self.main_port)
        except OSError as error:
            reason = f"{self.main_host} has no address ({error.strerror})"
            raise ConnectionError(f"MASTER_ADDR {reason}") from None
        try:
            # Kept: the process group will use the same server.
            self._store = dist.TCPStore(
                self.main_host,
                self.main_port,
                is_master=is_server,
                timeout=timedelta(seconds=timeout_seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistError as error:
            does = "listen" if is_server else "connect"
            reason = str(error).partition("\n")[0]
            raise ConnectionError(f"it cannot {does} at {self.address}: {reason}") from None
        # A rank of another job that has come here by mistake finds nothing, nor does an attempt
        # find what the last one left in torchrun's store.
        job, attempt = (
            os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "TORCHELASTIC_RESTART_COUNT")
        )
        return dist.PrefixStore(f"{job}/{attempt}", self._store)
