"""`ganscale checkpoint list|verify|prune|export RUN`: a run's checkpoints."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from ganscale.cli.arguments import ALLOW_CHANGED_CODE
from ganscale.errors import EXIT_DONE, EXIT_FAILED, UserError
from ganscale.run_folder import RunFolder


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("checkpoint", help="list, verify, prune or export checkpoints")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def add_action(
        name: str, run: Callable[..., int | None], summary: str, description: str
    ) -> Callable[..., argparse.Action]:
        action = actions.add_parser(name, help=summary, description=description)
        action.add_argument("run_folder", metavar="RUN", type=Path, help="for example runs/demo")
        action.set_defaults(run=run)
        return action.add_argument

    add_action(
        "list",
        list_checkpoints,
        "print a run's checkpoints",
        "Prints a run's checkpoints with their size, age and score. Checks only names and sizes; "
        "`verify` reads the contents.",
    )
    add_action(
        "verify",
        verify_checkpoints,
        "compare all checkpoints with their checksums",
        "Reads a run's checkpoints and compares them with their checksums. Exits with code 1 if "
        "one is damaged.",
    )
    add = add_action(
        "prune",
        prune_checkpoints,
        "delete old checkpoints",
        "Deletes all checkpoints but the newest, the multiples and the best. The options default "
        "to the run's settings. At least one whole checkpoint is always kept.",
    )
    add("--keep-last", metavar="K", help="keep the newest K")
    add("--keep-every", metavar="N", help="keep multiples of N images, e.g. 500k (0: none)")
    add("--dry-run", action="store_true", help="only print what would be deleted")
    add = add_action(
        "export",
        export_generator,
        "write a generator for use elsewhere",
        "Writes the generator of a run's newest whole checkpoint into a new folder. "
        "`from ganscale import load_generator` loads it without the run.",
    )
    add("folder", metavar="FOLDER", type=Path, help="a new folder")
    add("--weights", choices=("ema", "generator"), default="ema", help="ema (default) or non-EMA")
    add("--checkpoint", metavar="images-...", help="a checkpoint's name (default: the newest)")
    add("--allow-changed-code", action="store_true", help=ALLOW_CHANGED_CODE)


def list_checkpoints(arguments: argparse.Namespace) -> None:
    from ganscale.checkpoints.retention import best_checkpoint, inspect_checkpoints
    from ganscale.config import load_stored

    run = _run(arguments)
    saved = inspect_checkpoints(run.checkpoints)
    best = best_checkpoint(saved, load_stored(run.config).checkpoint)
    rows = [("checkpoint", "images", "MB", "age", "score", "")]
    for checkpoint in saved:
        score = "{} {:.6g}".format(*checkpoint.score) if checkpoint.score else ""
        damage = f"damaged: {checkpoint.damage}" if checkpoint.damage else ""
        note = "best" if checkpoint is best else damage
        age = _age(time.time() - checkpoint.written_at) if checkpoint.written_at else ""
        size, images = f"{checkpoint.bytes / 1e6:,.1f}", f"{checkpoint.images_seen:,}"
        rows.append((checkpoint.folder.name, images, size, age, score, note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if not any(checkpoint.score for checkpoint in saved):
        widths[4] = 0
    for row in rows:
        cells = zip(row, "<>>><<", widths, strict=True)
        shown = (f"{cell:{side}{width}}" for cell, side, width in cells if width)
        print("  ".join(shown).rstrip())
    if aside := [path.name for path in sorted(run.checkpoints.glob("damaged-*"))]:
        print(f"set aside as damaged: {', '.join(aside)}")


def verify_checkpoints(arguments: argparse.Namespace) -> int:
    from ganscale.checkpoints.checkpoint import checkpoint_folders, find_damage

    run = _run(arguments)
    folders = checkpoint_folders(run.checkpoints)
    if not folders:
        raise UserError(f"{run.path} has no checkpoint yet")
    exit_code = EXIT_DONE
    for folder in folders:
        reason = find_damage(folder)
        if reason is None:
            print(f"{folder.name}: whole")
        elif folder.exists():
            print(f"{folder.name}: damaged: {reason}")
            exit_code = EXIT_FAILED
        else:
            print(f"{folder.name}: deleted in the meantime")
    return exit_code


def prune_checkpoints(arguments: argparse.Namespace) -> None:
    from ganscale.checkpoints.checkpoint import checkpoint_folders
    from ganscale.checkpoints.retention import prune
    from ganscale.config import resolve

    run = _run(arguments)
    count = len(checkpoint_folders(run.checkpoints))
    options = {"keep_last": arguments.keep_last, "keep_every_images": arguments.keep_every}
    settings = [f"checkpoint.{key}={value}" for key, value in options.items() if value is not None]
    stored = [str(run.config.absolute()), *settings]
    keep = resolve(stored, is_stored=True).config.checkpoint
    pruned = prune(run.checkpoints, keep, dry_run=arguments.dry_run)
    would = "would be " if arguments.dry_run else ""
    for checkpoint in pruned:
        print(f"{checkpoint.folder.name}: {would}deleted")
    megabytes = sum(checkpoint.bytes for checkpoint in pruned) / 1e6
    print(f"{len(pruned)} of {count} checkpoints {would}deleted: {megabytes:,.1f} MB")


def export_generator(arguments: argparse.Namespace) -> None:
    from ganscale import __version__
    from ganscale.checkpoints.checkpoint import images_seen_of
    from ganscale.config import load_stored
    from ganscale.evaluation import exported_generator
    from ganscale.training.network_setup import load_run_generator

    run = _run(arguments)
    checkpoint = select_checkpoint(run, arguments.checkpoint)
    generator, latent_dim, num_classes = load_run_generator(
        run.path, arguments.weights, checkpoint, allow_changed_code=arguments.allow_changed_code
    )
    config = load_stored(run.config)
    try:
        exported_generator.export_generator(
            arguments.folder,
            generator,
            target=config.generator.target,
            options=config.generator.options,
            latent_dim=latent_dim,
            sample_shape=config.data.sample_shape,
            num_classes=num_classes,
            about={
                "run": config.run.name,
                "images_seen": images_seen_of(checkpoint),
                "weights": arguments.weights,
                "ganscale": __version__,
            },
        )
    except OSError as error:
        raise UserError(f"the generator cannot be written: {error}") from error
    print(f"the {arguments.weights} of {checkpoint.name} in {arguments.folder}")


def _run(arguments: argparse.Namespace) -> RunFolder:
    run = RunFolder(arguments.run_folder)
    run.check_exists()
    return run


def select_checkpoint(run: RunFolder, name: str | None) -> Path:
    """The checkpoint of that name or path, or the newest. Raises UserError if none is whole."""
    from ganscale.checkpoints.checkpoint import checkpoint_folders, find_damage, newest_checkpoint

    if name is None:
        newest = newest_checkpoint(run.checkpoints, set_damaged_aside=False)
        if newest is None:
            raise UserError(f"{run.path} has no whole checkpoint yet")
        return newest
    folders = {folder.name: folder for folder in checkpoint_folders(run.checkpoints)}
    name = Path(name).name
    if name not in folders:
        raise UserError(f"{run.path} has no checkpoint {name}; choose from {', '.join(folders)}")
    if (reason := find_damage(folders[name])) is not None:
        raise UserError(f"{folders[name]} is damaged ({reason})")
    return folders[name]


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
