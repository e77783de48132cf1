"""What `ganscale evaluate` judges: checkpoints of runs, exported generators, and images."""

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ganscale.checkpoints.checkpoint import checkpoint_folders, find_damage
from ganscale.cli.checkpoint import select_checkpoint
from ganscale.config import load_stored
from ganscale.data.bad_samples import BadSampleError
from ganscale.data.dataset import open_data
from ganscale.data.images.decoding import decode
from ganscale.data.manifest import JSON_NAME, Manifest
from ganscale.errors import UnavailableError, UserError
from ganscale.evaluation.evaluator import Evaluator
from ganscale.evaluation.exported_generator import DESCRIPTION, load_generator
from ganscale.evaluation.figures import STATISTICS_SUFFIX
from ganscale.evaluation.images import (
    DataSetImages,
    FileImages,
    GeneratedImages,
    Images,
    are_gray,
    are_gray_files,
    chosen_samples,
    describe_labels,
    labels_for,
)
from ganscale.evaluation.truncation import truncated
from ganscale.resolution import as_resolution
from ganscale.run_folder import RunFolder
from ganscale.schema import Config, DataConfig, EvaluationConfig
from ganscale.shards.sources import image_reader, list_images
from ganscale.training.network_setup import load_run_generator

if TYPE_CHECKING:
    from ganscale.runtime import Runtime

logger = logging.getLogger(__name__)

_ALL = "all"


class UnusableCheckpointError(UserError):
    """One of several checkpoints cannot be judged; the others can."""


class Subject(NamedTuple):
    """What is judged, under the name of its row.

    images: made when it is evaluated; may raise UnusableCheckpointError
    """

    name: str
    evaluator: Evaluator
    images: Callable[[], Images]


def subjects_of(arguments: argparse.Namespace, runtime: "Runtime") -> Iterator[Subject]:
    """Raises UserError for what cannot be judged."""
    has_run = any(RunFolder(path).config.exists() for path in arguments.sources)
    if not has_run and (arguments.checkpoint or arguments.weights != "ema"):
        raise UserError("--checkpoint and --weights are for runs, and no run folder was named")
    has_generator = has_run or any((path / DESCRIPTION).exists() for path in arguments.sources)
    if not has_generator and arguments.truncation != 1:
        raise UserError("--truncation is for generators, and neither a run nor an export was named")
    for path in arguments.sources:
        if (folder := RunFolder(path)).config.exists():
            yield from _of_run(arguments, folder, runtime)
            continue
        is_bundled = str(path).startswith("bundled:")
        if not path.exists() and not is_bundled:
            raise UserError(f"there is no {path}: name a run folder, or images")
        if not arguments.reference:
            raise UserError(
                f"{path} is not a run folder, so it has no data to be compared with: give "
                "--reference"
            )
        if (path / DESCRIPTION).exists():
            yield _of_exported(arguments, path, runtime)
        elif (path / JSON_NAME).exists():
            yield _of_data_set(arguments, path, runtime)
        else:
            yield _of_files(arguments, path, runtime)


def _of_run(
    arguments: argparse.Namespace, folder: RunFolder, runtime: "Runtime"
) -> Iterator[Subject]:
    config = _with_options(load_stored(folder.config), arguments)
    manifest = None
    if not config.evaluation.reference or config.training.conditional:
        manifest = open_data(config.data).manifest
    elif Path(config.data.path).exists():  # not needed, but it shows how the run's data are stored
        with suppress(UserError, UnavailableError):
            manifest = open_data(config.data).manifest
    truncation = arguments.truncation
    classes = describe_labels(manifest, config.training.conditional)
    evaluator = Evaluator(config.evaluation, config.data, manifest, runtime, truncation, classes)
    if arguments.checkpoint == _ALL:
        checkpoints = checkpoint_folders(folder.checkpoints)
    else:
        checkpoints = [select_checkpoint(folder, arguments.checkpoint)]
    if not checkpoints:
        raise UserError(f"{folder.path} has no checkpoint yet")
    for checkpoint in checkpoints:

        def images(checkpoint: Path = checkpoint) -> Images:
            if arguments.checkpoint == _ALL:
                runtime.run_on_main(lambda: _check_whole(checkpoint))
            generator, latent_dim, num_classes = load_run_generator(
                folder.path,
                arguments.weights,
                checkpoint,
                allow_changed_code=arguments.allow_changed_code,
            )
            seed = config.seed if arguments.seed is None else arguments.seed
            count = config.evaluation.samples
            labels = labels_for(manifest, count, num_classes)
            generator = generator.to(runtime.device)
            generator = truncated(generator, truncation, seed, latent_dim, labels)
            return GeneratedImages(generator, seed, count, latent_dim, labels)

        yield Subject(f"{folder.path}/{checkpoint.name}", evaluator, images)


def _check_whole(checkpoint: Path) -> None:
    """Raises UnusableCheckpointError for one that is damaged, or that training has removed."""
    if (reason := find_damage(checkpoint)) is not None:
        raise UnusableCheckpointError(f"{checkpoint} is damaged or no longer there ({reason})")


def _of_exported(arguments: argparse.Namespace, path: Path, runtime: "Runtime") -> Subject:
    generator = load_generator(path, allow_changed_code=arguments.allow_changed_code)
    channels, height, width = generator.sample_shape
    resolution = as_resolution(height, width)
    data = DataConfig(path=arguments.reference, resolution=resolution, channels=channels)
    config = _with_options(Config(data=data), arguments)
    count, seed, latent_dim = config.evaluation.samples, arguments.seed or 0, generator.latent_dim
    manifest = None
    if generator.num_classes and not arguments.reference.endswith(STATISTICS_SUFFIX):
        reference = open_data(data).manifest
        if reference is not None and reference.class_count == generator.num_classes:
            manifest = reference
    labels = labels_for(manifest, count, generator.num_classes)
    classes = describe_labels(manifest, generator.num_classes > 0)
    network, truncation = generator.network.to(runtime.device), arguments.truncation
    evaluator = Evaluator(config.evaluation, data, None, runtime, truncation, classes)

    def images() -> Images:
        made_by = truncated(network, truncation, seed, latent_dim, labels)
        return GeneratedImages(made_by, seed, count, latent_dim, labels)

    return Subject(str(path), evaluator, images)


def _of_data_set(arguments: argparse.Namespace, path: Path, runtime: "Runtime") -> Subject:
    manifest = Manifest.load(path)
    if manifest.resolution is None:
        raise UserError(f"the images in {path} have different sizes, or sizes that are not known")
    channels = 1 if are_gray(manifest, DataConfig(path=str(path))) else 3
    shape = channels, *manifest.resolution
    config = _for_images(arguments, path, shape, len(manifest.samples))
    evaluator = Evaluator(config.evaluation, config.data, None, runtime)

    def images() -> Images:
        chosen = chosen_samples(manifest, config.evaluation.samples)
        return DataSetImages(manifest, replace(config.data, path=str(path)), chosen)

    return Subject(str(path), evaluator, images)


def _of_files(arguments: argparse.Namespace, path: Path, runtime: "Runtime") -> Subject:
    source = list_images(str(path))
    if runtime.is_main:
        ignored = [f"{count:,} {kind} are not used" for kind, count in source.ignored.items()]
        for note in (*ignored, *source.notes):
            logger.warning("%s: %s", path, note)
    file = source.images[0]
    try:
        first = decode(image_reader(source.kind, source.path)(file), None, 3)
    except BadSampleError as error:
        raise UserError(f"{file.name} in {path} cannot be read: {error}") from error
    height, width, _ = first.shape
    shape = 1 if are_gray_files(source) else 3, height, width
    config = _for_images(arguments, path, shape, len(source.images))
    evaluator = Evaluator(config.evaluation, config.data, None, runtime)
    limit = arguments.samples or 0
    return Subject(str(path), evaluator, lambda: FileImages(source, shape, limit))


def _for_images(
    arguments: argparse.Namespace, path: Path, shape: tuple[int, int, int], count: int
) -> Config:
    """Settings for `count` images of this (channels, height, width) from elsewhere."""
    channels, height, width = shape
    resolution = as_resolution(height, width)
    data = DataConfig(path=arguments.reference, resolution=resolution, channels=channels)
    config = _with_options(Config(data=data, evaluation=EvaluationConfig(samples=count)), arguments)
    if config.evaluation.samples > count:
        raise UserError(f"{path} has {count:,} images, not {config.evaluation.samples:,}")
    return config


def _with_options(config: Config, arguments: argparse.Namespace) -> Config:
    """The config with `evaluation` as the options say."""
    metrics = arguments.metrics and [m.strip() for m in arguments.metrics.split(",") if m.strip()]
    given: dict[str, Any] = {
        "metrics": metrics,
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
    config = replace(config, evaluation=replace(config.evaluation, **changes))
    if config.evaluation.samples < 2:
        raise UserError("an evaluation needs at least 2 samples")
    return config
