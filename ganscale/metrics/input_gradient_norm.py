"""The norm of the critic's gradient at real images, for objectives without a penalty on it."""

from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ganscale.metrics.meters import SQUARE
from ganscale.networks.batch_groups import batch_group_size, every_nth_group
from ganscale.networks.forward import buffers_restored, run_network
from ganscale.objectives.penalties import input_gradients, norms
from ganscale.random import drawing


def input_gradient_norm_meters(
    critic: nn.Module,
    real_images: Float[Tensor, "batch *sample"],
    labels: Int64[Tensor, " batch"] | None,
    precision: str,
    micro_batches: int,
    slots: Int64[Tensor, " batch"] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(means, maxima) of the norm of the critic's gradient at each of this rank's real images.

    One forward and one backward, in micro-batches as in training; changes no gradients or buffers.

    slots, seed: for what the critic draws; no slots for one that does not
    """
    lengths, size = [], batch_group_size(critic)
    with buffers_restored(critic):
        for index in range(micro_batches):
            part = partial(every_nth_group, first=index, n=micro_batches, group_size=size)
            with drawing(seed, ("input gradient norm",), None if slots is None else part(slots)):
                gradients = input_gradients(
                    partial(run_network, critic),
                    part(real_images),
                    None if labels is None else part(labels),
                    precision,
                    is_differentiable=False,
                )
            lengths.append(norms(gradients).double())
    length = torch.cat(lengths)
    name = "input_gradient_norm/real"
    means = {f"{name}_mean": length.mean(), f"{name}{SQUARE}": length.square().mean()}
    return means, {f"{name}_max": length.amax()}
