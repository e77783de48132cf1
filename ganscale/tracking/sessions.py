"""What is recorded of a session when it starts: its code, versions, cluster and data."""

import contextlib
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ganscale.runtime import Runtime
from ganscale.secrets import without_secrets


def session_facts(
    runtime: Runtime, run_id: str, images_seen: int, fingerprint: str
) -> dict[str, Any]:
    """The entry of a session in `sessions.jsonl`; texts and numbers only."""
    nodes = max(1, round(1 / runtime.node_share))
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run_id": run_id,
        "images_seen": images_seen,
        "command": without_secrets(sys.argv),
        "git": _git_revision(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "none",
            **{name: _version(name) for name in ("ganscale", "accelerate", "numpy", "wandb")},
        },
        "cluster": {
            "world_size": runtime.world_size,
            "nodes": nodes,
            "ranks_per_node": runtime.world_size // nodes,
            "device": _device_name(runtime.device),
            "host": platform.node(),
            **({"slurm_job_id": job} if job else {}),
        },
        "data_fingerprint": fingerprint,
    }


def _git_revision() -> dict[str, Any]:
    """{"revision", "is_dirty"} of the git working tree here; {} if there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        revision = _git("rev-parse", "HEAD").strip()
        changes = _git("status", "--porcelain", "--untracked-files=no")
        return {"revision": revision, "is_dirty": bool(changes.strip())}
    return {}


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=5.0,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    ).stdout


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return "none"
