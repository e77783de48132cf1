"""A W&B server on loopback that keeps what real clients upload.

It speaks as much of the protocol as starting, resuming and ending a run takes: GraphQL at
`/graphql`, rows at `/files/ENTITY/PROJECT/RUN/file_stream`, and files by PUT. Anything else gets an
error, which the client survives.
"""

import gzip
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "tester"


@dataclass
class StoredRun:
    """What the server knows of one run; `history` holds its rows in order."""

    name: str
    project: str
    display_name: str = ""
    config: str = "{}"
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None


class WandbServer:
    """Serves from its construction until `stop`."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.lock = threading.Lock()
        self.is_dead = False
        self._http = _HttpServer(("127.0.0.1", 0), _Handler)
        self._http.wandb_server = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}).start()

    def stop(self) -> None:
        """Dies like a server that lost its power: open connections get no answer any more."""
        if not self.is_dead:
            self.is_dead = True
            self._http.shutdown()
            self._http.server_close()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The data for one GraphQL operation, None for one that is unknown here."""
        operation = query.split("(")[0].split("{")[0].split()[-1]
        match operation:
            case "Viewer":
                return {"viewer": {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}"}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "RunStoppedStatus":
                return {"project": {"run": {"stopped": False}}}
            case "RunResumeStatus":
                run = self.runs.get(variables["name"])
                owner = {"id": "e", "name": ENTITY}
                bucket = run and _resumable(run)
                model = {"id": "p", "name": variables["project"], "entity": owner, "bucket": bucket}
                return {"model": model}
            case "UpsertBucket":
                is_new = variables["name"] not in self.runs
                run = self.runs.setdefault(
                    variables["name"], StoredRun(variables["name"], variables["project"])
                )
                run.config = variables.get("config") or run.config
                run.display_name = variables.get("displayName") or run.display_name
                return {"upsertBucket": {"bucket": _bucket(run), "inserted": is_new}}
            case "CreateRunFiles":
                run_name = variables["run"]
                files = [
                    {"name": name, "uploadUrl": f"{self.url}/upload/{run_name}/{name}"}
                    for name in variables["files"]
                ]
                reply = {"runID": run_name, "uploadHeaders": [], "files": files}
                return {"createRunFiles": reply}
        return None

    def receive_stream(self, run_name: str, message: dict[str, Any]) -> None:
        """Stores the rows of one file_stream message at the offsets that the client gives."""
        run = self.runs[run_name]
        for name, part in (message.get("files") or {}).items():
            rows = [
                json.loads(line) for line in part["content"] if name.endswith(("jsonl", "json"))
            ]
            if name == "wandb-history.jsonl":
                run.history[part["offset"] : part["offset"] + len(rows)] = rows
            elif name == "wandb-summary.json":
                run.summary = rows[-1]
        if message.get("complete"):
            run.exit_code = message["exitcode"]


def _bucket(run: StoredRun) -> dict[str, Any]:
    return {
        "id": run.name,
        "name": run.name,
        "displayName": run.display_name,
        "config": run.config,
        "historyLineCount": len(run.history),
        "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}},
    }


def _resumable(run: StoredRun) -> dict[str, Any]:
    tail = [json.dumps(row) for row in run.history[-1:]]
    return {
        **_bucket(run),
        "summaryMetrics": json.dumps(run.summary),
        "logLineCount": 0,
        "eventsLineCount": 0,
        "historyTail": json.dumps(tail),
        "eventsTail": "[]",
        "tags": [],
        "wandbConfig": '{"t": 1}',
    }


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    wandb_server: WandbServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stays quiet: clients that are killed break their connections, as the tests want."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HttpServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def _handle(self) -> None:
        body = self._body()
        server = self.server.wandb_server
        with server.lock:
            if server.is_dead:
                self.close_connection = True
                return
            self._reply(*self._answer(server, body))

    do_GET = do_POST = do_PUT = _handle

    def _answer(self, server: WandbServer, body: bytes) -> tuple[int, dict[str, Any]]:
        parts = self.path.strip("/").split("/")
        if parts[0] == "graphql":
            request = json.loads(body)
            data = server.answer(request["query"], request.get("variables") or {})
            errors = {"errors": [{"message": "unknown operation"}]} if data is None else {}
            return 200, {"data": data, **errors}
        if parts[-1] == "file_stream":
            server.receive_stream(parts[3], json.loads(body))
            return 200, {"exitcode": None, "limits": {}}
        if self.command == "PUT" and parts[0] == "upload":
            server.runs[parts[1]].files["/".join(parts[2:])] = body
            return 200, {}
        return 404, {}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(chunks)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps requests out of the tests' output."""
