"""A W&B server on loopback that keeps what real clients upload.

It speaks as much of the protocol as starting, resuming and ending a run takes, its artifacts and
alerts, and a sweep with its agent: GraphQL at `/graphql`, rows at
`/files/ENTITY/PROJECT/RUN/file_stream`, and files by PUT. Anything else gets an error, which the
client survives.
"""

import gzip
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import yaml

ENTITY = "tester"


@dataclass
class StoredRun:
    """What the server knows of one run; `history` holds its rows in order, `shown` its group, job
    type, tags and notes, and `inputs` the keys of the artifacts that it has used."""

    name: str
    project: str
    display_name: str = ""
    config: str = "{}"
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    alerts: list[str] = field(default_factory=list)
    is_preempting: bool = False
    shown: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)


@dataclass
class StoredArtifact:
    """A version of an artifact; `files` by the names that its manifest gives them."""

    name: str
    digest: str
    aliases: list[str]
    type: str = "model"
    files: dict[str, bytes] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    state: str = "PENDING"


class WandbServer:
    """Serves from its construction until `stop`; what it has stored outlasts that.

    fault: asked for each request's path; a number is the HTTP status that it gets, "hang" means no
        answer while the fault lasts, None that nothing is wrong
    """

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: dict[str, StoredArtifact] = {}
        self.sweep_config: dict[str, Any] = {}
        self.sweep_runs: list[dict[str, Any]] = []
        self.fault: Callable[[str], int | Literal["hang"] | None] = lambda path: None
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.is_dead = True
        self._port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Serves, also again after `stop`, at the same address."""
        self.is_dead = False
        self._http = _HttpServer(("127.0.0.1", self._port), _Handler)
        self._http.wandb_server = self
        self._port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}).start()

    def stop(self) -> None:
        """Dies like a server that lost its power: open connections get no answer any more."""
        self.fault = lambda path: None  # else requests that hang would hang on
        if not self.is_dead:
            self.is_dead = True
            self._http.shutdown()
            self._http.server_close()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The data for one GraphQL operation, None for one that is unknown here."""
        operation = query.split("(")[0].split("{")[0].split()[-1]
        match operation:
            case "Viewer" | "GetViewer" | "GetDefaultEntity":
                return {"viewer": {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}"}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "RunStoppedStatus":
                return {"project": {"run": {"stopped": False}}}
            case "Run" | "GetRun":
                run = self.runs.get(variables["name"])
                return {"project": {"run": run and _described(run)}}
            case "RunHistoryKeys":
                history = self.runs[variables["name"]].history
                last_step = history[-1]["_step"] if history else -1
                return {"project": {"run": {"historyKeys": {"lastStep": last_step}}}}
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
                run.shown |= {
                    key: variables[key]
                    for key in ("entity", "groupName", "jobType", "tags", "notes")
                    if variables.get(key)
                }
                return {"upsertBucket": {"bucket": _bucket(run), "inserted": is_new}}
            case "CreateRunFiles":
                run_name = variables["run"]
                files = [
                    {"name": name, "uploadUrl": f"{self.url}/upload/{run_name}/{name}"}
                    for name in variables["files"]
                ]
                reply = {"runID": run_name, "uploadHeaders": [], "files": files}
                return {"createRunFiles": reply}
            case "NotifyScriptableRunAlert":
                self.runs[variables["runName"]].alerts.append(variables["title"])
                return {"notifyScriptableRunAlert": {"success": True}}
        return self._answer_about_artifacts(operation, variables) or self._answer_about_sweeps(
            operation, variables
        )

    def _answer_about_artifacts(
        self, operation: str, variables: dict[str, Any]
    ) -> dict[str, Any] | None:
        match operation:
            case "CreateArtifact":
                given = variables["input"]
                aliases = [each["alias"] for each in given.get("aliases") or []]
                for key, known in self.artifacts.items():  # same content, same version
                    if known.digest == given["digest"] and known.state == "COMMITTED":
                        known.aliases = sorted({*known.aliases, *aliases})
                        return {"createArtifact": {"artifact": _created(key, known)}}
                artifact = StoredArtifact(
                    given["artifactCollectionName"],
                    given["digest"],
                    aliases,
                    given["artifactTypeName"],
                )
                key = f"artifact-{len(self.artifacts)}"
                self.artifacts[key] = artifact
                return {"createArtifact": {"artifact": _created(key, artifact)}}
            case "CreateArtifactManifest":
                manifest = {"id": "m", "file": self._upload("manifest", variables["artifactID"])}
                return {"createArtifactManifest": {"artifactManifest": manifest}}
            case "CreateArtifactFiles":
                files = (variables.get("input") or variables)["artifactFiles"]
                nodes = [
                    {
                        "storagePath": f"{file['artifactID']}/{file['name']}",
                        "uploadMultipartUrls": None,
                        "artifact": {"id": file["artifactID"]},
                        **self._upload("artifact", file["artifactID"], file["name"]),
                    }
                    for file in files
                ]
                edges = [{"node": node} for node in nodes]
                return {"createArtifactFiles": {"files": {"edges": edges}}}
            case "ArtifactByID":
                key = variables["id"]
                return {"artifact": _described_artifact(key, self.artifacts[key])}
            case "UseArtifact":
                used = variables["input"]
                self.runs[used["runName"]].inputs.append(used["artifactID"])
                return {"useArtifact": {"artifact": {"id": used["artifactID"]}}}
            case "CommitArtifact":
                key = variables["artifactID"]
                self.artifacts[key].state = "COMMITTED"
                artifact = {"id": key, "digest": self.artifacts[key].digest}
                return {"commitArtifact": {"artifact": artifact}}
        return None

    def _answer_about_sweeps(
        self, operation: str, variables: dict[str, Any]
    ) -> dict[str, Any] | None:
        """One sweep, whose agent is handed `sweep_runs`, one after the other, and then leaves."""
        match operation:
            case "UpsertSweep":
                self.sweep_config = yaml.safe_load(variables["config"])
                owner = {"id": "e", "name": ENTITY}
                project = {"id": "p", "name": variables["projectName"], "entity": owner}
                sweep = {"name": "sweep", "project": project}
                return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}
            case "Sweep" | "SweepWithRuns":
                sweep = {
                    "id": "s",
                    "name": "sweep",
                    "state": "RUNNING",
                    "config": yaml.safe_dump(self.sweep_config),
                    "runs": {"edges": []},
                }
                return {"project": {"sweep": sweep}}
            case "GetSweepState":
                return {"project": {"sweep": {"state": "RUNNING"}}}
            case "CreateAgent":
                return {"createAgent": {"agent": {"id": "agent"}}}
            case "Heartbeat":
                commands = []
                if not json.loads(variables["runState"]):
                    run = self.sweep_runs.pop(0) if self.sweep_runs else None
                    commands = [{"type": "run", **run} if run else {"type": "exit"}]
                reply = {"agent": {"id": "agent"}, "commands": json.dumps(commands)}
                return {"agentHeartbeat": reply}
        return None

    def _upload(self, *path: str) -> dict[str, Any]:
        url = "/".join([self.url, "upload", *path])
        return {"id": "f", "uploadUrl": url, "uploadHeaders": []}

    def receive_file(self, path: list[str], body: bytes) -> None:
        """Stores what was put at an address that `_upload` gave, or a run's file."""
        match path:
            case ["manifest", key]:
                self.artifacts[key].manifest = json.loads(body)
            case ["artifact", key, *name]:
                self.artifacts[key].files["/".join(name)] = body
            case [run_name, *name]:
                self.runs[run_name].files["/".join(name)] = body

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
        run.is_preempting |= bool(message.get("preempting"))
        if message.get("complete"):
            run.exit_code = message["exitcode"]


def _created(key: str, artifact: StoredArtifact) -> dict[str, Any]:
    sequence = {"id": "s", "latestArtifact": None}
    return {"id": key, "state": artifact.state, "artifactSequence": sequence}


def _described_artifact(key: str, artifact: StoredArtifact) -> dict[str, Any]:
    """What the client asks for when it has waited for an artifact."""
    project = {"id": "p", "internalId": "p", "name": "p", "entity": {"name": ENTITY}}
    collection = {"__typename": "ArtifactSequence", "name": artifact.name, "project": project}
    aliases = [
        {
            "__typename": "ArtifactAlias",
            "id": alias,
            "alias": alias,
            "artifactCollection": collection,
        }
        for alias in artifact.aliases
    ]
    return {
        "__typename": "Artifact",
        "id": key,
        "artifactSequence": collection,
        "versionIndex": 0,
        "artifactType": {"name": artifact.type},
        "description": None,
        "metadata": "{}",
        "ttlDurationSeconds": -2,
        "ttlIsInherited": True,
        "tags": [],
        "historyStep": None,
        "state": artifact.state,
        "size": sum(map(len, artifact.files.values())),
        "digest": artifact.digest,
        "commitHash": "c",
        "fileCount": len(artifact.files),
        "createdAt": "2026-01-01T00:00:00Z",
        "updatedAt": "2026-01-01T00:00:00Z",
        "aliases": aliases,
    }


def _bucket(run: StoredRun) -> dict[str, Any]:
    return {
        "id": run.name,
        "name": run.name,
        "displayName": run.display_name,
        "config": run.config,
        "historyLineCount": len(run.history),
        "project": {
            "id": "p",
            "name": run.project,
            "entity": {"id": "e", "name": run.shown.get("entity", ENTITY)},
        },
    }


def _described(run: StoredRun) -> dict[str, Any]:
    """What the public API asks for when it opens a run."""
    state = "running" if run.exit_code is None else "failed" if run.exit_code else "finished"
    return {
        **_bucket(run),
        "projectId": "1",
        "state": state,
        "tags": [],
        "sweepName": None,
        "group": None,
        "jobType": None,
        "commit": None,
        "readOnly": False,
        "createdAt": "2026-01-01T00:00:00",
        "heartbeatAt": "2026-01-01T00:00:00",
        "description": "",
        "notes": "",
        "systemMetrics": "{}",
        "summaryMetrics": json.dumps(run.summary),
        "user": {"name": ENTITY, "username": ENTITY},
        "historyKeys": None,
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
        server.requests[self.path.rsplit("/", 1)[-1]] += 1
        while (fault := server.fault(self.path)) == "hang":
            time.sleep(0.05)
        if isinstance(fault, int):
            return self._reply(fault, {"error": "a fault of the test"})
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
            server.receive_file(parts[1:], body)
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
