"""Connections between ranks, beside those of the gradients: every rank has one to rank 0.

A connection closes at the moment in which a process dies. It carries one JSON value a line:
heartbeats and failures to rank 0; from it, that all ranks have joined, and the cause of the end;
and goodbyes.
"""

import json
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from ganscale.supervision.failure_attribution import Failure, FailureCause, RankStatus
from ganscale.supervision.progress import ProgressMark


class RankLink:
    """A connection to another rank, and what that rank has said."""

    def __init__(self, connection: socket.socket, rank: int, host: str) -> None:
        self.connection = connection
        now = time.monotonic()
        self.status = RankStatus(rank, host, now, now)
        self.is_joined = False  # rank 0 has reported that all ranks joined
        self.cause: FailureCause | None = None  # why the run ends, as judged by rank 0
        self._is_open = True
        self._received = b""
        self._unsent = b""
        self._sending = threading.Lock()
        connection.settimeout(0.0)

    def send(self, **message: Any) -> None:
        """From any thread. Never blocks: what the socket does not accept now is sent with the next
        message."""
        with self._sending:
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
        elif "joined" in message:
            self.is_joined = True
        elif "goodbye" in message:
            status.has_left = True
