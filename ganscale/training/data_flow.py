"""The batches that a cycle takes from the data order, and where in the order it begins.

Time is counted in images that the critic has seen; the generator's own real images are only read.
"""

from ganscale.errors import UserError
from ganscale.objectives.objective import Objective
from ganscale.schema import Config


def has_own_real_batch(config: Config) -> bool:
    """Whether the generator's step takes the batch after those of the critic's steps."""
    return config.training.generator_real == "fresh"


def batches_per_cycle(config: Config) -> int:
    """Global batches of the data order that a cycle takes."""
    return config.objective.n_critic + has_own_real_batch(config)


def data_position(config: Config, images_seen: int) -> int:
    """The position of the first image of a cycle that begins after so many images: how many the
    run has read until then.

    A run whose gradients stopped being finite may continue in the middle of a cycle.
    """
    batch = config.training.global_batch_size
    cycles = images_seen // (config.objective.n_critic * batch)
    return images_seen + cycles * batch * has_own_real_batch(config)


def check_data_flow(config: Config, objective: Objective) -> None:
    """Raises UserError for a real batch of the generator's that its loss would not use."""
    if has_own_real_batch(config) and not objective.loss.generator_needs_real:
        raise UserError(
            "`training.generator_real` must be critic: the generator's loss of "
            f"{config.objective.loss.name} needs no real images, as that of relativistic does"
        )
