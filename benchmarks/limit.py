"""How close our cycle comes to what the machine can do.

    python -m benchmarks.limit [--quick] [--json FILE]

Only the floating-point operations that the algorithm needs as mathematics count as useful; all
other work (zeros, random numbers, norms, Adam, copies) counts as lost. With F the operations of a
network's convolutions and products for one forward of the batch:

    critic step     generator, forward                                       F_G
                    critic on real and on fake: forward, gradients of the
                    inputs and of the weights, but not of the images         2 (3 F_D - first)
                    penalty: forward, gradient of the images, and double
                    backward to the logits and to the weights                4 F_D
    generator step  generator: forward, both gradients                       3 F_G - first
                    critic: forward, gradient of the images                  2 F_D

where `first` is the input gradient of the first layer. torch's counter counts all but the double
backward of the penalty. Its two terms count as one forward each, because our critics are piecewise
linear.

Networks are counted as they are defined (model utilization). Where layers take fewer operations,
such as a convolution and a mean over pixels in one, the note also has the share for the operations
that are computed (hardware utilization).

The peaks are measured in the same process, in turns with the cycles: a `matrix product` of 2048 x
2048 matrices (on a GPU, 8192 x 8192), and the fastest `convolution` (forward, in either memory
format) of the networks' shapes. The ratio, in percent, is the time that the useful operations would
take at the peak of their precision, over the measured time: the median of rounds; low and high are
its quartiles.
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

from benchmarks.ours import Ours, config_of, next_cycle, random_images
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
_MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns
_LEAST_OPERATIONS = {"cpu": 1e9, "cuda": 1e12}  # for the clock
_NETWORKS = {"cpu": ("dcgan32", "resnet32"), "cuda": ("dcgan32", "dcgan256", "resnet32")}


def count_flops(
    run: Callable[[], object], context: Callable[[], AbstractContextManager[object]] = nullcontext
) -> int:
    """By torch's counter."""
    with FlopCounterMode(display=False) as counter, context():
        run()
    return counter.get_total_flops()


class Operations(NamedTuple):
    """Operations of a cycle."""

    penalty: int
    rest: int


def useful_operations(
    config: Config,
    generator: nn.Module,
    critic: nn.Module,
    images: Tensor,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Operations:
    """Of one cycle, with penalties at their interval and layers computed as in `context`."""
    latents = torch.randn(len(images), config.generator.latent_dim, device=images.device)
    with torch.no_grad():
        generator_flops = count_flops(lambda: generator(latents), context)
        critic_flops = count_flops(lambda: critic(images), context)

    def gradients(network: nn.Module, inputs: Tensor) -> object:
        return torch.autograd.grad(network(inputs).sum(), list(network.parameters()))

    adversarial_flops = count_flops(lambda: gradients(critic, images), context)
    generator_step_flops = count_flops(lambda: gradients(generator, latents), context)
    n_critic = config.objective.n_critic
    penalties = sum(4 * critic_flops / p.interval for p in config.objective.penalties.values())
    critic_steps = n_critic * (generator_flops + 2 * adversarial_flops)
    rest = critic_steps + generator_step_flops + 2 * critic_flops
    return Operations(round(n_critic * penalties), rest)


def computed_operations(
    config: Config, generator: nn.Module, critic: nn.Module, images: Tensor
) -> Operations:
    """The same for the operations that are computed, without the zeros that pad some of them."""
    networks = generator, critic
    defined, computed = (
        useful_operations(config, *networks, images, context)
        for context in (nullcontext, FastDerivatives)
    )
    return min(defined, computed, key=sum)


Run = Callable[[], object]


def convolutions(network: nn.Module, inputs: Tensor, dtype: torch.dtype) -> list[tuple[Run, int]]:
    """Each convolution of the network with its operations, on a random input of its shape, in both
    memory formats."""
    runs: list[tuple[Run, int]] = []

    def add(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        for layout in (torch.contiguous_format, torch.channels_last):
            image = torch.randn(inputs[0].shape, device=inputs[0].device)
            weights = {name: p.detach().to(dtype) for name, p in module.named_parameters()}
            run = _convolution(module, weights, image.to(dtype, memory_format=layout))
            runs.append((run, count_flops(run)))

    types = (nn.Conv2d, nn.ConvTranspose2d)
    handles = [m.register_forward_hook(add) for m in network.modules() if isinstance(m, types)]
    with torch.no_grad():
        network(inputs)
    for handle in handles:
        handle.remove()
    return runs


def _convolution(module: nn.Module, weights: dict[str, Tensor], image: Tensor) -> Run:
    copied = copy.deepcopy(module)
    copied._forward_hooks.clear()
    return lambda: functional_call(copied, weights, image)


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Run, int]:
    """A product that is large enough for the device's peak, and its operations."""
    size = _MATRIX_SIZE[device.type]
    matrix = torch.randn(size, size, device=device).to(dtype)
    return lambda: matrix @ matrix, 2 * size**3


def _repeat(run: Run, times: int) -> Run:
    def repeated() -> None:
        for _ in range(times):
            run()

    return repeated


def measure(network: str, objective: str, batch: int, rounds: int, runtime: Runtime) -> list[Row]:
    """A row for each precision and peak."""
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
        product, product_flops = matrix_product(dtype, images.device)
        contestants[f"matrix product {dtype}"] = product
        operations[f"matrix product {dtype}"] = product_flops
        runs = convolutions(state.generator, latents, dtype)
        run, flops = _fastest(runs + convolutions(state.critic, images, dtype))
        repeats = max(1, round(_LEAST_OPERATIONS[images.device.type] / flops))
        contestants[f"convolution {dtype}"] = _repeat(run, repeats)
        operations[f"convolution {dtype}"] = repeats * flops
    seconds = interleaved(contestants, rounds, clock=step_clock, prepare=next_cycle)
    networks = state.generator, state.critic
    needed = useful_operations(configs["f32"], *networks, images)
    computed = computed_operations(configs["f32"], *networks, images)
    rows = []
    for name in chosen:
        rest_dtype = FLOAT32 if name == "f32" else BFLOAT16
        penalty_dtype = BFLOAT16 if name == "bf16" else FLOAT32
        dtypes = dict.fromkeys((rest_dtype, penalty_dtype if has_penalty else rest_dtype))
        total = sum(needed)
        rate = total / statistics.median(seconds[name])
        for kind in ("convolution", "matrix product"):
            speed = {
                dtype: [operations[f"{kind} {dtype}"] / s for s in seconds[f"{kind} {dtype}"]]
                for dtype in (FLOAT32, BFLOAT16)
            }
            model_shares, hardware_shares = (
                [
                    100 * (counts.penalty / penalty_speed + counts.rest / rest_speed) / duration
                    for penalty_speed, rest_speed, duration in zip(
                        speed[penalty_dtype], speed[rest_dtype], seconds[name], strict=True
                    )
                ]
                for counts in (needed, computed)
            )
            peaks = " and ".join(
                f"{statistics.median(speed[dtype]) / 1e9:.0f} ({_short(dtype)})" for dtype in dtypes
            )
            note = (
                f"{total / 1e9:.2f} useful GFLOP per cycle of batch {batch}, {rate / 1e9:.0f} "
                f"GFLOP/s of {peaks}"
            )
            if computed != needed:
                share = statistics.median(hardware_shares)
                note += f"; {sum(computed) / 1e9:.2f} GFLOP computed, {share:.0f} % of peak"
            rows.append(
                Row(f"{objective}/{network}/{name}", kind, *spread(model_shares), "% of peak", note)
            )
    return rows


def _fastest(runs: list[tuple[Run, int]]) -> tuple[Run, int]:
    """The run with the most operations per second."""
    repeats = 10 if torch.cuda.is_available() else 1  # so that a launch takes no time
    speeds = []
    for run, flops in runs:
        times = interleaved({"": _repeat(run, repeats)}, 5, clock=step_clock)[""]
        speeds.append(flops / min(times))
    return runs[speeds.index(max(speeds))]


def _short(dtype: torch.dtype) -> str:
    return "float32" if dtype == FLOAT32 else "bfloat16"


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    is_small = options.quick and not torch.cuda.is_available()
    batch, rounds = (16 if is_small else 64), (5 if options.quick else 15)
    runtime = Runtime.start()
    rows = []
    for objective in ("wgan_gp",) if options.quick else ("wgan_gp", "non_saturating"):
        for network in _NETWORKS[runtime.device.type]:
            rows += measure(network, objective, batch, rounds, runtime)
    report(rows, options.json)


if __name__ == "__main__":
    main()
