"""A trained generator as a folder of its own, for use elsewhere: weights and how to build it.

    from ganscale import load_generator

    generator = load_generator("faces")
    images = generator.sample(16, seed=0)

`generator.safetensors` holds the weights, `generator.json` what builds the network around them.
Nothing is unpickled, and of an import path in the JSON nothing is called but a network's class.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ganscale.errors import UserError
from ganscale.evaluation.sampling import generate_images, sample_labels, sample_latents
from ganscale.files import save_tensors
from ganscale.importing import find
from ganscale.networks.build import GENERATORS, build_generator

WEIGHTS = "generator.safetensors"
DESCRIPTION = "generator.json"
_FORMAT = 1
_RECIPE = ("target", "options", "latent_dim", "sample_shape", "num_classes")


class ExportedGenerator(nn.Module):
    """A generator in evaluation mode that knows what to feed itself.

    latent_dim: length of a latent
    sample_shape: (channels, height, width)
    num_classes: 0 for an unconditional one
    about: run, images seen and weights that it comes from
    """

    def __init__(
        self,
        network: nn.Module,
        latent_dim: int,
        sample_shape: tuple[int, int, int],
        num_classes: int,
        about: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.network = network
        self.latent_dim = latent_dim
        self.sample_shape = sample_shape
        self.num_classes = num_classes
        self.about = dict(about)
        self.eval()

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """(batch, latent_dim) standard normal latents, and (batch,) classes of a conditional
        generator -> (batch, channels, height, width) in [-1, 1]."""
        return self.network(latents) if labels is None else self.network(latents, labels)

    def sample(
        self, count: int, seed: int = 0, labels: int | Sequence[int] | Tensor | None = None
    ) -> Float[Tensor, "count channels height width"]:
        """The images that `ganscale sample` makes with this seed, as float32 in [-1, 1] on the CPU.

        labels: a class for all or (count,) classes; by default all classes in turn
        Raises UserError for a count below 1 and for classes that there are not.
        """
        if count < 1:
            raise UserError(f"the count of samples must be at least 1, not {count}")
        latents = sample_latents(seed, 0, count, self.latent_dim)
        classes = self._classes(count, labels)
        return torch.cat([i.float().cpu() for i in generate_images(self, latents, classes)])

    def _classes(self, count: int, labels: int | Sequence[int] | Tensor | None) -> Tensor | None:
        if labels is None:
            return sample_labels(0, count, self.num_classes)
        if self.num_classes == 0:
            raise UserError("labels were given, but this generator has no classes")
        if isinstance(labels, int):
            labels = [labels] * count
        classes = torch.as_tensor(labels)
        if classes.shape != (count,) or classes.is_floating_point():
            raise UserError(f"labels must be one class, or {count} of them, not {labels}")
        if int(classes.min()) < 0 or int(classes.max()) >= self.num_classes:
            raise UserError(f"this generator has classes 0 to {self.num_classes - 1}, not {labels}")
        return classes.long()


def export_generator(
    folder: Path,
    generator: nn.Module,
    *,
    target: str,
    options: Mapping[str, Any],
    latent_dim: int,
    sample_shape: tuple[int, int, int],
    num_classes: int,
    about: Mapping[str, Any],
) -> None:
    """Writes `generator`, which `target` and the rest built, so that `load_generator` finds it.

    Raises UserError for a folder with something in it, and where it cannot be loaded again.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; export into another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        # Copies: safetensors knows neither channels-last strides nor tied weights.
        tensors = {k: v.cpu().clone().contiguous() for k, v in generator.state_dict().items()}
        save_tensors(unfinished / WEIGHTS, tensors)
        description = {
            "format": _FORMAT,
            "target": target,
            "options": dict(options),
            "latent_dim": latent_dim,
            "sample_shape": list(sample_shape),
            "num_classes": num_classes,
            "about": dict(about),
            "sha256": _sha256(unfinished / WEIGHTS),
        }
        (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        load_generator(unfinished)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load_generator(folder: str | Path) -> ExportedGenerator:
    """The generator in a folder that `ganscale checkpoint export` wrote; on the CPU.

    A network of the user's own has to be a class that can be imported under the path it was trained
    with. Raises UserError for a folder without a whole generator.
    """
    folder = Path(folder)
    try:
        recipe = _read_recipe(folder)
        if _sha256(folder / WEIGHTS) != recipe["sha256"]:
            raise UserError(f"{folder / WEIGHTS} is damaged: its checksum is another")
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} holds no exported generator: {error}") from error
    given = {name: recipe[name] for name in _RECIPE}
    given["sample_shape"] = channels, height, width = tuple(given["sample_shape"])
    _refuse_all_but_networks(given["target"])
    network = build_generator(given.pop("target"), given.pop("options"), **given)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{folder}: the weights are not those of {recipe['target']} "
            f"({' '.join(str(error).split())[:300]})"
        ) from error
    return ExportedGenerator(
        network,
        recipe["latent_dim"],
        (channels, height, width),
        recipe["num_classes"],
        recipe["about"],
    )


def _read_recipe(folder: Path) -> dict[str, Any]:
    recipe = json.loads((folder / DESCRIPTION).read_text())
    if not isinstance(recipe, dict) or recipe.get("format") != _FORMAT:
        raise ValueError(f"{DESCRIPTION} is not of format {_FORMAT}")
    kinds = (str, dict, int, list, int, dict, str)
    for name, kind in zip((*_RECIPE, "about", "sha256"), kinds, strict=True):
        if not isinstance(recipe.get(name), kind):
            raise ValueError(f"{DESCRIPTION} has no {kind.__name__} `{name}`")
    if [type(size) for size in recipe["sample_shape"]] != [int] * 3:
        raise ValueError(f"{DESCRIPTION}: `sample_shape` is not channels, height and width")
    return recipe


def _refuse_all_but_networks(target: str) -> None:
    """A folder from elsewhere must not call whatever can be imported here."""
    found = find(target, GENERATORS, "network")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(
            f"{target} is no class of torch.nn.Module: only such a generator is built from an "
            "exported folder"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
