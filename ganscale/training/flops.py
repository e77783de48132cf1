"""Counts the floating point operations of a cycle, once, on copies of the networks."""

import copy
import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ganscale.networks.batch_groups import batch_group_size
from ganscale.networks.forward import run_network
from ganscale.networks.normalization import GlobalBatchNorm
from ganscale.objectives.losses import wgan
from ganscale.objectives.objective import Objective, scheduled_factors
from ganscale.objectives.penalties import Draws, Penalty
from ganscale.schema import Config
from ganscale.training.critic_step import CriticStep
from ganscale.training.generator_step import GeneratorStep
from ganscale.training.step_forwards import CRITIC_STEP, generator_draws

_GROUPS = 2  # of images; without groups, these are single ones
_COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional")

logger = logging.getLogger(__name__)


def count_cycle_flops(
    config: Config, objective: Objective, generator: nn.Module, critic: nn.Module, num_classes: int
) -> float | None:
    """Operations of a cycle, on all ranks together: matrix products and convolutions in forwards,
    backwards and penalties. A multiply-add counts as two, a lazy penalty by how often it is taken.

    None for networks that cannot be copied or cannot take two images, and those with a collective
    in their forward or backward: counting must not wait for other ranks.
    """
    try:
        copies = copy.deepcopy(generator), copy.deepcopy(critic)
        batch = _GROUPS * batch_group_size(*copies)
        counted = _count_step_flops(config, objective, *copies, num_classes, batch)
    except Exception as error:  # user-defined networks may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        logger.info("operations are not counted: %s", reason)
        return None
    critic_step, generator_step = counted
    batches = config.training.global_batch_size / batch
    return batches * (config.objective.n_critic * critic_step + generator_step)


def _count_step_flops(
    config: Config,
    objective: Objective,
    generator: nn.Module,
    critic: nn.Module,
    num_classes: int,
    batch: int,
) -> tuple[float, float]:
    """(of a critic step, of a generator step), for `batch` images; changes the networks."""
    for module in (*generator.modules(), *critic.modules()):
        module._forward_pre_hooks.clear()  # meant for the original networks, not for copies
        module._forward_hooks.clear()
        if isinstance(module, GlobalBatchNorm):
            module.eval()
    like = next(generator.parameters())
    latents = like.new_zeros(batch, config.generator.latent_dim)
    real, fake = (like.new_zeros(batch, *config.data.sample_shape) for _ in range(2))
    slots = torch.arange(batch, device=like.device)
    labels = torch.zeros_like(slots) if num_classes else None
    # The loss is only a few operations per image, and may need the other ranks.
    plain = dataclasses.replace(objective, loss=wgan())
    critic_step = CriticStep(critic, plain, "float32", joins_forwards=False)
    factors = scheduled_factors(objective.penalties, images_seen=0)

    trained = [p for p in critic.parameters() if p.requires_grad]

    def critic_flops(points: dict[str, Tensor]) -> int:
        with _FlopCounter() as counter:
            loss = critic_step(real, fake, labels, points, factors=factors, slots=slots).loss
            loss.backward(inputs=trained)
        return counter.flops

    without_penalties = critic_flops({})
    of_critic = float(without_penalties)
    for name, weighted in objective.penalties.items():
        points = {name: _points(weighted.penalty, real, fake)}
        of_critic += (critic_flops(points) - without_penalties) / weighted.interval
    draws = generator_draws(0, CRITIC_STEP, slots)
    with _FlopCounter() as fakes, torch.no_grad(), draws:
        run_network(generator, latents, labels)
    step = GeneratorStep(generator, critic, plain, "float32", joins_forwards=False)
    needs_real, penalties = objective.loss.generator_needs_real, objective.generator_penalties
    factors = scheduled_factors(penalties, images_seen=0)

    def generator_flops(mean_lengths: dict[str, Tensor]) -> int:
        more = {"path_noise": fake, "mean_lengths": mean_lengths, "factors": factors}
        more |= {"with_real_logits": needs_real, "slots": slots}
        with _FlopCounter() as counter:
            loss = step(latents, real, labels, **more).loss
            loss.backward(inputs=[p for p in generator.parameters() if p.requires_grad])
        return counter.flops

    without_penalties = generator_flops({})
    of_generator = float(without_penalties)
    if penalties:  # those that are due together share their gradient
        interval = min(penalty.interval for penalty in penalties.values())
        lengths = dict.fromkeys(penalties, like.new_zeros(()))
        of_generator += (generator_flops(lengths) - without_penalties) / interval
    reused = fakes.flops if config.training.reuse_fakes else 0  # the generator step makes none
    return of_critic + fakes.flops, of_generator - reused


def _points(penalty: Penalty, real: Tensor, fake: Tensor) -> Tensor:
    """Where the penalty is taken: it matters only whether that is at one of these images."""
    slots = torch.arange(len(real), device=real.device)
    try:
        with _FlopCounter():
            return penalty.points(real, fake, Draws(0, slots))
    except RuntimeError:  # points from all ranks' images
        return real.clone()


class _FlopCounter(TorchDispatchMode):
    """Sums torch's formulas for each operator; its FlopCounterMode fails on gradient penalties.

    Raises RuntimeError for a collective: the other ranks do not take part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace in _COLLECTIVES:
            raise RuntimeError(f"{func.overloadpacket} in a network would wait for other ranks")
        output = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.flops += _convolution_backward_flops(*args)
        elif func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=output)
        return output


def _convolution_backward_flops(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> int:
    """As many for each of the two gradients as for the forward; torch's formula takes grouped
    convolutions for dense ones."""
    *_, is_transposed, _, _, output_mask = rest
    pixels_and_channels = input.numel() if is_transposed else grad.numel()
    return 2 * sum(output_mask[:2]) * pixels_and_channels * weight[0].numel()
