"""What the training process and its uploader tell each other: one line of JSON each."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ganscale.errors import EXIT_FAILED
from ganscale.tracking.wandb_mode import Mode


@dataclass(frozen=True)
class WandbIdentity:
    """What makes a W&B run the same one in every session of a training."""

    run_id: str
    project: str
    name: str
    config: dict[str, Any]


CHECKPOINT_SECONDS = 300.0
"""What each checkpoint that is uploaded at the end of a run adds to `finish_seconds`."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that is kept in W&B as a version of the run's checkpoints."""

    path: str
    aliases: list[str]


@dataclass(frozen=True)
class Job:
    """What the uploader is to do, told at its start."""

    folder: str
    mode: Mode
    identity: WandbIdentity
    trainer_pid: int  # whose CPU, memory and GPUs W&B records
    retry_seconds: float  # until W&B is tried again, the first time
    finish_seconds: float  # for what is not uploaded yet when the session ends

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Job":
        content = json.loads(line)
        return cls(**{**content, "identity": WandbIdentity(**content["identity"])})


@dataclass(frozen=True)
class SessionEnd:
    """How a session ended; by default, as one does whose process was killed."""

    exit_code: int = EXIT_FAILED
    summary: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "SessionEnd":
        content = json.loads(line)
        checkpoints = [Checkpoint(**each) for each in content["checkpoints"]]
        return cls(**{**content, "checkpoints": checkpoints})
