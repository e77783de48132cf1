"""Tries networks before a run, and refuses those that fail or would depend on the cluster.

The names of a user's layers tell little. So the trial takes whole steps, in the run's precision and
memory format, and then looks at what each network computes, in float64, for very different images,
and with weights moved away from their initial values, which may hide a layer behind a zero:

- A forward changes nothing and draws nothing: repeated, it gives the same output.
- The derivative of one image's output with respect to another image is exactly zero.
- An image's output and derivative are the same with other images around it, at another place in the
  batch, and alone.

The generator's batch norms, which span all ranks, are in evaluation meanwhile.
"""

import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ganscale.errors import GanscaleError, UserCodeError, UserError
from ganscale.importing import describe, users_line
from ganscale.networks.forward import run_network, update_spectral_norms
from ganscale.networks.normalization import GlobalBatchNorm
from ganscale.objectives.fast_derivatives import FastDerivatives
from ganscale.objectives.objective import Objective
from ganscale.objectives.penalties import Draws
from ganscale.runtime import autocast, is_communication_error, is_device_error, weights_dtype
from ganscale.schema import Config
from ganscale.training.fast_forward import fast_forward
from ganscale.training.hidden_state import HiddenState, seeded
from ganscale.training.steps import CriticStep, GeneratorStep, StepOutput

_BATCH = 4
_MOVES = (0.3, 0.3, 0.3, 0.0)  # of the weights; the next in case that an output is constant
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest value

_NO_DRAWS = (
    "which would differ between ranks, micro-batches and restarts: remove them, or pass noise in "
    "as latents"
)
_NO_CHANGES = (
    "which ranks, micro-batches and penalties would each change differently: use torch.nn.utils."
    "parametrizations.spectral_norm for spectral norms, track_running_stats=False for instance "
    "norms, torch.nn.BatchNorm in the generator for running statistics"
)
_HINTS = {
    "derivative for .* is not implemented|does not currently support double backward|"
    "trying to differentiate twice": "a gradient penalty differentiates the critic twice, and this "
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
) -> None:
    """Raises UserError for networks that do not fit the data, each other or the objective, that
    fail, or that would depend on the cluster.

    It changes the networks, so they must not be those of the run. On all ranks at once.
    """
    dtype = weights_dtype(config.training.precision)
    for network in (generator, critic):
        network.to(device, dtype).train()
        update_spectral_norms(network)
        if config.training.memory_format == "channels_last":
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = (config.data.channels, config.data.resolution, config.data.resolution)
    with seeded(config.seed, "trial"):
        latents = torch.randn(_BATCH, config.generator.latent_dim).to(device, dtype)
        images = _different_images(*shape).to(device, dtype)
        if config.training.memory_format == "channels_last":
            images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.arange(_BATCH, device=device) % num_classes if num_classes else None
        shared = labels, config.training.precision
        subjects = (
            _Subject(f"generator {config.generator.target}", generator, latents, *shared, order=1),
            _Subject(f"critic {config.critic.target}", critic, images, *shared, order=2),
        )
        with _batch_norms_in_evaluation(generator):
            _check_outputs(*subjects, shape)
        _rehearse(*subjects, config, objective)
        with _batch_norms_in_evaluation(generator):
            for subject in map(_Subject.in_float64, subjects):
                with _default_dtype(subject.inputs.dtype):
                    _check_function(subject)


@dataclass(frozen=True)
class _Subject:
    """One network and its inputs of the trial. order: how often a step differentiates it"""

    name: str
    network: nn.Module
    inputs: Tensor
    labels: Tensor | None
    precision: str
    order: int

    def run(self) -> Tensor:
        with autocast(self.inputs.device, self.precision):
            return run_network(self.network, self.inputs, self.labels)

    def run_fast(self) -> Tensor:
        """The outputs as a step computes them, as (batch, elements)."""
        with FastDerivatives(self.order):
            return self.run().reshape(len(self.inputs), -1)

    def rows(self, rows: list[int]) -> "_Subject":
        """With some rows of its inputs, in that order."""
        labels = None if self.labels is None else self.labels[rows]
        inputs = torch.empty_like(self.inputs[: len(rows)]).copy_(self.inputs[rows])
        return replace(self, inputs=inputs, labels=labels)

    def in_float64(self) -> "_Subject":
        """Itself in float64, if its forward runs in that precision."""
        wide = replace(self, inputs=self.inputs.double(), precision="float64")
        wide.network.double()
        try:
            with torch.no_grad(), _default_dtype(torch.float64):
                wide.run()
        except UserCodeError:  # its code has a float32 in it
            self.network.to(self.inputs.dtype)
            return replace(self, precision="float32")
        return wide


def _different_images(*shape: int) -> Tensor:
    """(batch, *shape) float32 in [-1, 1], of another contrast and brightness each."""
    contrast, brightness = torch.tensor([[0.3, 0.9, 2.0, 0.6], [0.5, -0.8, 0.0, 1.2]])
    noise = torch.randn(_BATCH, *shape)
    return (contrast.view(-1, 1, 1, 1) * noise + brightness.view(-1, 1, 1, 1)).tanh()


@torch.no_grad()
def _check_outputs(generator: _Subject, critic: _Subject, shape: tuple[int, int, int]) -> None:
    """The first forward of each network."""
    outputs = []
    for subject in (generator, critic):
        before = HiddenState(subject.network)
        outputs.append(subject.run())
        # The first forward may set plain attributes, such as a size.
        _refuse_change(subject, before.change(with_attributes=False))
    images, logits = outputs
    made = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    if made != (_BATCH, *shape):
        made = made[1:] if isinstance(made, tuple) and made[:1] == (_BATCH,) else made
        raise UserError(f"{generator.name} makes samples of shape {made}, the data has {shape}")
    if not isinstance(logits, Tensor) or logits.ndim == 0 or len(logits) != _BATCH:
        shown = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"{critic.name} returns {shown} for a batch of {_BATCH}: "
            "it must be a tensor whose first dimension is the batch"
        )
    if not logits.is_floating_point():
        raise UserError(f"{critic.name} returns {logits.dtype}: logits must be real numbers")


def _rehearse(generator: _Subject, critic: _Subject, config: Config, objective: Objective) -> None:
    """A critic step with all penalties and a generator step, forwards and backwards."""
    training, labels, images = config.training, critic.labels, critic.inputs
    is_autocast = training.penalty_precision == "autocast"
    penalty_precision = training.precision if is_autocast else "float32"
    critic_step = CriticStep(critic.network, objective, training.precision, penalty_precision)
    generator_step = GeneratorStep(generator.network, critic.network, objective, training.precision)
    slots = torch.arange(_BATCH, device=images.device)

    def take_critic_step() -> StepOutput:
        with torch.no_grad(), autocast(images.device, training.precision):
            fakes = fast_forward(generator.network, False)(generator.inputs, labels)
        fakes = fakes.to(images.dtype)
        points = objective.penalty_points(images, fakes, Draws(config.seed, slots, 0), update=0)
        return critic_step(images, fakes, labels, points)

    _differentiate(critic, take_critic_step)
    _differentiate(generator, lambda: generator_step(generator.inputs, images, labels))


def _differentiate(subject: _Subject, take_step: Callable[[], StepOutput]) -> None:
    parameters = [p for p in subject.network.parameters() if p.requires_grad]
    if not parameters:
        raise UserError(f"{subject.name} has no weights to train")
    try:
        take_step().loss.backward(inputs=parameters)
    except (GanscaleError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_communication_error(error) or is_device_error(error):
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


def _check_function(subject: _Subject) -> None:
    """Refuses a network whose outputs depend on more than their own inputs."""
    weights = {name: p.detach().clone() for name, p in subject.network.named_parameters()}
    outputs = derivatives = own = torch.empty(0)
    for move in _MOVES:
        _move_weights(subject.network, weights, move)
        outputs, derivatives = _derivatives(subject)
        own = derivatives[range(_BATCH), range(_BATCH)]
        is_finite = outputs.isfinite().all() and derivatives.isfinite().all()
        if is_finite and own.flatten(1).any(1).all():
            break
    if not outputs.isfinite().all():
        raise UserError(f"{subject.name} returns NaN or infinity for ordinary inputs")
    what = "latents" if subject.order == 1 else "images"
    if not own.any():
        raise UserError(
            f"the output of {subject.name} has no derivative with respect to its {what}: look for "
            "detach, no_grad or rounding in its forward"
        )
    _check_repeatable(subject)
    others = derivatives.clone()
    others[range(_BATCH), range(_BATCH)] = 0
    if others.any():
        raise UserError(_mixing(subject))
    _check_companions(subject, outputs, own)


@torch.no_grad()
def _check_repeatable(subject: _Subject) -> None:
    """Refuses random draws, and whatever a forward leaves behind for the next."""
    outputs = []
    for seed in (0, 0, 1, 2):  # alike, then differently
        with seeded(seed, "trial of draws"):
            before = HiddenState(subject.network)
            outputs.append(subject.run())
            _refuse_change(subject, before.change())
        subject.rows([3, 3, 1, 0]).run()
    if not all(_is_close(subject, outputs[0], output) for output in outputs[1:]):
        raise UserError(
            f"{subject.name} does not always return the same for the same input: its forward "
            f"remembers something or draws random numbers, {_NO_DRAWS}"
        )


def _check_companions(subject: _Subject, outputs: Tensor, own: Tensor) -> None:
    """outputs, own: each input's output and derivative in the batch of the trial"""
    alone, alone_derivatives = _derivatives(subject.rows([2]))
    others = replace(subject, inputs=torch.cat([subject.inputs[2:3], 1 - 2 * subject.inputs[:3]]))
    with torch.no_grad():
        comparisons = [
            (alone, outputs[2:3]),
            (alone_derivatives[0], own[2:3]),
            (subject.rows([3, 1, 0]).run_fast(), outputs[[3, 1, 0]]),
            (others.rows([3, 0, 1]).run_fast()[1:2], others.rows([0]).run_fast()),
        ]
    if not all(_is_close(subject, first, second) for first, second in comparisons):
        raise UserError(_mixing(subject))


def _mixing(subject: _Subject) -> str:
    if subject.order == 1:
        return (
            f"an image of {subject.name} depends on the other latents of its batch or on the size "
            "of the batch, which differ between ranks: of all layers that mix a batch, only batch "
            "norms made of torch.nn.BatchNorm are possible"
        )
    return (
        f"the logit that {subject.name} gives to an image depends on the other images of its batch "
        "(minibatch deviation or discrimination, batch norm) or on the size of the batch, which "
        "differ between ranks: remove that layer"
    )


def _derivatives(subject: _Subject) -> tuple[Tensor, Tensor]:
    """(outputs (batch, elements), derivatives (batch, batch, *input)): of a random combination of
    the elements of each output, with respect to each input."""
    inputs = subject.inputs.detach().clone().requires_grad_()
    outputs = replace(subject, inputs=inputs).run_fast()
    if not outputs.requires_grad:
        return outputs, torch.zeros(len(inputs), *inputs.shape, device=inputs.device)
    with seeded(0, "combination"):
        combination = torch.randn(outputs.shape[1]).to(outputs)
    scores = outputs @ combination
    rows = [
        torch.autograd.grad(score, inputs, retain_graph=True, materialize_grads=True)[0]
        for score in scores
    ]
    return outputs.detach(), torch.stack(rows)


@torch.no_grad()
def _move_weights(network: nn.Module, weights: dict[str, Tensor], share: float) -> None:
    """To `weights` plus noise: a `share` of their size, or of a usual one where they are zero."""
    for name, parameter in network.named_parameters():
        value = weights[name]
        size = value.abs().square().mean().sqrt()
        usual = value[0].numel() ** -0.5 if value.ndim > 1 and len(value) else 1.0
        scale = share * torch.where(size > 0, size, usual)
        parameter.copy_(value + scale * torch.randn_like(value))


def _refuse_change(subject: _Subject, change: str | None) -> None:
    if change is not None:
        reason = _NO_DRAWS if change.startswith("draws") else _NO_CHANGES
        raise UserError(f"{subject.name} {change}, {reason}")


def _is_close(subject: _Subject, first: Tensor, second: Tensor) -> bool:
    tolerance = _TOLERANCES[subject.inputs.dtype] * float(second.abs().max())
    return bool((first - second).abs().max() <= tolerance)


@contextmanager
def _batch_norms_in_evaluation(network: nn.Module) -> Iterator[None]:
    norms = [module for module in network.modules() if isinstance(module, GlobalBatchNorm)]
    for norm in norms:
        norm.eval()
    yield
    for norm in norms:
        norm.train()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Of tensors that a forward makes without naming one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
