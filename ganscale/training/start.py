"""What a run starts with: described in a few lines, or tried without training."""

from pathlib import Path

import torch
from torch import nn

from ganscale.checkpoints.checkpoint import images_seen_of, newest_checkpoint
from ganscale.config import Resolved
from ganscale.data.dataset import DataSet, open_data
from ganscale.networks.build import parameter_count
from ganscale.objectives.clipping import clipped_parameters
from ganscale.objectives.objective import build_objective
from ganscale.run_folder import RunFolder
from ganscale.runtime import has_slow_bfloat16, launcher_number
from ganscale.schema import Config
from ganscale.secrets import without_secrets
from ganscale.tracking.wandb_mode import resolve_mode
from ganscale.training.augmentation import check_augmentation
from ganscale.training.captured_steps import captures_steps
from ganscale.training.data_flow import check_data_flow
from ganscale.training.evaluations import check_evaluations
from ganscale.training.invariance_checks import check_batch_divides
from ganscale.training.network_setup import build_networks, class_count
from ganscale.training.resume import check_settings


def describe_start(
    config: Config,
    data: DataSet,
    generator: nn.Module,
    critic: nn.Module,
    device: torch.device,
    ranks: int,
    resumed_at: int | None,
) -> list[str]:
    """Lines on device, data, networks, and on where the run is stored and begins."""
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    samples = f"{len(data.urls):,} shards, streamed without a manifest"
    if data.manifest is not None:
        samples = f"{len(data.manifest.samples):,} samples"
    classes = f"{data.class_count:,} classes" if data.class_count else "no classes"
    height, width = config.data.size
    size = f"{height} x {width} x {config.data.channels}"
    networks = [
        f"{role} {network.target} with {parameter_count(module):,} parameters"
        for role, network, module in (
            ("generator", config.generator, generator),
            ("critic", config.critic, critic),
        )
    ]
    total = f"{config.training.total_images:,} images"
    if resumed_at is None:
        start = "starts at 0 of"
    elif resumed_at < config.training.total_images:
        start = f"continues at {resumed_at:,} of"
    else:
        start = f"has {resumed_at:,} images already, and is asked for"
    return [
        f"device:     {ranks:,} rank{'s' * (ranks > 1)} on {device.type}{name}",
        *_slow_precision(config, device),
        f"data:       {without_secrets(config.data.path)}: {samples}, {classes}, {size} pixels",
        f"networks:   {', '.join(networks)}",
        f"run:        {Path(config.run.folder) / config.run.name} {start} {total}",
    ]


def _slow_precision(config: Config, device: torch.device) -> list[str]:
    networks = config.generator, config.critic
    uses_bfloat16 = config.training.precision == "bfloat16" or any(
        network.options.get("bfloat16_stages") for network in networks
    )
    if not uses_bfloat16 or not has_slow_bfloat16(device):
        return []
    software = f"this {device.type} computes it in software, often much more slowly than float32"
    return [f"precision:  bfloat16, but {software}"]


def try_start(resolved: Resolved) -> list[str]:
    """Makes everything that a run needs but its folder, and returns the lines that it would start
    with. Raises UserError for what `train` would refuse."""
    config, ranks = resolved.config, launcher_number("WORLD_SIZE", 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    captures_steps(config, device, ranks)
    if config.log.wandb == "online":
        resolve_mode("online")
    check_batch_divides(config.training, ranks)
    objective = build_objective(config.objective)
    check_augmentation(config, objective)
    check_data_flow(config, objective)
    data = open_data(config.data)
    data.check(1.0)
    num_classes = class_count(config, data)
    networks = build_networks(config, objective, num_classes, torch.device("cpu"), ranks)
    if objective.clip is not None:
        clipped_parameters(networks[1], objective.clip.scope)
    check_evaluations(config, data)
    folder = RunFolder(Path(config.run.folder) / config.run.name)
    check_settings(folder, config, data.fingerprint)
    checkpoint = newest_checkpoint(folder.checkpoints, set_damaged_aside=False)
    resumed_at = None if checkpoint is None else images_seen_of(checkpoint)
    return describe_start(config, data, *networks, device, ranks, resumed_at)
