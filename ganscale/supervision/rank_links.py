"""Connections between ranks, beside those of the gradients: every rank has one to rank 0.

A connection closes at the moment in which a process dies. It carries one JSON value a line:
heartbeats and failures to rank 0, the cause of the end from it, and goodbyes.
"""

import json
import os
import secrets
import socket
import time
from contextlib import suppress
from typing import Any

from ganscale.errors import UserError
from ganscale.runtime import Runtime
from ganscale.supervision.failure_attribution import Failure, FailureCause, RankStatus
from ganscale.supervision.progress import ProgressMark

_CONNECT_SECONDS = 60.0
_HELLO_SECONDS = 2.0


def rank_name(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}"


class RankLink:
    """A connection to another rank, and what that rank has said."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.connection = connection
        now = time.monotonic()
        self.status = RankStatus(name, now, now)
        self.cause: FailureCause | None = None  # of the run's end, as rank 0 has judged
        self._is_open = True
        self._received = b""
        self._unsent = b""
        connection.settimeout(0.0)

    def send(self, **message: Any) -> None:
        """Never blocks: what the socket does not accept now is sent with the next message."""
        self._unsent += json.dumps(message).encode() + b"\n"
        with suppress(OSError):
            self._unsent = self._unsent[self.connection.send(self._unsent) :]

    def receive(self) -> bool:
        """Takes what has arrived; False once nothing more can."""
        if not self._is_open:
            return False
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        now = time.monotonic()
        if not data:
            self._is_open = False
            if not self.status.has_left:
                self.status.disconnected_at = now
            return False
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line), now)
        return True

    def _take(self, message: dict[str, Any], now: float) -> None:
        status = self.status
        status.heard_at = now
        if "heartbeat" in message:
            mark, status.is_waiting = ProgressMark(*message["heartbeat"]), message["is_waiting"]
            if mark != status.mark:
                status.mark, status.progressed_at = mark, now
        elif "failure" in message:
            status.failure, status.failed_at = Failure(*message["failure"]), now
        elif "cause" in message:
            self.cause, status.has_left = FailureCause(*message["cause"]), True
        elif "goodbye" in message:
            status.has_left = True


def connect_ranks(runtime: Runtime) -> list[RankLink]:
    """Rank 0's links to all others, or another rank's only link, to rank 0. On every rank. Raises
    UserError if a rank cannot be reached."""
    if runtime.world_size == 1:
        return []
    listeners: list[socket.socket] = []

    def listen() -> tuple[int, str, str]:
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        listener = socket.create_server(
            ("", 0), family=family, backlog=runtime.world_size, dualstack_ipv6=is_dual
        )
        listeners.append(listener)
        return listener.getsockname()[1], secrets.token_hex(16), rank_name(0)

    port, token, main_name = runtime.run_on_main(listen)
    links, problem = [], None
    try:
        if runtime.is_main:
            with listeners[0]:
                links = _accept(listeners[0], token, runtime.world_size - 1)
        else:
            address = (os.environ.get("MASTER_ADDR", "localhost"), port)  # of rank 0
            connection = socket.create_connection(address, timeout=_CONNECT_SECONDS)
            hello = {"token": token, "name": rank_name(runtime.rank)}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            links = [RankLink(connection, main_name)]
    except OSError as error:
        problem = f"rank {runtime.rank}: the ranks cannot connect to each other ({error})"
    problems = [problem for problem in runtime.all_gather_object(problem) if problem is not None]
    if problems:
        raise UserError(f"{problems[0]}: open the ports between the machines of a run")
    return links


def _accept(listener: socket.socket, token: str, count: int) -> list[RankLink]:
    links: list[RankLink] = []
    deadline = time.monotonic() + _CONNECT_SECONDS
    while len(links) < count:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        connection, _ = listener.accept()
        with suppress(OSError, ValueError, KeyError, TypeError):  # from a stranger
            hello = json.loads(_first_line(connection))
            if secrets.compare_digest(hello["token"], token):
                links.append(RankLink(connection, hello["name"]))
    return links


def _first_line(connection: socket.socket) -> bytes:
    """Within `_HELLO_SECONDS`, however slowly it arrives."""
    deadline, line = time.monotonic() + _HELLO_SECONDS, b""
    while not line.endswith(b"\n") and len(line) < 1000:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        if not (data := connection.recv(1000)):
            break
        line += data
    return line
