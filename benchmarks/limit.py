"""How near our cycle comes to what the machine can do.

    python -m benchmarks.limit [--quick] [--json FILE]

Useful are the floating-point operations that the algorithm needs as mathematics; whatever else is
computed (zeros, random numbers, norms, Adam, a copy) counts as lost. With F the operations of a
network's convolutions and products for one forward of the batch:

    critic step     generator, forward                                       F_G
                    critic on real and on fake: forward, gradients of the
                    inputs and of the weights, but not of the images         2 (3 F_D - first)
                    penalty: forward, gradient of the images, and back along
                    it to the logits and to the weights                      4 F_D
    generator step  generator: forward, both gradients                       3 F_G - first
                    critic: forward, gradient of the images                  2 F_D

where `first` is the input's gradient of the first layer. torch's counter finds all but the last two
terms of the penalty, which are counted as one forward each: our critics are linear in pieces.

They are counted as the networks are defined (a model's utilization). Where layers are computed in a
form with fewer operations, as a convolution and the mean over pixels behind it, the note says what
share the operations that are left have (the hardware's utilization).

The peaks are measured in the same process, in turns with the cycles: `matrix product` of 2048 x
2048 matrices, and the best `convolution` (forward, in either memory layout) among the networks' own
shapes. The ratio is the time that the useful operations would take at the peak of their precision
over the measured time, in percent: the median of rounds; low and high are its quartiles.
"""

import copy
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ours import Ours, config_of, random_images
from benchmarks.report import Row, arguments, report
from benchmarks.timing import interleaved, spread, step_clock
from ganscale.objectives.fast_derivatives import FastDerivatives
from ganscale.runtime import Runtime
from ganscale.schema import Config

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
PRECISIONS = {
    "f32": (),
    "bf16_penalty_f32": ("training.precision=bfloat16",),
    "bf16": ("training.precision=bfloat16", "training.penalty_precision=autocast"),
}
_PRODUCT = 2048  # rows and columns


def counted(
    run: Callable[[], object], form: Callable[[], AbstractContextManager[object]] = nullcontext
) -> int:
    """What torch's counter finds."""
    with FlopCounterMode(display=False) as counter, form():
        run()
    return counter.get_total_flops()


class Useful(NamedTuple):
    """Operations of a cycle: of the penalty, and of all else."""

    penalty: int
    rest: int


def useful(
    config: Config,
    generator: nn.Module,
    critic: nn.Module,
    images: Tensor,
    form: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Useful:
    """Of one cycle, penalties at their interval, in the `form` in which layers are computed."""
    latents = torch.randn(len(images), config.generator.latent_dim, device=images.device)
    with torch.no_grad():
        of_generator = counted(lambda: generator(latents), form)
        of_critic = counted(lambda: critic(images), form)

    def gradients(network: nn.Module, inputs: Tensor) -> object:
        return torch.autograd.grad(network(inputs).sum(), list(network.parameters()))

    adversarial = counted(lambda: gradients(critic, images), form)
    generating = counted(lambda: gradients(generator, latents), form)
    n_critic = config.objective.n_critic
    penalties = sum(4 * of_critic / p.interval for p in config.objective.penalties.values())
    rest = n_critic * (of_generator + 2 * adversarial) + generating + 2 * of_critic
    return Useful(round(n_critic * penalties), rest)


def done(config: Config, generator: nn.Module, critic: nn.Module, images: Tensor) -> Useful:
    """The same, of what is computed. Some forms have a margin of zeros: they count as defined."""
    networks = generator, critic
    defined, computed = (
        useful(config, *networks, images, form) for form in (nullcontext, FastDerivatives)
    )
    return min(defined, computed, key=sum)


Run = Callable[[], object]


def convolutions(network: nn.Module, inputs: Tensor, dtype: torch.dtype) -> list[tuple[Run, int]]:
    """Each convolution of the network on an input of its own shape, in both layouts, with its
    operations."""
    found: list[tuple[Run, int]] = []

    def add(module: nn.Module, given: tuple[Tensor, ...], _: Tensor) -> None:
        for layout in (torch.contiguous_format, torch.channels_last):
            image = torch.randn(given[0].shape, device=inputs.device)
            weights = {name: p.detach().to(dtype) for name, p in module.named_parameters()}
            run = _convolution(module, weights, image.to(dtype, memory_format=layout))
            found.append((run, counted(run)))

    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    handles = [m.register_forward_hook(add) for m in network.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        network(inputs)
    for handle in handles:
        handle.remove()
    return found


def _convolution(module: nn.Module, weights: dict[str, Tensor], image: Tensor) -> Run:
    alone = copy.deepcopy(module)
    alone._forward_hooks.clear()
    return lambda: functional_call(alone, weights, image)


def _product(dtype: torch.dtype, device: torch.device) -> Run:
    matrix = torch.randn(_PRODUCT, _PRODUCT, device=device).to(dtype)
    return lambda: matrix @ matrix


def _in_turn(runs: list[Run]) -> Run:
    def run() -> None:
        for each in runs:
            each()

    return run


def measure(network: str, objective: str, batch: int, rounds: int, runtime: Runtime) -> list[Row]:
    """A row for each precision and kind of peak."""
    has_penalty = bool(config_of(objective, network, batch).objective.penalties)
    chosen = {k: v for k, v in PRECISIONS.items() if has_penalty or k != "bf16_penalty_f32"}
    configs = {
        name: config_of(objective, network, batch, *(settings if has_penalty else settings[:1]))
        for name, settings in chosen.items()
    }
    images = random_images(configs["f32"], runtime.device)
    ours = {name: Ours(config, runtime, images) for name, config in configs.items()}
    state = ours["f32"].state
    latents = torch.randn(batch, configs["f32"].generator.latent_dim, device=images.device)
    contestants: dict[str, Run] = dict(ours)
    operations: dict[str, int] = {}
    for dtype in (FLOAT32, BFLOAT16):
        contestants[f"matrix product {dtype}"] = _product(dtype, images.device)
        operations[f"matrix product {dtype}"] = 2 * _PRODUCT**3
        found = convolutions(state.generator, latents, dtype)
        run, flops = _fastest(found + convolutions(state.critic, images, dtype))
        repeated = max(1, round(1e9 / flops))  # long enough for the clock
        contestants[f"convolution {dtype}"] = _in_turn([run] * repeated)
        operations[f"convolution {dtype}"] = repeated * flops
    seconds = interleaved(contestants, rounds, clock=step_clock)
    networks = state.generator, state.critic
    needed = useful(configs["f32"], *networks, images)
    computed = done(configs["f32"], *networks, images)
    rows = []
    for name in chosen:
        of_penalty = BFLOAT16 if name == "bf16" else FLOAT32
        of_rest = FLOAT32 if name == "f32" else BFLOAT16
        total = sum(needed)
        rate = total / statistics.median(seconds[name])
        for kind in ("convolution", "matrix product"):
            speed = {
                dtype: [operations[f"{kind} {dtype}"] / s for s in seconds[f"{kind} {dtype}"]]
                for dtype in (FLOAT32, BFLOAT16)
            }
            of_model, of_hardware = (
                [
                    100 * (counts.penalty / penalty_speed + counts.rest / rest_speed) / taken
                    for penalty_speed, rest_speed, taken in zip(
                        speed[of_penalty], speed[of_rest], seconds[name], strict=True
                    )
                ]
                for counts in (needed, computed)
            )
            peaks = " and ".join(
                f"{statistics.median(speed[dtype]) / 1e9:.0f} ({_short(dtype)})"
                for dtype in dict.fromkeys((of_rest, of_penalty if has_penalty else of_rest))
            )
            note = (
                f"{total / 1e9:.2f} useful GFLOP a cycle of batch {batch}, {rate / 1e9:.0f} "
                f"GFLOP/s of {peaks}"
            )
            if computed != needed:
                share = statistics.median(of_hardware)
                note += f"; {sum(computed) / 1e9:.2f} GFLOP are computed, {share:.0f} % of peak"
            rows.append(
                Row(f"{objective}/{network}/{name}", kind, *spread(of_model), "% of peak", note)
            )
    return rows


def _fastest(found: list[tuple[Run, int]]) -> tuple[Run, int]:
    """The one with the most operations a second."""
    speeds = []
    for run, flops in found:
        times = interleaved({"": lambda run=run: run()}, 5, clock=step_clock)[""]
        speeds.append(flops / min(times))
    return found[speeds.index(max(speeds))]


def _short(dtype: torch.dtype) -> str:
    return "float32" if dtype == FLOAT32 else "bfloat16"


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    batch, rounds = (16, 5) if options.quick else (64, 15)
    rows = []
    for objective in ("wgan_gp",) if options.quick else ("wgan_gp", "non_saturating"):
        for network in ("dcgan32", "resnet32"):
            rows += measure(network, objective, batch, rounds, Runtime.start())
    report(rows, options.json)


if __name__ == "__main__":
    main()
