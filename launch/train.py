"""For `accelerate launch launch/train.py CONFIG... key=value...`, and for one process a rank under
srun: the same as `ganscale train`."""

import sys

from ganscale.cli.main import main
from ganscale.errors import EXIT_DONE, EXIT_REQUEUE
from ganscale.supervision.job_history import is_job_history_complete

if __name__ == "__main__":
    code = main(["train", *sys.argv[1:]])
    # To a launcher any other code is a failure: it would end the ranks that are still closing
    # their records, show a traceback, and exit with 1. The file tells the batch script instead.
    sys.exit(EXIT_DONE if code == EXIT_REQUEUE and is_job_history_complete() else code)
