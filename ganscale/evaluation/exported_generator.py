"""A trained generator in a folder, to be used without its run.

    images = ganscale.load_generator("faces").sample(16, seed=0)

`generator.safetensors` holds the weights, `generator.json` the network's class and arguments.
Nothing is unpickled, and an import path in the JSON must lead to a network's class.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ganscale.checkpoints.checkpoint import save_tensors
from ganscale.errors import UserError
from ganscale.evaluation.sampling import (
    generate_images,
    sample_labels,
    sample_latents,
    sampling_draws,
)
from ganscale.evaluation.truncation import truncated
from ganscale.files import atomic_folder, sha256
from ganscale.networks.build import build_network
from ganscale.networks.fingerprint import Fingerprint, fingerprint

WEIGHTS = "generator.safetensors"
DESCRIPTION = "generator.json"
_FORMAT = 1
_FIELDS = {  # of the JSON
    "target": str,
    "options": dict,
    "latent_dim": int,
    "sample_shape": list,
    "num_classes": int,
    "about": dict,
    "sha256": str,
}


class ExportedGenerator(nn.Module):
    """A generator in evaluation mode that draws its own latents.

    sample_shape: (channels, height, width)
    num_classes: 0 if unconditional
    about: the run, images seen and weights it comes from
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

    def forward(self, latents: Tensor, labels: Tensor | None = None, *, seed: int = 0) -> Tensor:
        """(batch, latent_dim) standard normal latents, and (batch,) classes if the generator is
        conditional -> (batch, channels, height, width), where [-1, 1] is black to white.
        Generators without tanh, such as `r3gan` and `stylegan2`, also go beyond: `clamp(-1, 1)`.

        seed: of what the generator draws itself, such as noise; the numbers of an image depend on
            the seed and on its place in the batch
        """
        positions = torch.arange(len(latents), device=latents.device)
        with sampling_draws(seed, positions):
            return self.network(latents) if labels is None else self.network(latents, labels)

    def sample(
        self,
        count: int,
        seed: int = 0,
        labels: int | Sequence[int] | Tensor | None = None,
        truncation: float = 1.0,
    ) -> Float[Tensor, "count channels height width"]:
        """The images that `ganscale sample` makes with this seed, as float32 in [-1, 1] on the CPU.

        labels: one class for all images, or (count,) classes; by default all classes in turn
        truncation: pulls styles towards their mean, which is 0; 1 leaves them as they are
        Raises UserError for a count below 1, for unknown classes, and for a truncation of a
        generator without styles.
        """
        if count < 1:
            raise UserError(f"the count of samples must be at least 1, not {count}")
        latents = sample_latents(seed, 0, count, self.latent_dim)
        classes = self._classes(count, labels)
        network = truncated(self.network, truncation, seed, self.latent_dim, classes)
        chunks = generate_images(network, latents, classes, seed=seed)
        return torch.cat([chunk.float().cpu().clamp(-1, 1) for chunk in chunks])

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
    """Writes `generator`, which was built from `target` and the arguments after it, and loads it
    again to verify the export.

    Raises UserError if the folder exists and is not empty, or the export cannot be loaded.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists; export into another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as unfinished:
        # safetensors supports neither channels-last strides nor tied weights.
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
            "sha256": sha256(unfinished / WEIGHTS),
            "fingerprint": fingerprint(generator, (latent_dim,), num_classes).to_json(),
        }
        (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        load_generator(unfinished)


def load_generator(folder: str | Path, *, allow_changed_code: bool = False) -> ExportedGenerator:
    """The generator in a folder that `ganscale checkpoint export` wrote, on the CPU.

    A network of your own must be a class that can be imported from the path it was trained with.
    allow_changed_code: also if that class now computes something else
    Raises UserError if the folder does not contain an undamaged generator.
    """
    folder = Path(folder)
    try:
        description = _read_description(folder)
        if sha256(folder / WEIGHTS) != description["sha256"]:
            raise UserError(f"{folder / WEIGHTS} is damaged: its checksum differs")
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} does not contain an exported generator: {error}") from error
    target, options, about = (description[name] for name in ("target", "options", "about"))
    shapes = {name: description[name] for name in ("latent_dim", "sample_shape", "num_classes")}
    network = build_network("generator", target, options, **shapes)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{folder}: the weights do not fit {target} ({' '.join(str(error).split())[:300]})"
        ) from error
    exported = ExportedGenerator(network, **shapes, about=about)
    stored = description["fingerprint"]
    if stored is not None and not allow_changed_code:
        found = fingerprint(network, (shapes["latent_dim"],), shapes["num_classes"])
        found.check(stored, f"generator {target}", "allow_changed_code=True")
    return exported


def _read_description(folder: Path) -> dict[str, Any]:
    description = json.loads((folder / DESCRIPTION).read_text())
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ValueError(f"{DESCRIPTION} is not of format {_FORMAT}")
    for name, kind in _FIELDS.items():
        if not isinstance(description.get(name), kind):
            raise ValueError(f"{DESCRIPTION} has no {kind.__name__} `{name}`")
    if [type(size) for size in description["sample_shape"]] != [int] * 3:
        raise ValueError(f"{DESCRIPTION}: `sample_shape` is not channels, height and width")
    stored = description.get("fingerprint")  # exports by older versions have none
    if stored is not None:
        Fingerprint.from_json(stored)
    shape = tuple(description["sample_shape"])
    return description | {"sample_shape": shape, "fingerprint": stored}
