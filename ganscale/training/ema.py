"""The EMA generator: an exponential moving average of the weights, used for sampling."""

import copy

import torch
from torch import nn


def ema_copy(generator: nn.Module) -> nn.Module:
    """A frozen copy of `generator`, in evaluation mode."""
    return copy.deepcopy(generator).requires_grad_(False).eval()


def ema_decay(images: int, images_seen: int, half_life_images: float, ramp_up: float) -> float:
    """The weight that the EMA keeps over `images` images: 0.5 ** (images / half-life).

    The half-life is at most `ramp_up` times the images seen, so that the EMA soon forgets the
    initial weights (Karras et al. 2020, the training of StyleGAN2-ADA).
    """
    half_life = min(half_life_images, ramp_up * images_seen)
    return 0.5 ** (images / half_life) if half_life > 0 else 0.0


@torch.no_grad()
def update_ema(ema: nn.Module, generator: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * generator, in one fused call; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(generator.parameters()), 1 - decay)
    if buffers := list(ema.buffers()):
        torch._foreach_copy_(buffers, list(generator.buffers()))
