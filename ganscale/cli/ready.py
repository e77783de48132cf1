"""`ganscale configs` and `ganscale slurm`: configs and batch scripts that come with ganscale."""

import argparse
from pathlib import Path

from ganscale.errors import UserError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "configs",
        help="list the ready configs, which are found by name, or copy them here",
        description="Lists ready configs by the names under which every command finds them: "
        "`ganscale train demo objective/lsgan`.",
    )
    parser.add_argument("--copy", action="store_true", help="copy them to configs/, to change them")
    parser.set_defaults(run=_configs)
    parser = commands.add_parser(
        "slurm",
        help="list the batch scripts for SLURM, or copy them here",
        description="Lists the batch scripts for SLURM. Copied, they are submitted from here.",
    )
    parser.add_argument("--copy", action="store_true", help="copy them to slurm/ and launch/")
    parser.set_defaults(run=_slurm)


def _configs(arguments: argparse.Namespace) -> None:
    from ganscale.ready import ready_configs, title

    if arguments.copy:
        _copy("configs")
        return
    configs = ready_configs()
    width = max(map(len, configs))
    for name, path in configs.items():
        print(f"{name:{width}}  {title(path)}")


def _slurm(arguments: argparse.Namespace) -> None:
    from ganscale.ready import READY, title

    if arguments.copy:
        _copy("slurm", "launch")
        return
    for path in sorted((READY / "slurm").glob("*.sbatch")):
        print(f"{f'slurm/{path.name}':26}  {title(path)}")


def _copy(*folders: str) -> None:
    from ganscale.ready import copy_here

    try:
        for folder in folders:
            for path, is_new in copy_here(folder, Path()):
                print(path if is_new else f"{path} is there already: kept as it is")
    except OSError as error:
        raise UserError(f"cannot copy here: {error}") from None
