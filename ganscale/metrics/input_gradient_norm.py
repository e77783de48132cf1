"""The norm of the critic's gradient at real images, for objectives without a penalty on it."""

from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.networks.buffers import buffers_restored
from ganscale.networks.forward import run_critic
from ganscale.objectives.penalties import input_gradients, norms

Meters = dict[str, Tensor]


def input_gradient_norm_meters(
    critic: nn.Module,
    real_images: Float[Tensor, "batch *sample"],
    labels: Int64[Tensor, " batch"] | None,
    precision: str,
    micro_batches: int,
) -> tuple[Meters, Meters]:
    """(means, maxima) of the norm of the critic's gradient at each of this rank's real images.

    One forward and one backward, in micro-batches as in training. The gradients of weights are not
    touched, and changes to buffers (running means) are undone.
    """
    lengths = []
    with buffers_restored(critic):
        for index in range(micro_batches):
            gradients = input_gradients(
                partial(run_critic, critic),
                real_images[index::micro_batches],
                None if labels is None else labels[index::micro_batches],
                precision,
                is_differentiable=False,
            )
            lengths.append(norms(gradients).double())
    length = torch.cat(lengths)
    means = {
        "input_gradient_norm/real_mean": length.mean(),
        "input_gradient_norm/real_square": length.square().mean(),
    }
    return means, {"input_gradient_norm/real_max": length.amax()}
