"""The networks of a config: built from the seed, tried once, refused if they do not work."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ganscale.checkpoints.checkpoint import load_state, load_tensors, newest_checkpoint
from ganscale.config import load_stored
from ganscale.data.dataset import DataSet
from ganscale.errors import UserError
from ganscale.networks.build import build_network
from ganscale.networks.forward import buffers_restored
from ganscale.networks.normalization import GlobalBatchNorm, convert_global_batch_norm
from ganscale.randomness import derived_seed
from ganscale.run_folder import RunFolder
from ganscale.schema import Config
from ganscale.training.invariance_checks import check_forwards, check_layers


def build_networks(config: Config, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """(generator, critic), with the same weights on every rank; on the CPU, in float32.

    Raises UserError for networks that cannot be built, do not fit the data or each other, or with
    which a run would depend on its cluster.
    """
    generator, critic = build_unchecked_networks(config, num_classes)
    with seeded(config.seed, "trial"):
        _try(generator, critic, config, num_classes)
    return generator, critic


def build_unchecked_networks(config: Config, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """`build_networks` without a forward, so also on the meta device, without storage."""
    facts = {"sample_shape": sample_shape(config), "num_classes": num_classes}
    with seeded(config.seed, "initial weights"):
        generator = _build_generator(config, num_classes)
        critic = build_network("critic", config.critic.target, config.critic.options, **facts)
    check_layers(generator, critic)
    return convert_global_batch_norm(generator), critic


def load_run_generator(
    run_folder: Path, weights: str, checkpoint: Path | None = None
) -> tuple[nn.Module, int, int]:
    """(generator, latent_dim, number of classes) from a run's newest checkpoint, on the CPU.

    `weights`: "ema" or "generator"; `checkpoint`: a verified one to use in place of the newest.
    Raises UserError for a folder that is not a run folder or has no whole checkpoint.
    """
    folder = RunFolder(run_folder)
    folder.check_exists()
    if checkpoint is None:
        checkpoint = newest_checkpoint(folder.checkpoints, set_damaged_aside=False)
    if checkpoint is None:
        raise UserError(f"{run_folder} has no whole checkpoint yet")
    config = load_stored(folder.config)
    num_classes = load_state(checkpoint)["num_classes"]
    generator = _build_generator(config, num_classes)
    generator.load_state_dict(load_tensors(checkpoint, weights))
    return generator.eval(), config.generator.latent_dim, num_classes


def _build_generator(config: Config, num_classes: int) -> nn.Module:
    return build_network(
        "generator",
        config.generator.target,
        config.generator.options,
        latent_dim=config.generator.latent_dim,
        sample_shape=sample_shape(config),
        num_classes=num_classes,
    )


def sample_shape(config: Config) -> tuple[int, int, int]:
    return (config.data.channels, config.data.resolution, config.data.resolution)


def class_count(config: Config, data: DataSet) -> int:
    """The number of classes that the networks see, 0 in unconditional training.

    Raises UserError for conditional training on data without labels.
    """
    if not config.training.conditional:
        return 0
    if data.class_count == 0:
        raise UserError(
            "`training.conditional` needs class labels, but the shards in "
            f"{data.config.path} have none"
        )
    return data.class_count


@contextlib.contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Seeds torch's default generator with (seed, purpose), and restores it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, purpose))
        yield


@torch.no_grad()
def _try(generator: nn.Module, critic: nn.Module, config: Config, num_classes: int) -> None:
    """Forwards of four samples; raises UserError for networks that fail or do not fit."""
    labels = (torch.arange(4) % num_classes,) if num_classes else ()
    latents = torch.randn(4, config.generator.latent_dim)
    # In training mode but for batch norms, whose statistics need the other ranks' devices.
    norms = [module for module in generator.modules() if isinstance(module, GlobalBatchNorm)]
    for norm in norms:
        norm.eval()
    try:
        with buffers_restored(generator, critic):
            images = generator(latents, *labels)
            if tuple(images.shape) != (4, *sample_shape(config)):
                raise UserError(
                    f"generator {config.generator.target} makes samples of shape "
                    f"{tuple(images.shape[1:])}, the data has {sample_shape(config)}"
                )
            logits = critic(images, *labels)
            if not isinstance(logits, Tensor) or logits.ndim == 0 or len(logits) != 4:
                shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise UserError(
                    f"critic {config.critic.target} returns {shape} for a batch of 4: "
                    "it must be a tensor whose first dimension is the batch"
                )
            check_forwards(generator, critic, latents, images, labels)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"generator {config.generator.target} and critic {config.critic.target} do not run "
            f"together on {sample_shape(config)}: {' '.join(str(error).split())}"
        ) from error
    for norm in norms:
        norm.train()
