"""The generator of a run, from one of its checkpoints."""

from pathlib import Path

from torch import nn

from ganscale.checkpoints.checkpoint import load_state, load_tensors, newest_checkpoint
from ganscale.config import load_stored
from ganscale.errors import UserError
from ganscale.run_folder import RunFolder
from ganscale.training.network_setup import build_generator_of


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
    generator = build_generator_of(config, num_classes)
    generator.load_state_dict(load_tensors(checkpoint, weights))
    return generator.eval(), config.generator.latent_dim, num_classes
