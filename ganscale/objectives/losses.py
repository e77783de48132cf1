"""Adversarial losses as published, each a pair of pure functions of the critic's raw logits.

A logits tensor has any shape (one score an image, or a map of patch scores); every loss is the
mean over its elements, a float scalar. D below is the sigmoid of the logit where a paper speaks
of probabilities, and the logit itself where it does not. Everything is written with softplus,
so that no logarithm ever meets a zero.

A loss of the user's own is a function that returns a `Loss`, named `package.module:function`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from ganscale.errors import UserError
from ganscale.importing import call, find

Parts = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Loss:
    """An adversarial loss: what the critic and what the generator minimises.

    generator_needs_real: otherwise the generator's second argument may be None
    needs_global_batch: the loss is not a mean of one term per image or pair, so it is taken on the
        logits of the global batch rather than averaged over ranks and micro-batches
    critic_parts, generator_parts: (the part for real images, the part for fakes), of the same
        arguments, with the loss for their sum; to be looked at. A loss of pairs has none. A
        generator's loss that does not look at real images is its own part for fakes
    """

    critic: Callable[[Tensor, Tensor], Tensor]  # (real_logits, fake_logits) -> scalar
    generator: Callable[[Tensor, Tensor | None], Tensor]  # (fake_logits, real_logits) -> scalar
    generator_needs_real: bool = False
    needs_global_batch: bool = False
    critic_parts: Callable[[Tensor, Tensor], Parts] | None = None
    generator_parts: Callable[[Tensor, Tensor | None], Parts] | None = None


def minimax(smoothing: float = 0.0) -> Loss:
    """Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv:1406.2661), equation 1.

    The generator minimises E[log(1 - D(G(z)))] = -E[softplus(logit)].
    """
    return _split(_cross_entropy(smoothing), lambda fake_logits, _: -softplus(fake_logits).mean())


def non_saturating(smoothing: float = 0.0) -> Loss:
    """Goodfellow et al. 2014 (arXiv:1406.2661), section 3: the generator maximises log D(G(z))."""
    return _split(_cross_entropy(smoothing), lambda fake_logits, _: softplus(-fake_logits).mean())


def lsgan(a: float = 0.0, b: float = 1.0, c: float = 1.0) -> Loss:
    """Mao et al. 2017, "Least Squares GANs" (arXiv:1611.04076), equation 2.

    `a` is the critic's label for fake, `b` for real, `c` what the generator wants to read:
    (0, 1, 1) is equation 9 of the paper, (-1, 1, 0) equation 8.
    """
    return _split(
        lambda real_logits, fake_logits: (
            0.5 * (real_logits - b).square().mean(),
            0.5 * (fake_logits - a).square().mean(),
        ),
        lambda fake_logits, _: 0.5 * (fake_logits - c).square().mean(),
    )


def wgan() -> Loss:
    """Arjovsky, Chintala, Bottou 2017, "Wasserstein GAN" (arXiv:1701.07875), equations 2 and 3.

    Needs a Lipschitz critic: `clip`, or a penalty.
    """
    return _split(
        lambda real_logits, fake_logits: (-real_logits.mean(), fake_logits.mean()),
        lambda fake_logits, _: -fake_logits.mean(),
    )


def hinge() -> Loss:
    """Lim, Ye 2017, "Geometric GAN" (arXiv:1705.02894), equations 12 and 13; Miyato et al. 2018
    (arXiv:1802.05957), equations 16 and 17."""
    return _split(
        lambda real_logits, fake_logits: (
            relu(1 - real_logits).mean(),
            relu(1 + fake_logits).mean(),
        ),
        lambda fake_logits, _: -fake_logits.mean(),
    )


def relativistic() -> Loss:
    """Relativistic pairing, RpGAN: Jolicoeur-Martineau 2018 (arXiv:1807.00734), section 4.1, with
    the logistic function of its RSGAN; Huang et al. 2024, R3GAN (arXiv:2501.05441), equation 2.

    Real and fake are paired by their slot in the global batch.
    """
    return Loss(
        lambda real_logits, fake_logits: softplus(fake_logits - real_logits).mean(),
        lambda fake_logits, real_logits: softplus(_given(real_logits) - fake_logits).mean(),
        generator_needs_real=True,
    )


def relativistic_average() -> Loss:
    """RaSGAN: Jolicoeur-Martineau 2018, "The relativistic discriminator" (arXiv:1807.00734),
    equations 9 to 11: each image is compared with the mean of the other kind, over the whole batch.
    """

    def parts(better: Tensor, worse: Tensor) -> Parts:
        return (
            softplus(worse.mean() - better).mean(),
            softplus(worse - better.mean()).mean(),
        )  # fmt: skip

    def generator_parts(fake_logits: Tensor, real_logits: Tensor | None) -> Parts:
        fake, real = parts(fake_logits, _given(real_logits))
        return real, fake

    def generator(fake_logits: Tensor, real_logits: Tensor | None) -> Tensor:
        real, fake = generator_parts(fake_logits, real_logits)
        return fake + real

    return _split(
        parts,
        generator,
        generator_needs_real=True,
        needs_global_batch=True,
        generator_parts=generator_parts,
    )


def _split(
    parts: Callable[[Tensor, Tensor], Parts],
    generator: Callable[[Tensor, Tensor | None], Tensor],
    **settings: Any,
) -> Loss:
    """A loss whose critic minimises the sum of `parts`: one for real images, one for fakes."""

    def critic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        of_real, of_fake = parts(real_logits, fake_logits)
        return of_real + of_fake

    return Loss(critic, generator, critic_parts=parts, **settings)


LOSSES: dict[str, Callable[..., Loss]] = {
    "minimax": minimax,
    "non_saturating": non_saturating,
    "lsgan": lsgan,
    "wgan": wgan,
    "hinge": hinge,
    "relativistic": relativistic,
    "relativistic_average": relativistic_average,
}


def build_loss(name: str, options: Mapping[str, float]) -> Loss:
    """The loss called `name`, ours or `package.module:function`.

    Raises UserError, with the nearest known name, for a loss or an option that is not there.
    """
    loss = call(find(name, LOSSES, "loss"), options, f"loss {name}")
    if not isinstance(loss, Loss):
        raise UserError(f"loss {name} returns a {type(loss).__name__}, not a Loss")
    if name not in LOSSES:
        _try(name, loss)
    return loss


def _try(name: str, loss: Loss) -> None:
    """Raises UserError for a loss of the user's that does not do what it declares."""
    logits = torch.zeros(2)
    try:
        values = (
            loss.critic(logits, logits),
            loss.generator(logits, logits if loss.generator_needs_real else None),
        )
    except Exception as error:
        hint = "" if loss.generator_needs_real else "; does it need generator_needs_real=True?"
        raise UserError(f"loss {name} fails: {type(error).__name__}: {error}{hint}") from error
    if any(not isinstance(value, Tensor) or value.ndim for value in values):
        raise UserError(f"loss {name} must give one number a batch, a tensor without dimensions")
    real_logits, fake_logits = torch.tensor([0.5, -1.5]), torch.tensor([2.0, -0.25])
    for player, part_of, loss_of, logits in (
        ("critic", loss.critic_parts, loss.critic, (real_logits, fake_logits)),
        ("generator", loss.generator_parts, loss.generator, (fake_logits, real_logits)),
    ):
        if part_of is not None:
            of_real, of_fake = part_of(*logits)
            if not (of_real + of_fake).isclose(loss_of(*logits)):
                raise UserError(f"loss {name}: {player}_parts must add up to what {player} gives")


def _cross_entropy(smoothing: float) -> Callable[[Tensor, Tensor], Parts]:
    """-E[log D(x)] and -E[log(1 - D(G(z)))]: Goodfellow et al. 2014, equation 1, negated.

    With one-sided label smoothing the label of real images is 1 - smoothing (Salimans et al. 2016,
    arXiv:1606.03498, section 3.4).
    """

    def parts(real_logits: Tensor, fake_logits: Tensor) -> Parts:
        # -(1 - s) log D - s log(1 - D) = softplus(-logit) + s logit
        real = softplus(-real_logits) + smoothing * real_logits
        return real.mean(), softplus(fake_logits).mean()

    return parts


def _given(real_logits: Tensor | None) -> Tensor:
    if real_logits is None:
        raise ValueError("a relativistic generator needs the logits of real images")
    return real_logits
