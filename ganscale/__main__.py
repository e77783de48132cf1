"""`python -m ganscale`: the same as the `ganscale` command."""

from ganscale.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
