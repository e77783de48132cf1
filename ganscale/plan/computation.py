"""How much a run computes, and how long that takes on GPUs that reach a given speed."""

from torch import nn

from ganscale.objectives.objective import Objective
from ganscale.plan.meta_device import meta_device
from ganscale.plan.sections import Computation
from ganscale.schema import Config
from ganscale.training.flops import count_cycle_flops

USUAL_TFLOPS = 62.0  # a fifth of an A100's peak in bfloat16
_SECONDS_PER_DAY = 86_400


def computation(
    config: Config,
    objective: Objective,
    generator: nn.Module,
    critic: nn.Module,
    num_classes: int,
    ranks: int,
    gpu_tflops: float | None,
) -> Computation | None:
    """gpu_tflops: that a GPU reaches, by default USUAL_TFLOPS

    None for networks whose operations cannot be counted.
    """
    with meta_device(ranks=1):
        cycle_flops = count_cycle_flops(config, objective, generator, critic, num_classes)
    if not cycle_flops:
        return None
    per_image = cycle_flops / (config.objective.n_critic * config.training.global_batch_size)
    flops = per_image * config.training.total_images
    tflops = USUAL_TFLOPS if gpu_tflops is None else gpu_tflops
    days = flops / (ranks * tflops * 1e12) / _SECONDS_PER_DAY
    return Computation(per_image, flops, {f"{tflops:g} TFLOP/s": days})
