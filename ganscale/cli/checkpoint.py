"""`ganscale checkpoint list|verify|prune|export RUN`: what a run has saved."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ganscale.run_folder import RunFolder


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "checkpoint", help="list, verify, prune and export what a run has saved"
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    listing = actions.add_parser(
        "list",
        help="print a run's checkpoints",
        description="Prints a run's checkpoints with their size, age and score. Only names and "
        "sizes are looked at; `verify` reads the contents.",
    )
    listing.set_defaults(run=list_checkpoints)

    verify = actions.add_parser(
        "verify",
        help="compare all checkpoints with their checksums",
        description="Reads a run's checkpoints and compares them with their checksums. Exit code "
        "1 if one is damaged.",
    )
    verify.set_defaults(run=verify_checkpoints)

    prune = actions.add_parser(
        "prune",
        help="delete checkpoints that are not to be kept",
        description="Deletes the checkpoints that are none of the last, no multiple and not the "
        "best, by the run's own settings where none are given. One that is whole always stays.",
    )
    prune.add_argument("--keep-last", metavar="K", help="the newest K stay")
    prune.add_argument(
        "--keep-every", metavar="N", help="those at multiples of N images stay (0: none; 500k)"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    prune.set_defaults(run=prune_checkpoints)

    export = actions.add_parser(
        "export",
        help="write a generator for use elsewhere",
        description="Writes the generator of a run's newest whole checkpoint into a folder of its "
        "own. `from ganscale import load_run_generator` loads it without the run.",
    )
    export.set_defaults(run=export_generator)

    for action in (listing, verify, prune, export):
        action.add_argument("run_folder", metavar="RUN", type=Path, help="for example runs/demo")
    export.add_argument("folder", metavar="FOLDER", type=Path, help="a new one")
    export.add_argument(
        "--weights",
        choices=("ema", "generator"),
        default="ema",
        help="the averaged generator (default) or the one last trained",
    )
    export.add_argument(
        "--checkpoint", metavar="images-...", help="another one than the newest, by its name"
    )


def list_checkpoints(arguments: argparse.Namespace) -> int:
    from ganscale.checkpoints.retention import best_checkpoint, inspect_checkpoints
    from ganscale.config import load_stored
    from ganscale.errors import EXIT_DONE

    run = _run(arguments)
    saved = inspect_checkpoints(run.checkpoints)
    best = best_checkpoint(saved, load_stored(run.config).checkpoint)
    rows = [("checkpoint", "images", "MB", "age", "score", "")]
    for each in saved:
        score = f"{each.score[0]} {each.score[1]:.6g}" if each.score else ""
        note = f"damaged: {each.damage}" if each.damage else "best" if each is best else ""
        age = _age(time.time() - each.written_at) if each.written_at else ""
        size = f"{each.bytes / 1e6:,.1f}"
        rows.append((each.folder.name, f"{each.images_seen:,}", size, age, score, note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, images, size, age, score, note in rows:
        numbers = f"{images:>{widths[1]}}  {size:>{widths[2]}}  {age:>{widths[3]}}"
        print(f"{name:<{widths[0]}}  {numbers}  {score:<{widths[4]}}  {note}".rstrip())
    aside = [path.name for path in sorted(run.checkpoints.glob("damaged-*"))]
    if aside:
        print(f"set aside as damaged: {', '.join(aside)}")
    return EXIT_DONE


def verify_checkpoints(arguments: argparse.Namespace) -> int:
    from ganscale.checkpoints.checkpoint import checkpoint_folders, find_damage
    from ganscale.errors import EXIT_DONE, EXIT_FAILED, UserError

    run = _run(arguments)
    folders = checkpoint_folders(run.checkpoints)
    if not folders:
        raise UserError(f"{run.path} has no checkpoint yet")
    exit_code = EXIT_DONE
    for folder in folders:
        reason = find_damage(folder)
        if reason is not None and not folder.exists():
            print(f"{folder.name}: deleted meanwhile")
            continue
        if reason is not None:
            exit_code = EXIT_FAILED
        print(f"{folder.name}: {'whole' if reason is None else f'damaged: {reason}'}")
    return exit_code


def prune_checkpoints(arguments: argparse.Namespace) -> int:
    from ganscale.checkpoints.checkpoint import checkpoint_folders
    from ganscale.checkpoints.retention import prune
    from ganscale.config import resolve
    from ganscale.errors import EXIT_DONE

    run = _run(arguments)
    count = len(checkpoint_folders(run.checkpoints))
    given = {"keep_last": arguments.keep_last, "keep_every_images": arguments.keep_every}
    settings = [f"checkpoint.{key}={value}" for key, value in given.items() if value is not None]
    keep = resolve([str(run.config.absolute()), *settings]).config.checkpoint
    going = prune(run.checkpoints, keep, dry_run=arguments.dry_run)
    would = "would be " if arguments.dry_run else ""
    for each in going:
        print(f"{each.folder.name}: {would}deleted")
    megabytes = sum(each.bytes for each in going) / 1e6
    print(f"{len(going)} of {count} checkpoints {would}deleted: {megabytes:,.1f} MB")
    return EXIT_DONE


def export_generator(arguments: argparse.Namespace) -> int:
    from ganscale import __version__
    from ganscale.checkpoints.checkpoint import images_seen_of
    from ganscale.config import load_stored
    from ganscale.errors import EXIT_DONE, UserError
    from ganscale.evaluation import exported_generator
    from ganscale.training.load_generator import load_run_generator
    from ganscale.training.network_setup import sample_shape

    run = _run(arguments)
    checkpoint = _chosen(run, arguments.checkpoint)
    generator, latent_dim, num_classes = load_run_generator(run.path, arguments.weights, checkpoint)
    config = load_stored(run.config)
    about = {
        "run": config.run.name,
        "images_seen": images_seen_of(checkpoint),
        "weights": arguments.weights,
        "ganscale": __version__,
    }
    try:
        exported_generator.export_generator(
            arguments.folder,
            generator,
            target=config.generator.target,
            options=config.generator.options,
            latent_dim=latent_dim,
            sample_shape=sample_shape(config),
            num_classes=num_classes,
            about=about,
        )
    except OSError as error:
        raise UserError(f"the generator cannot be written: {error}") from error
    print(f"the {arguments.weights} of {checkpoint.name} in {arguments.folder}")
    return EXIT_DONE


def _run(arguments: argparse.Namespace) -> "RunFolder":
    from ganscale.errors import UserError
    from ganscale.run_folder import RunFolder

    run = RunFolder(arguments.run_folder)
    if not run.config.exists():
        raise UserError(f"{run.path} is not a run folder: it has no {run.config.name}")
    return run


def _chosen(run: "RunFolder", name: str | None) -> Path:
    from ganscale.checkpoints.checkpoint import checkpoint_folders, find_damage, newest_checkpoint
    from ganscale.errors import UserError

    if name is None:
        newest = newest_checkpoint(run.checkpoints, set_damaged_aside=False)
        if newest is None:
            raise UserError(f"{run.path} has no whole checkpoint yet")
        return newest
    folders = {folder.name: folder for folder in checkpoint_folders(run.checkpoints)}
    if name not in folders:
        raise UserError(f"{run.path} has no checkpoint {name}; there are {', '.join(folders)}")
    if (reason := find_damage(folders[name])) is not None:
        raise UserError(f"{folders[name]} is damaged ({reason})")
    return folders[name]


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
