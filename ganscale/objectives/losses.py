"""Adversarial losses as published, each a pair of pure functions of the critic's raw logits.

A logits tensor has any shape (one score an image, or a map of patch scores); every loss is the
mean over its elements, a float scalar. D below is the sigmoid of the logit where a paper speaks
of probabilities, and the logit itself where it does not. Everything is written with softplus,
so that no logarithm ever meets a zero.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus

from ganscale.errors import UserError


@dataclass(frozen=True)
class Loss:
    """An adversarial loss: what the critic and what the generator minimises."""

    critic: Callable[[Tensor, Tensor], Tensor]  # (real_logits, fake_logits) -> scalar
    generator: Callable[[Tensor, Tensor | None], Tensor]  # (fake_logits, real_logits) -> scalar
    generator_needs_real: bool = False  # else the generator's second argument may be None


def _binary_cross_entropy(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E[log D(x)] - E[log(1 - D(G(z)))]: Goodfellow et al. 2014, equation 1, negated."""
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def minimax() -> Loss:
    """Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv:1406.2661), equation 1.

    The generator minimises E[log(1 - D(G(z)))] = -E[softplus(logit)].
    """
    return Loss(_binary_cross_entropy, lambda fake_logits, _: -softplus(fake_logits).mean())


def non_saturating() -> Loss:
    """Goodfellow et al. 2014 (arXiv:1406.2661), section 3: the generator maximises log D(G(z))."""
    return Loss(_binary_cross_entropy, lambda fake_logits, _: softplus(-fake_logits).mean())


def lsgan(a: float = 0.0, b: float = 1.0, c: float = 1.0) -> Loss:
    """Mao et al. 2017, "Least Squares GANs" (arXiv:1611.04076), equation 2.

    `a` is the critic's label for fake, `b` for real, `c` what the generator wants to read:
    (0, 1, 1) is equation 9 of the paper, (-1, 1, 0) equation 8.
    """
    return Loss(
        lambda real_logits, fake_logits: (
            0.5 * (real_logits - b).square().mean() + 0.5 * (fake_logits - a).square().mean()
        ),
        lambda fake_logits, _: 0.5 * (fake_logits - c).square().mean(),
    )


def wgan() -> Loss:
    """Arjovsky, Chintala, Bottou 2017, "Wasserstein GAN" (arXiv:1701.07875), equations 2 and 3.

    Needs a Lipschitz critic: `clip`, or the `wgan_gp` penalty.
    """
    return Loss(
        lambda real_logits, fake_logits: fake_logits.mean() - real_logits.mean(),
        lambda fake_logits, _: -fake_logits.mean(),
    )


LOSSES: dict[str, Callable[..., Loss]] = {
    "minimax": minimax,
    "non_saturating": non_saturating,
    "lsgan": lsgan,
    "wgan": wgan,
}


def build_loss(name: str, options: Mapping[str, float]) -> Loss:
    """The loss called `name`; UserError names the nearest known loss or option."""
    if name not in LOSSES:
        close = difflib.get_close_matches(name, LOSSES, n=1)
        hint = f"did you mean {close[0]}" if close else f"known: {', '.join(LOSSES)}"
        raise UserError(f"`objective.loss.name`: unknown loss {name}; {hint}")
    known = list(inspect.signature(LOSSES[name]).parameters)
    for option in options:
        if option not in known:
            raise UserError(
                f"`objective.loss.options.{option}`: {name} takes {', '.join(known) or 'none'}"
            )
    return LOSSES[name](**options)
