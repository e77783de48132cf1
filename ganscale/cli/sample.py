"""`ganscale sample RUN`: images from a trained generator."""

import argparse
import math
from functools import partial
from pathlib import Path

from ganscale.cli.arguments import ALLOW_CHANGED_CODE, TRUNCATION, finite_float, positive_int
from ganscale.cli.checkpoint import select_checkpoint
from ganscale.errors import OutOfMemoryError, UserError, is_out_of_memory
from ganscale.run_folder import RunFolder


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "sample",
        help="generate images with a trained generator",
        description="Generates images from a run's newest or another checkpoint. The same seed "
        "gives the same images, whatever their number.",
    )
    add = parser.add_argument
    add("run_folder", metavar="RUN", type=Path, help="for example runs/demo")
    add("--count", type=positive_int, default=64, help="number of images (default: 64)")
    add("--seed", type=int, default=0, help="seed of the latents (default: 0)")
    add("--grid", type=Path, metavar="PNG", help="write all images into one grid")
    add("--folder", type=Path, help="write each image as a PNG into a folder")
    add("--shards", type=Path, help="write WebDataset shards and their manifest")
    add("--checkpoint", metavar="NAME", help="such as images-000200000 (default: the newest)")
    add("--columns", type=positive_int, help="columns of the grid (default: as many as rows)")
    add("--class", dest="label", type=int, metavar="N", help="class (default: all in turn)")
    add("--truncation", type=finite_float, default=1.0, metavar="PSI", help=TRUNCATION)
    add("--interpolate", action="store_true", help="interpolate two latents in each row")
    add("--weights", choices=("ema", "generator"), default="ema", help="ema (default) or non-EMA")
    add("--allow-changed-code", action="store_true", help=ALLOW_CHANGED_CODE)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from ganscale.evaluation import sample_files, sampling
    from ganscale.evaluation.truncation import truncated
    from ganscale.runtime import set_tf32
    from ganscale.training.network_setup import load_run_generator

    if not (arguments.grid or arguments.folder or arguments.shards):
        raise UserError("choose an output: --grid PNG, --folder DIR or --shards DIR")
    if arguments.grid:
        sample_files.check_extension(arguments.grid)
    count = arguments.count
    columns = arguments.columns or max(1, round(math.sqrt(count)))
    folder = RunFolder(arguments.run_folder)
    folder.check_exists()
    checkpoint = select_checkpoint(folder, arguments.checkpoint)
    generator, latent_dim, num_classes = load_run_generator(
        folder.path, arguments.weights, checkpoint, allow_changed_code=arguments.allow_changed_code
    )
    if arguments.label is not None and not 0 <= arguments.label < num_classes:
        classes = f"classes 0 to {num_classes - 1}" if num_classes else "no classes"
        raise UserError(f"--class {arguments.label}: this run has {classes}")
    set_tf32(False)

    if arguments.interpolate:
        rows = -(-count // columns)
        latents = sampling.interpolate_latents(arguments.seed, rows, columns, latent_dim)[:count]
        labels = sampling.sample_labels(0, rows, num_classes, columns)
        labels = None if labels is None else labels[:count]
        positions = sampling.interpolation_positions(rows, columns)[:count]
    else:
        latents = sampling.sample_latents(arguments.seed, 0, count, latent_dim)
        labels = sampling.sample_labels(0, count, num_classes)
        positions = torch.arange(count)
    if arguments.label is not None:
        labels = torch.full((count,), arguments.label)

    try:
        if torch.accelerator.is_available():
            generator.to(torch.accelerator.current_accelerator())
        network = truncated(generator, arguments.truncation, arguments.seed, latent_dim, labels)
        draws = {"seed": arguments.seed, "positions": positions}
        generate = partial(sampling.generate_uint8, network, latents, labels, **draws)
        if path := arguments.grid:
            sample_files.write_grid(generate(), path, columns)
            print(f"{count} images in {path}")
        if path := arguments.folder:
            sample_files.write_folder(generate(), path)
            print(f"{count} images in {path}")
        if path := arguments.shards:
            sample_files.write_shards(generate(), path, labels)
            print(f"{count} images in shards in {path}")
    except OSError as error:
        raise UserError(f"the images cannot be written: {error}") from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory while making {sampling.CHUNK_SIZE} images at a time; with "
            "CUDA_VISIBLE_DEVICES set to nothing, the same command uses the CPU"
        ) from error
