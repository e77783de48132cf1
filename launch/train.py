"""`ganscale train` as a script: for `accelerate launch launch/train.py CONFIG... key=value...`, and
for srun with one rank per task."""

import sys

from ganscale.cli.main import main
from ganscale.errors import EXIT_DONE, EXIT_REQUEUE
from ganscale.supervision.job_history import is_job_history_complete

if __name__ == "__main__":
    code = main(["train", *sys.argv[1:]])
    # A launcher treats any other code as a failure: it would kill ranks that are still closing
    # their records, print a traceback, and exit with 1. The batch script reads the job history.
    sys.exit(EXIT_DONE if code == EXIT_REQUEUE and is_job_history_complete() else code)
