"""`ganscale evaluate RUN|IMAGES...`: FID and other figures of checkpoints, or of any images."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ganscale.cli.arguments import ALLOW_CHANGED_CODE, positive_int
from ganscale.cli.checkpoint import select_checkpoint
from ganscale.errors import UserError
from ganscale.run_folder import RunFolder

if TYPE_CHECKING:
    from ganscale.evaluation.evaluator import Evaluator
    from ganscale.evaluation.figures import Figures
    from ganscale.evaluation.images import Images
    from ganscale.runtime import Runtime
    from ganscale.schema import Config

_ALL = "all"


class Subject(NamedTuple):
    """What is judged, under the name of its row. images: made when its turn has come"""

    name: str
    evaluator: "Evaluator"
    images: "Callable[[], Images]"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "evaluate",
        help="compute FID and other figures of sample quality",
        description="Judges the EMA generator of runs, or images in a folder, zip or tar. Several "
        "give a table. Options default to the run's settings `evaluation`. On several ranks: "
        "`accelerate launch -m ganscale evaluate ...`.",
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="RUN|IMAGES", type=Path, help="for example runs/demo")
    add(
        "--checkpoint",
        metavar="NAME",
        help="such as images-000200000, or `all` (default: the newest)",
    )
    add("--metrics", metavar="NAME,...", help="such as fd,kid,precision,recall")
    add("--network", metavar="NAME", help="inception, dinov2, efficientnet_lite0 or package:Class")
    add("--option", metavar="KEY=VALUE", action="append", help="of the network, such as path=FILE")
    add("--samples", metavar="N", type=positive_int, help="generated images, or files, to judge")
    add("--reference", metavar="DATA|NPZ", help="a data set, or a file of mu and sigma")
    add("--reference-images", metavar="N", type=int, help="use so many images of it (0: all)")
    add("--batch-size", metavar="N", type=positive_int, help="images per forward")
    add("--seed", type=int, help="of the latents (default: the run's)")
    add("--weights", choices=("ema", "generator"), default="ema", help="ema (default) or non-EMA")
    add("--allow-changed-code", action="store_true", help=ALLOW_CHANGED_CODE)
    add("--json", action="store_true", help="print JSON in place of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from ganscale.runtime import Runtime

    runtime = Runtime.start()
    try:
        level = logging.INFO if runtime.is_main else logging.WARNING
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
        subjects = [*_subjects(arguments, runtime)]
        _check_comparable(subjects)
        results = [(subject.name, _evaluate(subject, runtime)) for subject in subjects]
        if runtime.is_main:
            print(_as_json(results) if arguments.json else _as_table(results))
        runtime.barrier()
    finally:
        runtime.close()


def _subjects(arguments: argparse.Namespace, runtime: "Runtime") -> Iterator[Subject]:
    for path in arguments.sources:
        folder = RunFolder(path)
        if folder.config.exists():
            yield from _run_subjects(arguments, folder, runtime)
        else:
            yield _file_subject(arguments, path, runtime)


def _run_subjects(
    arguments: argparse.Namespace, folder: RunFolder, runtime: "Runtime"
) -> Iterator[Subject]:
    from ganscale.checkpoints.checkpoint import checkpoint_folders
    from ganscale.config import load_stored
    from ganscale.data.dataset import open_data
    from ganscale.evaluation.evaluator import Evaluator
    from ganscale.evaluation.images import GeneratedImages, labels_for
    from ganscale.training.network_setup import load_run_generator

    config = _with_options(load_stored(folder.config), arguments)
    manifest = None
    if not config.evaluation.reference or config.training.conditional:
        manifest = open_data(config.data).manifest
    evaluator = Evaluator(config.evaluation, config.data, manifest, runtime)
    if arguments.checkpoint == _ALL:
        checkpoints = checkpoint_folders(folder.checkpoints)
    else:
        checkpoints = [select_checkpoint(folder, arguments.checkpoint)]
    if not checkpoints:
        raise UserError(f"{folder.path} has no checkpoint yet")
    for checkpoint in checkpoints:

        def images(checkpoint: Path = checkpoint) -> "Images":
            generator, latent_dim, num_classes = load_run_generator(
                folder.path,
                arguments.weights,
                checkpoint,
                allow_changed_code=arguments.allow_changed_code,
            )
            seed = config.seed if arguments.seed is None else arguments.seed
            count = config.evaluation.samples
            labels = labels_for(manifest, count, num_classes)
            return GeneratedImages(generator.to(runtime.device), seed, count, latent_dim, labels)

        yield Subject(f"{folder.path}/{checkpoint.name}", evaluator, images)


def _file_subject(arguments: argparse.Namespace, path: Path, runtime: "Runtime") -> Subject:
    from ganscale.data.images.decoding import decode
    from ganscale.evaluation.evaluator import Evaluator
    from ganscale.evaluation.images import FileImages
    from ganscale.schema import Config, DataConfig, EvaluationConfig
    from ganscale.shards.sources import image_reader, list_images

    if not arguments.reference:
        raise UserError(
            f"{path} is not a run folder, so it has no data to be compared with: give --reference"
        )
    source = list_images(str(path))
    first = decode(image_reader(source.kind, source.path)(source.images[0]), None, 3)
    data = DataConfig(path=arguments.reference, resolution=first.shape[0])
    count = len(source.images)
    evaluation = EvaluationConfig(samples=arguments.samples or count)
    config = _with_options(Config(data=data, evaluation=evaluation), arguments)
    if first.shape[0] != first.shape[1]:
        raise UserError(f"the images in {path} are not square")
    if config.evaluation.samples > count:
        raise UserError(f"{path} has {count:,} images, not {config.evaluation.samples:,}")
    evaluator = Evaluator(config.evaluation, config.data, None, runtime)
    shape = (3, first.shape[0], first.shape[1])
    return Subject(str(path), evaluator, lambda: FileImages(source, shape, arguments.samples or 0))


def _with_options(config: "Config", arguments: argparse.Namespace) -> "Config":
    """The config with `evaluation` as the options say."""
    given: dict[str, Any] = {
        "metrics": arguments.metrics and arguments.metrics.split(","),
        "network": arguments.network,
        "samples": arguments.samples,
        "reference": arguments.reference,
        "reference_images": arguments.reference_images,
        "batch_size": arguments.batch_size,
    }
    if arguments.network:
        given["options"] = {}
    changes = {name: value for name, value in given.items() if value is not None}
    if arguments.option:
        changes["options"] = {**changes.get("options", config.evaluation.options)}
        for option in arguments.option:
            key, equals, value = option.partition("=")
            if not equals:
                raise UserError(f"--option {option}: write KEY=VALUE")
            changes["options"][key] = int(value) if value.isdecimal() else value
    return replace(config, evaluation=replace(config.evaluation, **changes))


def _check_comparable(subjects: list[Subject]) -> None:
    """Before anything takes long. Raises UserError."""
    first, *others = subjects
    for other in others:
        mine, theirs = first.evaluator.identity(), other.evaluator.identity()
        if differences := mine.differences(theirs):
            raise UserError(
                f"figures of {first.name} and {other.name} are not comparable ("
                f"{'; '.join(differences)}): give options that make these equal, or evaluate each "
                "by itself"
            )


def _evaluate(subject: Subject, runtime: "Runtime") -> "Figures":
    from tqdm import tqdm

    bar = tqdm(total=1, desc=subject.name, unit="round", disable=None if runtime.is_main else True)

    def on_round(stage: str, begun: int, total: int) -> None:
        bar.set_description(f"{subject.name}: {stage}", refresh=False)
        bar.total, bar.n = max(total, begun, 1), begun
        bar.refresh()

    with bar:
        return subject.evaluator.evaluate(subject.images(), lambda: False, on_round)


def _as_json(results: "list[tuple[str, Figures]]") -> str:
    return json.dumps([{"source": name, **figures.row()} for name, figures in results], indent=1)


def _as_table(results: "list[tuple[str, Figures]]") -> str:
    """One line for each result, and below what all of them depend on."""
    names = [*results[0][1].values]
    rows = [["", *(name.removeprefix("eval/") for name in names)]]
    rows += [[name, *(f"{figures.values[k]:.6g}" for k in names)] for name, figures in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    identity = results[0][1].identity
    lines += [
        "",
        f"network:    {identity.network} (sha256 {identity.checksum[:16]}), {identity.resize}",
        f"reference:  {identity.reference}, {identity.reference_images or 'unknown'} images",
        f"samples:    {identity.samples}",
    ]
    return "\n".join(lines)
