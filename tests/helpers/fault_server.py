"""A web server on loopback that serves bytes and fails on command, or stands before another one."""

import contextlib
import hashlib
import http.client
import re
import threading
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """What happens to one GET.

    status: answered in place of the object
    cut_after, stall_after: bytes of the body after which the connection is closed, or silent
    seconds_a_piece: between pieces of 4 KiB
    """

    status: int = 0
    cut_after: int | None = None
    stall_after: int | None = None
    seconds_a_piece: float = 0.0


class FaultServer(ThreadingHTTPServer):
    """Attributes: `objects`, what is served by path; `faults`, by path, one for each GET to come;
    `gets` and `heads`, counts by path; `ranges`, the first byte of each GET by path; `bytes_sent`.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, upstream: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.objects: dict[str, bytes] = {}
        self.faults: defaultdict[str, deque[Fault]] = defaultdict(deque)
        self.gets: Counter[str] = Counter()
        self.heads: Counter[str] = Counter()
        self.ranges: defaultdict[str, list[int]] = defaultdict(list)
        self.bytes_sent: Counter[str] = Counter()
        self.has_ranges = self.has_length = self.has_identity = True
        self.counting = threading.Lock()
        self.is_over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def serve(self, folder: Path, prefix: str = "") -> None:
        """Serves the files of `folder` as they are now, under `prefix`."""
        for path in folder.iterdir():
            if path.is_file():
                self.objects[f"{prefix}/{path.name}"] = path.read_bytes()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that went away, as those that are killed do

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.is_over.set()
            self.shutdown()
            self.server_close()
            thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        with self.server.counting:
            self.server.heads[self._path()] += 1
        self._serve(Fault(), has_body=False)

    def do_GET(self) -> None:
        server, path = self.server, self._path()
        with server.counting:
            server.gets[path] += 1
            fault = server.faults[path].popleft() if server.faults[path] else Fault()
            server.ranges[path].append(self._first_byte())
        self._serve(fault, has_body=True)

    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _first_byte(self) -> int:
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match else 0

    def _serve(self, fault: Fault, *, has_body: bool) -> None:
        if fault.status:
            return self._answer(fault.status, {"Content-Length": "0"}, b"", fault)
        if self.server.upstream:
            return self._forward(fault, has_body=has_body)
        content = self.server.objects.get(self._path())
        if content is None:
            return self._answer(404, {"Content-Length": "0"}, b"", fault)
        headers, status, first = {}, 200, self._first_byte()
        if self.server.has_identity:
            headers["ETag"] = f'"{hashlib.md5(content).hexdigest()}"'
        if first and self.server.has_ranges:
            if first >= len(content):
                return self._answer(416, {"Content-Length": "0"}, b"", fault)
            status = 206
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content = content[first:]
        if self.server.has_length:
            headers["Content-Length"] = str(len(content))
        self._answer(status, headers, content if has_body else b"", fault)

    def _forward(self, fault: Fault, *, has_body: bool) -> None:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=300)
        with contextlib.closing(upstream):
            upstream.request(self.command, self.path, headers=dict(self.headers.items()))
            answer = upstream.getresponse()
            body = answer.read()
            headers = dict(answer.getheaders())
            for each in ("Connection", "Transfer-Encoding", "Server", "Date"):
                headers.pop(each, None)
            if has_body:
                headers["Content-Length"] = str(len(body))
            self._answer(answer.status, headers, body, fault)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: Fault) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        for first in range(0, len(body), 4096):
            piece = body[first : first + 4096]
            for limit, fails in ((fault.cut_after, self._cut), (fault.stall_after, self._stall)):
                if limit is not None and first + len(piece) > limit:
                    self._send(piece[: limit - first])
                    return fails()
            self._send(piece)
            if fault.seconds_a_piece:
                time.sleep(fault.seconds_a_piece)

    def _send(self, piece: bytes) -> None:
        self.wfile.write(piece)
        self.wfile.flush()
        with self.server.counting:
            self.server.bytes_sent[self._path()] += len(piece)

    def _cut(self) -> None:
        self.close_connection = True

    def _stall(self) -> None:
        self.close_connection = True
        self.server.is_over.wait(60)
