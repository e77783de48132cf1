"""`ganscale sample RUN`: images from a trained generator."""

import argparse
import math
from pathlib import Path


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "sample",
        help="generate images with a trained generator",
        description="Generates images from a run's newest checkpoint. The same seed gives the same "
        "images, whatever their number.",
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="for example runs/demo")
    parser.add_argument("--count", type=int, default=64, help="number of images (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the latents (default: 0)")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="write all images into one grid")
    parser.add_argument("--folder", type=Path, help="write each image as a PNG into a folder")
    parser.add_argument("--shards", type=Path, help="write WebDataset shards and their manifest")
    parser.add_argument("--columns", type=int, help="columns of the grid (default: a square grid)")
    parser.add_argument(
        "--class",
        dest="label",
        type=int,
        metavar="N",
        help="the class to generate (default: all classes in turn)",
    )
    parser.add_argument(
        "--interpolate",
        action="store_true",
        help="each row of the grid interpolates between two latents",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "generator"),
        default="ema",
        help="ema (default), or the non-EMA weights",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from ganscale.errors import EXIT_DONE, UserError
    from ganscale.evaluation import sample_files
    from ganscale.evaluation.sampling import (
        generate_uint8,
        interpolate_latents,
        sample_labels,
        sample_latents,
    )
    from ganscale.training.load_generator import load_run_generator

    count = arguments.count
    if count < 1:
        raise UserError(f"--count must be at least 1, not {count}")
    if not (arguments.grid or arguments.folder or arguments.shards):
        raise UserError("choose an output: --grid PNG, --folder DIR or --shards DIR")
    if arguments.columns is not None and arguments.columns < 1:
        raise UserError(f"--columns must be at least 1, not {arguments.columns}")
    columns = arguments.columns or max(1, round(math.sqrt(count)))
    generator, latent_dim, num_classes = load_run_generator(arguments.run_folder, arguments.weights)
    if arguments.label is not None and not 0 <= arguments.label < num_classes:
        classes = f"classes 0 to {num_classes - 1}" if num_classes else "no classes"
        raise UserError(f"--class {arguments.label}: this run has {classes}")
    if torch.accelerator.is_available():
        generator.to(torch.accelerator.current_accelerator())

    if arguments.interpolate:
        rows = -(-count // columns)
        latents = interpolate_latents(arguments.seed, rows, columns, latent_dim)[:count]
        labels = sample_labels(0, rows, num_classes, columns)
        labels = None if labels is None else labels[:count]
    else:
        latents = sample_latents(arguments.seed, 0, count, latent_dim)
        labels = sample_labels(0, count, num_classes)
    if arguments.label is not None:
        labels = torch.full((count,), arguments.label)

    try:
        if path := arguments.grid:
            sample_files.write_grid(generate_uint8(generator, latents, labels), path, columns)
            print(f"{count} images in {path}")
        if path := arguments.folder:
            sample_files.write_folder(generate_uint8(generator, latents, labels), path)
            print(f"{count} images in {path}")
        if path := arguments.shards:
            sample_files.write_shards(generate_uint8(generator, latents, labels), path, labels)
            print(f"{count} images in shards in {path}")
    except (OSError, ValueError) as error:  # ValueError: Pillow does not know the file extension
        raise UserError(f"the images cannot be written: {error}") from error
    return EXIT_DONE
