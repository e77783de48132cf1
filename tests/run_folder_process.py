"""A process that opens run folders, says so, and holds them until its input ends."""

import sys
from pathlib import Path

from ganscale.config import resolve
from ganscale.run_folder import RunFolder

if __name__ == "__main__":
    config, fingerprint, *folders = sys.argv[1:]
    for folder in folders:
        run = RunFolder(Path(folder))
        run_id, checkpoint = run.open(resolve([config]), fingerprint)
        run.accept(resolve([config]), fingerprint)
        print(run_id, checkpoint, flush=True)
    sys.stdin.read()
