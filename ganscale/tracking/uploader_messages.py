"""Messages from the training process to its uploader: one line of JSON each."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ganscale.errors import EXIT_FAILED
from ganscale.tracking.wandb_mode import RequestedMode

CHECKPOINT_SECONDS = 300.0  # that each checkpoint uploaded at the end adds to `finish_seconds`


@dataclass(frozen=True)
class WandbIdentity:
    """The W&B run that all sessions of a training share.

    name: of the run, where W&B's settings give no other
    destination: the arguments of `wandb.init` that the run's settings give, such as `project`
    dataset: "name", "fingerprint" and "path" of its data
    """

    run_id: str
    name: str
    config: dict[str, Any]
    destination: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A folder to upload to W&B, as a version of the run's checkpoint artifact."""

    path: str
    aliases: list[str]


@dataclass(frozen=True)
class UploadJob:
    """What the uploader has to do; its first message."""

    folder: str
    mode: RequestedMode
    identity: WandbIdentity
    trainer_pid: int  # W&B records this process's CPU, memory and GPUs
    retry_seconds: float  # before the first retry
    finish_seconds: float  # for uploads that are still pending when the session ends

    @classmethod
    def from_line(cls, line: str) -> "UploadJob":
        content = json.loads(line)
        return cls(**{**content, "identity": WandbIdentity(**content["identity"])})


@dataclass(frozen=True)
class SessionEnd:
    """How a session ended; the defaults are for one whose process was killed."""

    exit_code: int = EXIT_FAILED
    summary: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)

    @classmethod
    def from_line(cls, line: str) -> "SessionEnd":
        content = json.loads(line)
        checkpoints = [Checkpoint(**fields) for fields in content["checkpoints"]]
        return cls(**{**content, "checkpoints": checkpoints})


def to_line(message: UploadJob | SessionEnd) -> bytes:
    return json.dumps(asdict(message)).encode() + b"\n"
