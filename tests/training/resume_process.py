"""Opens run folders, prints the ids of their runs, and holds the locks until its input ends."""

import sys
from pathlib import Path

from ganscale.config import resolve
from ganscale.run_folder import RunFolder
from ganscale.training.resume import accept_settings, open_run

if __name__ == "__main__":
    config, fingerprint, *folders = sys.argv[1:]
    for folder in folders:
        run = RunFolder(Path(folder))
        open_run(run, resolve([config]), fingerprint)
        accept_settings(run, resolve([config]), fingerprint)
        print(run.read_identity()["id"], flush=True)
    sys.stdin.read()
