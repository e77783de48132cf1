"""The ranks of a run find each other and connect, before they form a process group.

From then on the watchdog notices a rank that dies or hangs, even while torch starts up. Left to
torch, a rank that never comes costs a long timeout and a traceback that does not name it.
"""

import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NoReturn

from ganscale.data.thread_pool import DaemonThreadPool
from ganscale.errors import EXIT_RANK_LOST, EXIT_REQUEUE, EXIT_USER_ERROR
from ganscale.supervision.failure_attribution import FailureCause
from ganscale.supervision.placement import Placement
from ganscale.supervision.rank_links import RankLink
from ganscale.supervision.signals import PARENT_PID, StopRequest

_CONNECT_SECONDS = 60.0
_HELLO_SECONDS = 2.0
_CHECK_SECONDS = 0.25
_SHOWN_RANKS = 4
_LISTENER, _PROBLEM = "ganscale/listener", "ganscale/problem"  # keys of the store


class JoinError(Exception):
    """The ranks cannot start together. links: to ranks that have to be sent the cause"""

    def __init__(self, cause: FailureCause, links: Sequence[RankLink] = ()) -> None:
        super().__init__(cause.message)
        self.cause, self.links = cause, links


def join_ranks(placement: Placement, limit_seconds: float, stop: StopRequest) -> list[RankLink]:
    """Rank 0's links to all others in the order of their ranks, or another rank's only link, to
    rank 0. On every rank.

    limit_seconds: how long each rank waits for the others
    Raises JoinError on every rank that is there, if one is not.
    """
    if placement.world_size == 1:
        return []
    if placement.is_main:
        return _Gathering(placement, stop).gather(limit_seconds)
    return [_connect_to_main(placement, limit_seconds, stop)]


class _Gathering:
    """Rank 0 waits for the others."""

    def __init__(self, placement: Placement, stop: StopRequest) -> None:
        self._placement, self._stop = placement, stop
        self._links: dict[int, RankLink] = {}
        self._token = secrets.token_hex(16)

    def gather(self, limit_seconds: float) -> list[RankLink]:
        placement, deadline = self._placement, time.monotonic() + limit_seconds
        try:
            store = placement.open_store(limit_seconds)
        except ConnectionError as error:  # such as a port that another program uses for now
            self._fail(EXIT_REQUEUE, f"{placement.name_of(0)} cannot start: {error}")
        with _listen(placement.world_size) as listener, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            port = listener.getsockname()[1]
            store.set(_LISTENER, json.dumps([port, self._token, placement.host]))
            while len(self._links) < placement.world_size - 1:
                for key, _ in selector.select(_CHECK_SECONDS):
                    if key.data is not None:
                        self._check_alive(key.data)
                    elif (link := self._accept(listener)) is not None:
                        selector.register(link.connection, selectors.EVENT_READ, link)
                if store.check([_PROBLEM]):
                    self._fail(EXIT_USER_ERROR, store.get(_PROBLEM).decode())
                if _is_stopped(self._stop):
                    self._fail(EXIT_REQUEUE, f"stopped before {self._missing_names()} joined")
                if time.monotonic() > deadline:
                    self._fail_for_missing(limit_seconds)
        links = [link for _, link in sorted(self._links.items())]
        for link in links:
            link.send(joined=True)
        return links

    def _accept(self, listener: socket.socket) -> RankLink | None:
        """The link to a rank that says hello; None for a stranger."""
        connection, _ = listener.accept()
        with suppress(OSError, ValueError, KeyError, TypeError):
            hello = json.loads(_first_line(connection))
            if secrets.compare_digest(hello["token"], self._token):
                link = RankLink(connection, int(hello["rank"]), str(hello["host"]))
                self._check_place(link, hello["world_size"], hello["run"])
                self._links[link.status.rank] = link
                return link
        connection.close()
        return None

    def _check_place(self, link: RankLink, world_size: int, run: str) -> None:
        name, rank, expected = link.status.name, link.status.rank, self._placement.world_size
        if world_size != expected:
            message = f"{name} expects {world_size} ranks, but rank 0 expects {expected}"
            hint = "start every machine with the same number of processes"
            self._fail(EXIT_USER_ERROR, f"{message}: {hint}", newcomer=link)
        if run != self._placement.run:
            message = f"{name} trains {run}, but rank 0 trains {self._placement.run}"
            hint = "start all ranks with the same settings, and each job with its own MASTER_PORT"
            self._fail(EXIT_USER_ERROR, f"{message}: {hint}", newcomer=link)
        if rank in self._links:
            twin = self._links[rank].status.host
            message = f"two processes are rank {rank}, on {twin} and on {link.status.host}"
            hint = "give each machine its own --machine_rank, and each process its own RANK"
            self._fail(EXIT_USER_ERROR, f"{message}: {hint}", newcomer=link)

    def _check_alive(self, link: RankLink) -> None:
        if not link.receive():
            lost = f"{link.status.name} was lost: the process died while the ranks were joining"
            self._fail(EXIT_RANK_LOST, lost)

    def _fail_for_missing(self, limit_seconds: float) -> NoReturn:
        here, total = len(self._links) + 1, self._placement.world_size
        message = (
            f"{self._missing_names()} did not join within {limit_seconds:.0f} s ({here} of {total} "
            f"ranks did): a process did not start, or cannot reach {self._placement.address}"
        )
        self._fail(EXIT_RANK_LOST, message, host=self._placement.host_of(self._missing()[0]))

    def _missing(self) -> list[int]:
        return [rank for rank in range(1, self._placement.world_size) if rank not in self._links]

    def _missing_names(self) -> str:
        missing = self._missing()
        names = [self._placement.name_of(rank) for rank in missing[:_SHOWN_RANKS]]
        more = len(missing) - len(names)
        return ", ".join(names) + (f" and {more} more" if more else "")

    def _fail(
        self, exit_code: int, message: str, host: str = "", newcomer: RankLink | None = None
    ) -> NoReturn:
        links = [*self._links.values(), *([newcomer] if newcomer else [])]
        raise JoinError(FailureCause(exit_code, message, suspect_host=host), links)


def _connect_to_main(placement: Placement, limit_seconds: float, stop: StopRequest) -> RankLink:
    deadline = time.monotonic() + limit_seconds

    def wait_until(condition: Callable[[], bool]) -> None:
        while not condition():
            if _is_stopped(stop):
                raise JoinError(FailureCause(EXIT_REQUEUE, "stopped before rank 0 joined"))
            if time.monotonic() > deadline:
                raise ConnectionError(f"it does not answer at {placement.address}")
            time.sleep(_CHECK_SECONDS)

    try:
        wait_until(placement.is_store_open)
        opened = DaemonThreadPool(1, "store").submit(partial(placement.open_store, limit_seconds))
        wait_until(opened.done)  # never, if another program answers
        store = opened.result()
        wait_until(lambda: store.check([_LISTENER]))  # a launcher's store comes before rank 0
    except ConnectionError as error:
        message = f"rank 0 did not join within {limit_seconds:.0f} s: {error}"
        raise JoinError(FailureCause(EXIT_RANK_LOST, message)) from None
    port, token, main_host = json.loads(store.get(_LISTENER))
    hello = {"token": token, "rank": placement.rank, "host": placement.host}
    hello |= {"world_size": placement.world_size, "run": placement.run}
    try:
        connection = socket.create_connection((placement.main_host, port), _CONNECT_SECONDS)
        connection.sendall(json.dumps(hello).encode() + b"\n")
    except OSError as error:
        name = placement.name_of(placement.rank)
        problem = f"{name} cannot connect to rank 0 ({error}): open the ports between the machines"
        store.set(_PROBLEM, problem)
        raise JoinError(FailureCause(EXIT_USER_ERROR, problem)) from None
    link = RankLink(connection, 0, main_host)
    _wait_for_others(link, deadline=time.monotonic() + limit_seconds + _CONNECT_SECONDS)
    return link


def _wait_for_others(link: RankLink, deadline: float) -> None:
    """Until rank 0 reports that all have joined, or why they cannot."""
    with selectors.DefaultSelector() as selector:
        selector.register(link.connection, selectors.EVENT_READ)
        while not link.is_joined:
            selector.select(_CHECK_SECONDS)
            is_open = link.receive()
            if link.cause is not None:
                raise JoinError(link.cause, [link])
            if not is_open or time.monotonic() > deadline:
                what = "no longer answers" if is_open else "the process died"
                lost = f"{link.status.name} was lost while the ranks were joining: {what}"
                raise JoinError(FailureCause(EXIT_RANK_LOST, lost), [link])


def _is_stopped(stop: StopRequest) -> bool:
    """Also once the launcher has died and left this rank behind."""
    return stop.is_requested() or os.getppid() != PARENT_PID


def _listen(backlog: int) -> socket.socket:
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=is_dual)


def _first_line(connection: socket.socket) -> bytes:
    """Within `_HELLO_SECONDS`, however slowly it arrives."""
    deadline, line = time.monotonic() + _HELLO_SECONDS, b""
    while not line.endswith(b"\n") and len(line) < 1000:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        if not (data := connection.recv(1000)):
            break
        line += data
    return line
