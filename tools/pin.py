"""Turns `pip freeze` (standard input) into constraints.txt (standard output).

Builds of torch for other devices have one version (`2.13.0+cpu` is pinned as `2.13.0`), and a
package that has left an older Python behind is pinned only for the Pythons it supports.
"""

import importlib.metadata
import sys

HEADER = "# The versions that the tests ran with, used by `make install`. Made by `make pin`.\n"
OLDEST_PYTHON = (3, 10)


def marker(name: str) -> str:
    """The environment marker for a package that does not support OLDEST_PYTHON, else nothing."""
    required = str(importlib.metadata.metadata(name)["Requires-Python"] or "")
    for part in required.split(","):
        if part.strip().startswith(">="):
            oldest = part.strip().removeprefix(">=").strip()
            if tuple(int(number) for number in oldest.split(".")[:2]) > OLDEST_PYTHON:
                return f' ; python_version >= "{oldest}"'
    return ""


def main() -> None:
    sys.stdout.write(HEADER)
    for line in sys.stdin:
        name, equals, version = line.strip().partition("==")
        if equals and name != "setuptools":
            sys.stdout.write(f"{name}=={version.partition('+')[0]}{marker(name)}\n")


if __name__ == "__main__":
    main()
