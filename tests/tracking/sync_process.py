"""Synchronizes a run folder as `ganscale sync` does, and prints the result as JSON."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from ganscale.errors import GanscaleError
from ganscale.run_folder import RunFolder
from ganscale.tracking.sync import synchronize
from ganscale.tracking.uploader_messages import Checkpoint, WandbIdentity

if __name__ == "__main__":
    arguments = json.loads(sys.argv[2])
    checkpoints = [Checkpoint(**fields) for fields in arguments.pop("checkpoints", [])]
    destination = arguments.pop("destination", {"project": arguments.pop("project", "tests")})
    dataset = arguments.pop("dataset", {})
    config = arguments.pop("config", {"world_size": 1})
    identity = WandbIdentity("same-run", "a run", config, destination, dataset)
    try:
        result = synchronize(RunFolder(Path(sys.argv[1])), identity, checkpoints, **arguments)
        print(json.dumps(asdict(result)))
    except GanscaleError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
