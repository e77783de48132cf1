"""`ganscale config CONFIG... key=value...`: the complete run, and where each value came from."""

import argparse
import sys


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "config",
        help="print the complete run that config files and overrides describe",
        description="Prints every setting of the run with the file that it came from. With "
        "--explain, prints what each setting means, its unit and its limits, too.",
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="CONFIG|key=value")
    add("--explain", action="store_true", help="explain each setting; without CONFIG, all settings")
    add(
        "--check",
        action="store_true",
        help="also try whether everything fits: objective, networks, data, run folder",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from ganscale.config import resolve
    from ganscale.run_folder import in_its_folder
    from ganscale.secrets import MASK, yaml_without_secrets
    from ganscale.settings_reference import annotated_yaml, reference

    if arguments.explain and not arguments.settings:
        print(reference(), end="")
        return
    resolved = in_its_folder(resolve(arguments.settings))
    if arguments.check:
        from ganscale.training.start import try_start

        print("\n".join([*try_start(resolved), "everything fits"]), file=sys.stderr)
    text = annotated_yaml(resolved, explain=arguments.explain)
    shown = yaml_without_secrets(text)
    if shown != text:
        sys.stderr.write(f"passwords, queries of URLs and `pipe:` commands are shown as {MASK}\n")
    print(shown, end="")
