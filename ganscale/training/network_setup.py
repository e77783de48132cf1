"""The networks of a config: built from the seed, tried once, refused if they do not work."""

import copy
from pathlib import Path

import torch
from torch import nn

from ganscale.checkpoints.checkpoint import load_state, load_tensors, newest_checkpoint
from ganscale.config import load_stored
from ganscale.data.dataset import DataSet
from ganscale.errors import UserCodeError, UserError, is_out_of_memory
from ganscale.importing import describe
from ganscale.networks.build import build_network, find_network
from ganscale.networks.fingerprint import fingerprint
from ganscale.networks.normalization import convert_global_batch_norm
from ganscale.objectives.objective import Objective
from ganscale.run_folder import RunFolder
from ganscale.schema import Config
from ganscale.secrets import without_secrets
from ganscale.training.hidden_state import seeded
from ganscale.training.invariance_checks import check_groups, check_layers
from ganscale.training.network_trial import try_networks
from ganscale.training.style_trial import check_penalized_layers


def build_networks(
    config: Config, objective: Objective, num_classes: int, device: torch.device, ranks: int = 1
) -> tuple[nn.Module, nn.Module]:
    """(generator, critic), with the same weights on every rank; on the CPU, in float32.

    device: where they will be trained, and are tried; ranks: on how many

    Raises UserError for networks that cannot be built, do not fit the data or each other, or with
    which a run would depend on its cluster.
    """
    networks = build_unchecked_networks(config, num_classes)
    others = copies_of(*build_unchecked_networks(config, num_classes))
    for role, network, other in zip(("generator", "critic"), networks, others, strict=True):
        if not _has_same_weights(network, other):
            raise UserError(
                f"two {role}s of the same seed have different initial weights: the constructor of "
                f"{getattr(config, role).target} must draw from the default generators of torch, "
                "Python's random or numpy.random only, and keep nothing between two calls"
            )
    check_groups(config, *networks, ranks)
    try_networks(*others, config, objective, num_classes, device, ranks)
    return networks


def copies_of(generator: nn.Module, critic: nn.Module) -> tuple[nn.Module, nn.Module]:
    """For the trial, which changes weights: two builds may share some, such as a backbone's."""
    copies = []
    for network in (generator, critic):
        try:
            copies.append(copy.deepcopy(network))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            kind = type(network).__name__
            raise UserCodeError(f"a {kind} cannot be copied: {describe(error)}") from error
    return copies[0], copies[1]


def _has_same_weights(network: nn.Module, other: nn.Module) -> bool:
    tensors, others = (
        dict([*each.named_parameters(), *each.named_buffers()]) for each in (network, other)
    )
    return tensors.keys() == others.keys() and all(
        torch.equal(tensor.nan_to_num(), others[name].nan_to_num())
        for name, tensor in tensors.items()
    )


def build_unchecked_networks(config: Config, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """`build_networks` without a forward, so also on the meta device, without storage."""
    facts = {"sample_shape": config.data.sample_shape, "num_classes": num_classes}
    for role in ("generator", "critic"):  # a module may draw numbers when it is imported
        find_network(role, getattr(config, role).target)
    with seeded(config.seed, "initial weights"):
        generator = _build_generator(config, num_classes)
        critic = build_network("critic", config.critic.target, config.critic.options, **facts)
    check_layers(generator, critic)
    check_penalized_layers(generator, config.objective)
    return convert_global_batch_norm(generator), critic


def load_run_generator(
    run_folder: Path,
    weights: str,
    checkpoint: Path | None = None,
    *,
    allow_changed_code: bool = False,
) -> tuple[nn.Module, int, int]:
    """(generator, latent_dim, number of classes) from a run's newest checkpoint, on the CPU.

    weights: "ema" or "generator"
    checkpoint: a verified one to use in place of the newest
    allow_changed_code: also if the generator now computes something else than when it was saved

    Raises UserError for a folder that is not a run folder or has no whole checkpoint, and for
    weights that do not fit the code.
    """
    folder = RunFolder(run_folder)
    folder.check_exists()
    if checkpoint is None:
        checkpoint = newest_checkpoint(folder.checkpoints, set_damaged_aside=False)
    if checkpoint is None:
        raise UserError(f"{run_folder} has no whole checkpoint yet")
    config = load_stored(folder.config)
    state = load_state(checkpoint)
    num_classes, latent_dim = state["num_classes"], config.generator.latent_dim
    generator = _build_generator(config, num_classes)
    target = config.generator.target
    try:
        generator.load_state_dict(load_tensors(checkpoint, weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{checkpoint}: the weights do not fit {target} ({reason})") from error
    if "fingerprints" in state and not allow_changed_code:
        stored = state["fingerprints"].get(weights)
        found = fingerprint(generator, (latent_dim,), num_classes)
        found.check(stored, f"generator {target}", "--allow-changed-code")
    return generator.eval(), latent_dim, num_classes


def _build_generator(config: Config, num_classes: int) -> nn.Module:
    return build_network(
        "generator",
        config.generator.target,
        config.generator.options,
        latent_dim=config.generator.latent_dim,
        sample_shape=config.data.sample_shape,
        num_classes=num_classes,
    )


def class_count(config: Config, data: DataSet) -> int:
    """The number of classes that the networks see, 0 in unconditional training.

    Raises UserError for conditional training on data without labels.
    """
    if not config.training.conditional:
        return 0
    if data.class_count == 0:
        raise UserError(
            "`training.conditional` needs class labels, but the shards in "
            f"{without_secrets(data.config.path)} have none"
        )
    return data.class_count
