"""`ganscale config CONFIG... key=value...`: the complete run, and where each value came from."""

import argparse


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "config",
        help="print the complete run that config files and overrides describe",
        description="Prints every setting of the run with the file that it came from.",
    )
    parser.add_argument("settings", nargs="+", metavar="CONFIG|key=value")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ganscale.config import resolve

    print(resolve(arguments.settings).to_yaml(with_origin=True), end="")
    return 0
