"""For `accelerate launch launch/train.py CONFIG... key=value...`: the same as `ganscale train`."""

import sys

from ganscale.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
