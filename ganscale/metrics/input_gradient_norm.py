"""How steep the critic is at real images, for objectives without a penalty that looks at it."""

from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.objectives.penalties import input_gradients, norms
from ganscale.training.steps import Meters, score


def input_gradient_norm_meters(
    critic: nn.Module,
    real_images: Float[Tensor, "batch *sample"],
    labels: Int64[Tensor, " batch"] | None,
    precision: str,
    parts: int,
) -> tuple[Meters, Meters]:
    """(means, maxima) of the norm of the critic's gradient at each of this rank's real images.

    One forward and one backward, in micro-batches as those of training. Gradients of weights are
    not touched, traces in buffers (running means) are undone.
    """
    buffers = list(critic.buffers())
    before = [buffer.clone() for buffer in buffers]
    found = []
    for part in range(parts):
        of_part = None if labels is None else labels[part::parts]
        images = real_images[part::parts]
        slopes = input_gradients(
            partial(score, critic), images, of_part, precision, is_differentiable=False
        )
        found.append(norms(slopes).double())
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    lengths = torch.cat(found)
    means = {
        "input_gradient_norm/real_mean": lengths.mean(),
        "input_gradient_norm/real_square": lengths.square().mean(),
    }
    return means, {"input_gradient_norm/real_max": lengths.amax()}
