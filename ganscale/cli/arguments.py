"""Argument types that several commands share."""

import argparse

ALLOW_CHANGED_CODE = "use the weights although the network's code has changed since"


def positive_int(text: str) -> int:
    """The integer in `text`. Raises ArgumentTypeError if it is below 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
