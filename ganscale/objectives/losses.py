"""Adversarial losses as published, each a pair of pure functions of the critic's raw logits.

A logits tensor has any shape (one score per image, or a map of patch scores); every term is a mean
over its elements, a scalar. D below is the sigmoid of the logit where a paper speaks of
probabilities, else the logit. With softplus, no logarithm ever meets a zero.

A loss of your own is a function that returns a `Loss`, named as `package.module:function`.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, relu, softplus

from ganscale.errors import UserError
from ganscale.importing import call, find

Logits = dict[str, Tensor]
"""`real` and `fake`, (batch, *map) each, in the order of the loss's arguments."""

Terms = dict[str, Tensor]
"""The terms of a loss by the images that they score: "real" and "fake", or "pair" for terms of a
real and a fake image together. Scalars; their sum is the loss."""

TERM_NAMES = ("real", "fake", "pair")


@dataclass(frozen=True)
class Loss:
    """An adversarial loss: what the critic and what the generator minimizes.

    critic: (real_logits, fake_logits) -> terms
    generator: (fake_logits) -> terms; or (fake_logits, real_logits) -> terms, for which the critic
        also scores real images in the generator's step
    """

    critic: Callable[[Tensor, Tensor], Terms]
    generator: Callable[..., Terms]

    @cached_property
    def generator_needs_real(self) -> bool:
        """Whether the generator's loss takes the logits of real images, too."""
        positional = [
            each
            for each in inspect.signature(self.generator).parameters.values()
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
            and (each.default is each.empty or each.name == "real_logits")
        ]
        return len(positional) > 1

    @cached_property
    def needs_global_batch(self) -> bool:
        """Whether the loss is more than a mean over (real, fake) pairs, as relativistic averages
        are: it takes the logits of the global batch. Found by trial, so no loss has to declare it.
        """
        real_logits = torch.tensor([0.5, -1.5, 3.0, -0.25], dtype=torch.float64)
        fake_logits = torch.tensor([2.0, -0.75, -3.5, 1.25], dtype=torch.float64)
        halves = [*zip(real_logits.split(2), fake_logits.split(2), strict=True)]
        for loss in (
            lambda real, fake: total(self.critic(real, fake)),
            lambda real, fake: total(self.generator_terms(fake, real)),
        ):
            mean = torch.stack([loss(*half) for half in halves]).mean()
            if not torch.isclose(loss(real_logits, fake_logits), mean, rtol=1e-9, atol=1e-12):
                return True
        return False

    def generator_terms(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Terms:
        """The generator's terms; `real_logits` may be left out unless it needs them."""
        if not self.generator_needs_real:
            return self.generator(fake_logits)
        if real_logits is None:
            raise ValueError("this generator loss needs the logits of real images")
        return self.generator(fake_logits, real_logits)


def total(terms: Terms) -> Tensor:
    """The loss: the sum of its terms."""
    return functools.reduce(operator.add, terms.values())


def minimax(smoothing: float = 0.0) -> Loss:
    """Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv:1406.2661), equation 1.

    The generator minimizes E[log(1 - D(G(z)))] = -E[softplus(logit)].
    """
    return Loss(_cross_entropy(smoothing), lambda fake: {"fake": -softplus(fake).mean()})


def non_saturating(smoothing: float = 0.0) -> Loss:
    """Goodfellow et al. 2014 (arXiv:1406.2661), section 3: the generator maximizes log D(G(z))."""
    return Loss(_cross_entropy(smoothing), lambda fake: {"fake": softplus(-fake).mean()})


def lsgan(a: float = 0.0, b: float = 1.0, c: float = 1.0) -> Loss:
    """Mao et al. 2017, "Least Squares GANs" (arXiv:1611.04076), equation 2.

    `a` is the critic's label for fakes, `b` its label for real images, `c` the label that the
    generator aims at: (0, 1, 1) is equation 9 of the paper, (-1, 1, 0) equation 8.
    """
    return Loss(
        lambda real, fake: {
            "real": _half_squared_error(real, b),
            "fake": _half_squared_error(fake, a),
        },
        lambda fake: {"fake": _half_squared_error(fake, c)},
    )


def wgan() -> Loss:
    """Arjovsky, Chintala, Bottou 2017, "Wasserstein GAN" (arXiv:1701.07875), equations 2 and 3.

    Needs a Lipschitz critic: weight clipping or a penalty.
    """
    return Loss(
        lambda real, fake: {"real": -real.mean(), "fake": fake.mean()},
        lambda fake: {"fake": -fake.mean()},
    )


def hinge() -> Loss:
    """Lim, Ye 2017, "Geometric GAN" (arXiv:1705.02894), equations 12 and 13; Miyato et al. 2018
    (arXiv:1802.05957), equations 16 and 17."""
    return Loss(
        lambda real, fake: {"real": relu(1 - real).mean(), "fake": relu(1 + fake).mean()},
        lambda fake: {"fake": -fake.mean()},
    )


def relativistic() -> Loss:
    """Relativistic pairing, RpGAN: Jolicoeur-Martineau 2018 (arXiv:1807.00734), section 4.1, with
    the logistic function of its RSGAN; Huang et al. 2024, R3GAN (arXiv:2501.05441), equation 2.

    Real and fake images are paired by their slot in the global batch.
    """
    return Loss(
        lambda real, fake: {"pair": softplus(fake - real).mean()},
        lambda fake, real: {"pair": softplus(real - fake).mean()},
    )


def relativistic_average() -> Loss:
    """RaSGAN: Jolicoeur-Martineau 2018, "The relativistic discriminator" (arXiv:1807.00734),
    equations 9 to 11: each image is compared with the mean of the other kind over the global batch.
    """
    return Loss(
        lambda real, fake: {
            "real": softplus(fake.mean() - real).mean(),
            "fake": softplus(fake - real.mean()).mean(),
        },
        lambda fake, real: {
            "real": softplus(real - fake.mean()).mean(),
            "fake": softplus(real.mean() - fake).mean(),
        },
    )


def _half_squared_error(logits: Tensor, label: float) -> Tensor:
    return 0.5 * mse_loss(logits, torch.full_like(logits, label))


_BUILT_IN = minimax, non_saturating, lsgan, wgan, hinge, relativistic, relativistic_average
LOSSES: dict[str, Callable[..., Loss]] = {loss.__name__: loss for loss in _BUILT_IN}


def build_loss(name: str, options: Mapping[str, float]) -> Loss:
    """The loss called `name`, built in or `package.module:function`.

    Raises UserError for a loss or an option that does not exist, and for a loss that fails.
    """
    loss = call(find(name, LOSSES, "loss", Loss), options, f"loss {name}")
    if not isinstance(loss, Loss):
        raise UserError(f"loss {name} returns a {type(loss).__name__}, not a Loss")
    if name not in LOSSES:
        _check(name, loss)
    return loss


def _check(name: str, loss: Loss) -> None:
    """Raises UserError for a user's loss that fails or does not return terms."""
    logits = torch.zeros(2)
    try:
        results = loss.critic(logits, logits), loss.generator_terms(logits, logits)
    except Exception as error:
        raise UserError(f"loss {name} fails: {type(error).__name__}: {error}") from error
    for terms in results:
        if (
            not isinstance(terms, dict)
            or not terms
            or not set(terms) <= set(TERM_NAMES)
            or not all(isinstance(term, Tensor) and term.ndim == 0 for term in terms.values())
        ):
            raise UserError(
                f"loss {name} must return its terms, a dict of scalar tensors under "
                f"{', '.join(map(repr, TERM_NAMES))}, not {terms!r}"
            )


def _cross_entropy(smoothing: float) -> Callable[[Tensor, Tensor], Terms]:
    """-E[log D(x)] and -E[log(1 - D(G(z)))]: Goodfellow et al. 2014, equation 1, negated.

    With one-sided label smoothing the label of real images is 1 - smoothing (Salimans et al. 2016,
    arXiv:1606.03498, section 3.4).
    """
    if not 0 <= smoothing < 1:
        raise UserError(f"`smoothing` of a loss must be at least 0 and below 1, not {smoothing}")

    def real_term(real: Tensor) -> Tensor:
        # -(1 - s) log D - s log(1 - D) = softplus(-logit) + s logit
        loss = softplus(-real)
        return (loss + smoothing * real if smoothing else loss).mean()

    return lambda real, fake: {"real": real_term(real), "fake": softplus(fake).mean()}
