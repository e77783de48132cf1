"""Tries networks before a run, and refuses those that fail or would depend on the cluster.

The names of a user's layers say little. So the trial takes whole steps, in the run's precision and
memory format, and then looks at what each network computes (`network_function`). That takes as long
as some eighty forwards in float64, so our own networks are left out: the tests look at those.
"""

import re
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ganscale.errors import GanscaleError, UserCodeError, UserError
from ganscale.importing import describe, users_line
from ganscale.networks.batch_groups import batch_group_size
from ganscale.networks.build import NETWORKS
from ganscale.networks.forward import default_dtype, update_spectral_norms
from ganscale.networks.normalization import batch_norms_in_evaluation
from ganscale.objectives.generator_penalties import GENERATOR_PENALTIES, path_noise
from ganscale.objectives.objective import Objective, scheduled_factors
from ganscale.objectives.penalties import PENALTIES, Draws, twice_differentiable_attention
from ganscale.runtime import autocast, is_of_machine, weights_dtype
from ganscale.schema import Config
from ganscale.training.critic_step import CriticStep
from ganscale.training.fast_forward import fast_forward
from ganscale.training.generator_step import GeneratorStep
from ganscale.training.hidden_state import HiddenState, seeded
from ganscale.training.network_function import (
    GROUPS,
    Subject,
    check_function,
    check_joint_backward,
    check_second_derivatives,
    refuse_change,
)
from ganscale.training.step_forwards import CRITIC_STEP, generator_draws, precisions
from ganscale.training.step_terms import StepOutput
from ganscale.training.style_trial import (
    check_forward_is_synthesis,
    check_second_derivatives_by_styles,
)

_HINTS = {
    "derivative for .* is not implemented|does not currently support double backward|"
    "trying to differentiate twice": "a gradient penalty differentiates it twice, and this "
    "operator has no second derivative",
    "use_reentrant": "checkpoint with use_reentrant=False",
    "not have been used in the graph|does not require grad": "its logits do not depend on the "
    "images: look for detach or no_grad in its forward",
}


def try_networks(
    generator: nn.Module,
    critic: nn.Module,
    config: Config,
    objective: Objective,
    num_classes: int,
    device: torch.device,
    ranks: int,
) -> None:
    """Raises UserError for networks that do not fit the data, each other or the objective, that
    fail, or that would depend on the cluster.

    It changes the networks, so they must not be those of the run. On all ranks at once.
    """
    dtype = weights_dtype(config.training.precision)
    for network in (generator, critic):
        network.to(device, dtype)
        update_spectral_norms(network)
        if config.training.memory_format == "channels_last":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = config.data.sample_shape
    with seeded(config.seed, "trial"):
        group_size = batch_group_size(generator, critic)
        batch = GROUPS * group_size
        latents = torch.randn(batch, config.generator.latent_dim).to(device, dtype)
        images = _different_images(batch, group_size, *shape).to(device, dtype)
        if config.training.memory_format == "channels_last":
            images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.arange(batch, device=device) % num_classes if num_classes else None
        slots = torch.arange(batch, device=device)
        shared = labels, config.training.precision
        names = f"generator {config.generator.target}", f"critic {config.critic.target}"
        subjects = (
            Subject(names[0], generator, latents, *shared, order=1, slots=slots),
            Subject(names[1], critic, images, *shared, order=2, slots=slots),
        )
        # No more images than in training, so that it needs no more memory.
        training = config.training
        micro_batch_size = training.global_batch_size // (ranks * training.accumulate)
        groups = min(GROUPS, micro_batch_size // group_size)
        count = max(1, groups) * group_size
        first, second = (each.rows(range(count // each.group_size)) for each in subjects)
        with batch_norms_in_evaluation(generator):
            _check_outputs(first, second, shape)
            if objective.generator_penalties:
                check_forward_is_synthesis(first)
        _rehearse(first, second, config, objective)
        _check_penalties(objective, images)
        with batch_norms_in_evaluation(generator):
            for role, subject in zip(("generator", "critic"), subjects, strict=True):
                if getattr(config, role).target in NETWORKS[role]:
                    continue
                subject = subject.rows(range(GROUPS)).in_float64()
                with default_dtype(subject.inputs.dtype):
                    check_function(subject)
                    if subject.order > 1 and objective.penalties:
                        check_second_derivatives(subject)
                        check_joint_backward(subject)
                    if subject.order == 1 and objective.generator_penalties:
                        check_forward_is_synthesis(subject)
                        check_second_derivatives_by_styles(subject)


def _different_images(batch: int, group_size: int, *shape: int) -> Tensor:
    """(batch, *shape) float32 in [-1, 1], of another contrast and brightness for each image of a
    group, and for each image at the same place of a group."""
    kinds = torch.tensor([[0.3, 0.9, 2.0, 0.6], [0.5, -0.8, 0.0, 1.2]])
    places = torch.arange(batch)
    contrast, brightness = kinds[:, (places // group_size + places % group_size) % 4]
    noise = torch.randn(batch, *shape)
    return (contrast.view(-1, 1, 1, 1) * noise + brightness.view(-1, 1, 1, 1)).tanh()


@torch.no_grad()
def _check_outputs(generator: Subject, critic: Subject, shape: tuple[int, int, int]) -> None:
    """The first forward of each network."""
    outputs, batch = [], len(critic.inputs)
    for subject in (generator, critic):
        before = HiddenState(subject.network)
        outputs.append(subject.run())
        # The first forward may set plain attributes, such as a size.
        refuse_change(subject, before.change(with_attributes=False))
    images, logits = outputs
    made = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    if made != (batch, *shape):
        made = made[1:] if isinstance(made, tuple) and made[:1] == (batch,) else made
        raise UserError(f"{generator.name} makes samples of shape {made}, the data has {shape}")
    if not isinstance(logits, Tensor) or logits.ndim == 0 or len(logits) != batch:
        shown = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"{critic.name} returns {shown} for a batch of {batch}: "
            "it must be a tensor whose first dimension is the batch"
        )
    if not logits.is_floating_point():
        raise UserError(f"{critic.name} returns {logits.dtype}: logits must be real numbers")


def _check_penalties(objective: Objective, images: Tensor) -> None:
    """Refuses users' penalties that are not means over images: micro-batches and ranks, of which
    each has a part of the images, would change them."""
    lengths = torch.tensor([0.3, 2.0, 0.7, 1.4]).to(images)
    noise = torch.randn(len(lengths), *images.shape[1:]).to(images)
    gradients = lengths.view(-1, 1, 1, 1) * noise / images[0].numel() ** 0.5
    average, found = lengths.mean(), {}
    for name, each in objective.penalties.items():
        if name not in PENALTIES:
            parts = [(part,) for part in (gradients, *gradients.split(2))]
            found[name] = [v for v, _ in _values(name, each.penalty.value_and_norms, parts)]
    for name, each in objective.generator_penalties.items():
        if name not in GENERATOR_PENALTIES:
            parts = [(part, average) for part in (lengths, *lengths.split(2))]
            found[name] = _values(name, each.penalty.value, parts)
    for name, (whole, *halves) in found.items():
        if whole.ndim:
            raise UserError(
                f"penalty {name} has the shape {tuple(whole.shape)}: it must be a scalar, the mean "
                "over the batch"
            )
        if not torch.isclose(whole, torch.stack(halves).mean(), rtol=1e-4, atol=0):
            raise UserError(
                f"penalty {name} is not the mean of a function of each image, so it would depend "
                "on the number of ranks and micro-batches: take the mean over the batch last"
            )


def _values(
    name: str, value: Callable[..., Any], arguments: Sequence[tuple[Tensor, ...]]
) -> list[Any]:
    """Raises UserCodeError for whatever a user's penalty raises."""
    try:
        return [value(*each) for each in arguments]
    except Exception as error:
        if is_of_machine(error):
            raise
        message = f"penalty {name} fails on a part of a batch: {describe(error)}"
        raise UserCodeError(message) from error


def _rehearse(generator: Subject, critic: Subject, config: Config, objective: Objective) -> None:
    """A critic step with all penalties and a generator step, forwards and backwards."""
    training, labels, images = config.training, critic.labels, critic.inputs
    of_both = objective, *precisions(training)
    critic_step = CriticStep(critic.network, *of_both)
    generator_step = GeneratorStep(generator.network, critic.network, *of_both)
    slots = critic.slots
    penalties, zero = objective.generator_penalties, torch.zeros((), device=images.device)
    of_penalties = {
        "path_noise": path_noise(config.seed, slots, images) if penalties else None,
        "mean_lengths": dict.fromkeys(penalties, zero),
        "factors": scheduled_factors(penalties, images_seen=0),
    }

    def take_critic_step() -> StepOutput:
        draws = generator_draws(0, CRITIC_STEP, slots)
        with torch.no_grad(), autocast(images.device, training.precision), draws:
            fakes = fast_forward(generator.network, False)(generator.inputs, labels)
        fakes = fakes.to(images.dtype)
        points = objective.penalty_points(images, fakes, Draws(config.seed, slots), update=0)
        factors = scheduled_factors(objective.penalties, images_seen=0)
        return critic_step(images, fakes, labels, points, factors=factors, slots=slots)

    def take_generator_step() -> StepOutput:
        return generator_step(generator.inputs, images, labels, slots=slots, **of_penalties)

    before = HiddenState(generator.network), HiddenState(critic.network)
    _differentiate(critic, take_critic_step, twice=True)
    _differentiate(generator, take_generator_step, twice=bool(penalties))
    for subject, state in zip((generator, critic), before, strict=True):
        refuse_change(subject, state.change())


def _differentiate(subject: Subject, take_step: Callable[[], StepOutput], *, twice: bool) -> None:
    parameters = [p for p in subject.network.parameters() if p.requires_grad]
    if not parameters:
        raise UserError(f"{subject.name} has no weights to train")
    try:
        with twice_differentiable_attention(twice):
            take_step().loss.backward(inputs=parameters)
    except GanscaleError:
        raise
    except Exception as error:
        if is_of_machine(error):
            raise
        hints = [hint for pattern, hint in _HINTS.items() if re.search(pattern, str(error))]
        hint = f"; {hints[0]}" if hints else ""
        place = _place_of_failure(take_step, parameters)
        message = f"{subject.name} cannot be trained: {describe(error)}{place}{hint}"
        raise UserCodeError(message) from error
    for parameter in parameters:
        parameter.grad = None


def _place_of_failure(take_step: Callable[[], StepOutput], parameters: list[nn.Parameter]) -> str:
    """` (file:line)`: where the user's code called what failed in the backward; "" if unknown."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.autograd.detect_anomaly(check_nan=False):
                take_step().loss.backward(inputs=parameters)
        except Exception:  # the same as before; torch has warned of the place
            pass
    text = "\n".join(str(warning.message) for warning in caught)
    frames = [
        traceback.FrameSummary(file, int(line), "")
        for file, line in re.findall(r'File "([^"]+)", line (\d+)', text)
    ]
    place = users_line(frames)
    return "" if place is None else f" ({place})"
