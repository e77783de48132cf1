"""A rank that dies, fails or hangs is noticed, named, and ends the others.

Left alone, the others would wait in a collective for minutes, or for ever, and then fail with the
communication library's words. So every rank keeps a connection to rank 0, beside the gradients'. It
closes at the moment in which a process dies, and carries a sign of life and the rank's progress.
Rank 0 judges and tells the others why they end; each judges rank 0 by itself.
"""

import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any

from ganscale import runtime as runtime_module
from ganscale.errors import EXIT_FAILED, EXIT_RANK_LOST, GanscaleError, UserError
from ganscale.run_folder import RunFolder
from ganscale.runtime import Runtime, is_communication_error, is_device_error
from ganscale.supervision.failure_attribution import (
    Failure,
    FailureCause,
    Member,
    ProgressMark,
    attribute_failure,
)
from ganscale.supervision.job_history import note_ended
from ganscale.supervision.signals import PARENT, StopRequest
from ganscale.tracking.console import append_line

_JOIN_SECONDS = 60.0
_BEAT_SECONDS = 5.0
_LOOK_SECONDS = 0.25
_LEAVE_SECONDS = 3.0
_LAST_ACT_SECONDS = 15.0  # in all less than a batch script waits for the last rank
_HELLO_SECONDS = 2.0
_WAITING_PLACES = ("/torch/distributed/", "/torch/autograd/")
_STDOUT, _STDERR = 1, 2  # as C knows them
_WITH_A_SENTENCE = (GanscaleError, OSError)


class Progress:
    """What this rank is at: told by its main thread, read by the watchdog."""

    def __init__(self) -> None:
        self.current = ProgressMark()
        self.run_folder: RunFolder | None = None
        self.last_act: Callable[[], None] = lambda: None
        """What this rank should still be given some seconds for when another one is lost."""

    def mark(self, where: str, patience_seconds: float = 0.0) -> None:
        """Begins another part of the work, which may take so much longer than the limit."""
        self.current = ProgressMark(self.current.count + 1, where, patience_seconds)


class Watchdog:
    """One rank's view of the others, from its construction to `close`."""

    def __init__(
        self, runtime: Runtime, progress: Progress, limit_seconds: float, stop: StopRequest
    ) -> None:
        """Connects the ranks and begins to watch. On every rank.

        limit_seconds: without progress on any rank, until the run is given up
        stop: is asked for when this rank's launcher dies and leaves it behind

        Raises UserError where a rank cannot be reached.
        """
        self._runtime = runtime
        self._progress = progress
        self._stop = stop
        self._limit = limit_seconds
        # A process answers beside whatever its main thread does, unless it is stopped.
        self._silence = min(limit_seconds, max(30.0, limit_seconds / 10))
        # What rank 0 takes stays at 200 beats a second, however many ranks there are.
        beat_every = min(max(1.0, runtime.world_size / 200), _BEAT_SECONDS)
        self._beat_every = min(beat_every, self._silence / 10)
        self._is_closing = threading.Event()
        self._is_leaving = threading.Lock()
        now = time.monotonic()
        self._self = Member(_name_of(runtime.rank), now, now)
        self._links = _connected(runtime) if runtime.world_size > 1 else []
        self._thread = threading.Thread(target=self._watch_on, name="watchdog", daemon=True)
        self._thread.start()

    def failed(self, error: BaseException) -> None:
        """Leaves with the other ranks for an error of this one; a single rank stops watching."""
        if not self._links:
            self.close()
            return
        is_echo = is_communication_error(error)
        if not is_echo and not isinstance(error, _WITH_A_SENTENCE):
            traceback.print_exception(error)
        failure = Failure(exit_code_of(error), sentence_of(error), is_echo)
        self._self.failure, self._self.failed_at = failure, time.monotonic()
        if self._runtime.rank > 0:
            self._links[0].send({"failed": [failure.exit_code, failure.sentence, is_echo]})
        # The thread ends this process; should it not, the error goes its own way.
        time.sleep(self._silence + _LAST_ACT_SECONDS + 4 * _LEAVE_SECONDS)

    def close(self) -> None:
        """Stops watching; all ranks have to be past the last thing they do together."""
        self._is_closing.set()
        self._thread.join(_LEAVE_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        for link in self._links:
            link.send({"bye": True})

    def _watch_on(self) -> None:
        try:
            self._watch()
        except Exception as error:  # of our own: a rank without a watchdog would be taken for dead
            traceback.print_exception(error)
            self._leave(
                FailureCause(EXIT_RANK_LOST, f"the watchdog of {self._self.name} failed: {error}")
            )

    def _watch(self) -> None:
        members = [link.member for link in self._links]
        if self._runtime.is_main:
            members = [self._self, *members]
        limit = self._limit if self._runtime.is_main else inf
        selector = selectors.DefaultSelector()
        for link in self._links:
            selector.register(link.connection, selectors.EVENT_READ, link)
        looked_at, judges_at, beats_at = time.monotonic(), 0.0, 0.0
        for member in members:  # the first have waited for the last to connect
            member.heard_at = member.moved_at = looked_at
        while not self._is_closing.is_set():
            for key, _ in selector.select(_LOOK_SECONDS) if self._links else ():
                if not key.data.receive():
                    selector.unregister(key.fileobj)
            if not self._links:
                self._is_closing.wait(_LOOK_SECONDS)
            now = time.monotonic()
            if now - looked_at > self._silence / 2:  # we were suspended, and so were others
                for member in members:
                    member.heard_at = member.moved_at = now
            looked_at = now
            self._self.heard_at = now
            if self._self.mark is not self._progress.current:
                self._self.mark, self._self.moved_at = self._progress.current, now
            if now >= beats_at:
                beats_at = now + self._beat_every
                self._beat()
            if told := next((link.verdict for link in self._links if link.verdict), None):
                self._leave(told)
            if now < judges_at:  # a thousand ranks send hundreds of beats a second
                continue
            judges_at = now + _LOOK_SECONDS
            if verdict := attribute_failure(members, now, limit, self._silence):
                for link in self._links:
                    link.send({"end": [verdict.exit_code, verdict.sentence, verdict.is_hang]})
                self._leave(verdict)

    def _beat(self) -> None:
        mark = self._progress.current
        self._self.is_waiting = _is_main_thread_waiting()
        beat = [mark.count, mark.where, mark.patience_seconds]
        for link in self._links:
            link.send({"beat": beat, "is_waiting": self._self.is_waiting})
        if self._runtime.world_size > 1 and os.getppid() != PARENT:
            self._stop.request()
        # Should a thread hold the interpreter for ever, C at least says where.
        faulthandler.dump_traceback_later(1.5 * self._limit + mark.patience_seconds, file=_STDERR)

    def _leave(self, verdict: FailureCause) -> None:
        """Ends this process; what it still writes may hang, too, and then is left."""
        if self._is_closing.is_set() or not self._is_leaving.acquire(blocking=False):
            return
        writer = threading.Thread(target=self._say, args=[verdict], daemon=True)
        writer.start()
        writer.join(_LAST_ACT_SECONDS + 3 * _LEAVE_SECONDS)
        os._exit(verdict.exit_code)

    def _say(self, verdict: FailureCause) -> None:
        if not verdict.is_hang:  # a checkpoint that is being written is worth a moment
            last_act = threading.Thread(target=self._progress.last_act, daemon=True)
            last_act.start()
            last_act.join(_LAST_ACT_SECONDS)
        if verdict.is_hang:
            stacks = threading.Thread(target=self._write_stacks, daemon=True)
            stacks.start()
            stacks.join(_LEAVE_SECONDS)  # the disk may be what hangs
        if self._speaks():
            deadline = time.monotonic() + _LEAVE_SECONDS
            while time.monotonic() < deadline and any(link.receive() for link in self._links):
                time.sleep(0.02)  # the last word is ours
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if self._speaks():
            os.write(_STDERR, f"error: {verdict.sentence}\n".encode())
        # The main thread fails, too, now that others have left, and would go on to say so.
        nothing = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (_STDOUT, _STDERR):
            os.dup2(nothing, descriptor)
        if self._speaks():
            note_ended(verdict.exit_code, verdict.sentence)
            if folder := self._progress.run_folder:
                append_line(folder.log, f"ERROR: {verdict.sentence}")

    def _speaks(self) -> bool:
        """On rank 0; where that one is lost, on rank 1 and on a rank of every other machine."""
        if self._runtime.is_main:
            return True
        is_chosen = self._runtime.rank == 1 or os.environ.get("LOCAL_RANK") == "0"
        return is_chosen and self._links[0].verdict is None

    def _write_stacks(self) -> None:
        if self._progress.run_folder is None:
            faulthandler.dump_traceback(file=_STDERR)
            return
        path = self._progress.run_folder.stack(self._runtime.rank)
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            faulthandler.dump_traceback(file)


class _Link:
    """A connection to another rank: one JSON value a line."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.connection = connection
        now = time.monotonic()
        self.member = Member(name, now, now)
        self.verdict: FailureCause | None = None  # what rank 0 says
        self.is_open = True
        self._received = b""
        self._unsent = b""
        connection.settimeout(0.0)

    def send(self, message: dict[str, Any]) -> None:
        """Never waits: what the other side does not take now goes with the next message."""
        self._unsent += json.dumps(message).encode() + b"\n"
        with suppress(OSError):
            self._unsent = self._unsent[self.connection.send(self._unsent) :]

    def receive(self) -> bool:
        """Takes what has come; False once there will be no more."""
        if not self.is_open:
            return False
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        now = time.monotonic()
        if not data:
            self.is_open = False
            if not self.member.has_left:
                self.member.gone_at = now
            return False
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line), now)
        return True

    def _take(self, message: dict[str, Any], now: float) -> None:
        member = self.member
        member.heard_at = now
        if "beat" in message:
            mark, member.is_waiting = ProgressMark(*message["beat"]), message["is_waiting"]
            if mark != member.mark:
                member.mark, member.moved_at = mark, now
        elif "failed" in message:
            member.failure, member.failed_at = Failure(*message["failed"]), now
        elif "end" in message:
            self.verdict, member.has_left = FailureCause(*message["end"]), True
        elif "bye" in message:
            member.has_left = True


def _connected(runtime: Runtime) -> list[_Link]:
    """Rank 0's connections to all others, or another rank's to rank 0."""
    listeners: list[socket.socket] = []

    def listen() -> tuple[int, str, str]:
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        listener = socket.create_server(
            ("", 0), family=family, backlog=runtime.world_size, dualstack_ipv6=is_dual
        )
        listeners.append(listener)
        return listener.getsockname()[1], secrets.token_hex(16), _name_of(0)

    port, token, name_of_main = runtime.run_on_main(listen)
    links, problem = [], None
    try:
        if runtime.is_main:
            with listeners[0]:
                links = _accepted(listeners[0], token, runtime.world_size - 1)
        else:
            # Where the launcher says that rank 0 is.
            address = (os.environ.get("MASTER_ADDR", "localhost"), port)
            connection = socket.create_connection(address, timeout=_JOIN_SECONDS)
            hello = {"token": token, "name": _name_of(runtime.rank)}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            links = [_Link(connection, name_of_main)]
    except OSError as error:
        problem = f"rank {runtime.rank}: the ranks cannot connect to each other ({error})"
    problems = [each for each in runtime.all_gather_object(problem) if each is not None]
    if problems:
        raise UserError(f"{problems[0]}: machines of a run need open ports between them")
    return links


def _accepted(listener: socket.socket, token: str, count: int) -> list[_Link]:
    links: list[_Link] = []
    deadline = time.monotonic() + _JOIN_SECONDS
    while len(links) < count:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        connection, _ = listener.accept()
        with suppress(OSError, ValueError, KeyError, TypeError):  # a stranger's
            hello = json.loads(_first_line(connection))
            if secrets.compare_digest(hello["token"], token):
                links.append(_Link(connection, hello["name"]))
    return links


def _first_line(connection: socket.socket) -> bytes:
    """In `_HELLO_SECONDS` at most, however slowly it comes."""
    deadline, line = time.monotonic() + _HELLO_SECONDS, b""
    while not line.endswith(b"\n") and len(line) < 1000:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        if not (part := connection.recv(1000)):
            break
        line += part
    return line


def exit_code_of(error: BaseException) -> int:
    """Of a rank that `error` ends: a network or a GPU that fails is no mistake of the run's."""
    if is_communication_error(error) or is_device_error(error):
        return EXIT_RANK_LOST
    return error.exit_code if isinstance(error, GanscaleError) else EXIT_FAILED


def sentence_of(error: BaseException) -> str:
    """On one line; the kind of error is named where the message is not written for the user."""
    kind = "" if isinstance(error, _WITH_A_SENTENCE) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def _is_main_thread_waiting() -> bool:
    """Whether the main thread is, within torch, where other ranks are waited for."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == runtime_module.__file__ or any(part in file for part in _WAITING_PLACES):
            return True
        if "/torch/" not in file:
            return False
        frame = frame.f_back
    return False


def _name_of(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}"
