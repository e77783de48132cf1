"""How fast a gradient penalty of the critic is by itself.

    python -m benchmarks.penalty [--quick] [--json FILE] [--only SUBSTRING]

R1 of a batch of noise: the critic's forward, the gradient with respect to the images, its squared
norm, and the backward to the weights. Ours takes them as a step does, in channels last; the rival
is `torch.autograd` through the same weights:

- `NETWORK/plain`: in layers as anyone would write them (for StyleGAN2, those of
  benchmarks/rivals/stylegan2.py), contiguous
- `NETWORK/ours`: in our own layers, in channels last

The ratio is the rival's processor time over ours: the median of interleaved rounds, and quartiles.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.ours import config_of, random_images
from benchmarks.report import Row, argument_parser, report
from benchmarks.rivals.stylegan2 import plain_network
from benchmarks.timing import interleaved, speedup, step_clock
from ganscale.networks.build import build_network
from ganscale.networks.forward import run_network
from ganscale.networks.resampling import merged_kernels
from ganscale.objectives.penalties import input_gradients
from ganscale.runtime import keep_freed_memory

CRITICS = {"dcgan32": 64, "resnet32": 64, "r3gan32": 64, "stylegan2-32": 16}
"""Networks as of `benchmarks.ours.config_of`, with the batch."""


def critic_and_images(network: str, batch: int) -> tuple[nn.Module, Tensor]:
    config = config_of("r1", network, batch)
    torch.manual_seed(0)
    shape, options = config.data.sample_shape, config.critic.options
    critic = build_network(
        "critic", config.critic.target, options, sample_shape=shape, num_classes=0
    )
    return critic, random_images(config, torch.device("cpu"))


def ours(critic: nn.Module, images: Tensor) -> None:
    """As a step of ganscale."""
    with merged_kernels():
        gradients = input_gradients(partial(run_network, critic), images, None)
        _backward(critic, gradients)


def plain(critic: nn.Module, images: Tensor) -> None:
    """By autograd."""
    images = images.detach().requires_grad_()
    (gradients,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
    _backward(critic, gradients)


def _backward(critic: nn.Module, gradients: Tensor) -> None:
    critic.zero_grad()
    (gradients.square().sum() / (2 * len(gradients))).backward()


def rows_of(network: str, batch: int, rounds: int) -> list[Row]:
    critic, images = critic_and_images(network, batch)
    usual = plain_network(copy.deepcopy(critic))
    critic = critic.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = images.contiguous(memory_format=torch.channels_last)
    contestants = {
        "fast": partial(ours, critic, last),
        "plain": partial(plain, usual, images),
        "ours": partial(plain, critic, last),
    }
    seconds = interleaved(contestants, rounds, clock=step_clock)
    median = 1000 * sorted(seconds["fast"])[rounds // 2]
    note = f"ours {median:.1f} ms of batch {batch}"
    rivals = {"plain": "autograd, plain layers", "ours": "autograd, our layers"}
    return [
        Row(
            f"penalty/{network}/{layers}",
            rival,
            *speedup(seconds[layers], seconds["fast"]),
            unit="x faster",
            note=note,
        )
        for layers, rival in rivals.items()
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="only networks whose name contains it"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rounds = 5 if options.quick else 31
    rows: list[Row] = []
    for network, batch in CRITICS.items():
        if options.only in network:
            rows += rows_of(network, batch, rounds)
    report(rows, options.json)


if __name__ == "__main__":
    main()
