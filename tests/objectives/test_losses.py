"""The losses are those of their papers, written out here with D = sigmoid(logit) in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ganscale.errors import UserError
from ganscale.objectives.losses import LOSSES, build_loss


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def discriminator(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def log_of_real(logits: list[float]) -> float:
    return mean([math.log(discriminator(logit)) for logit in logits])


def log_of_fake(logits: list[float]) -> float:
    return mean([math.log(1 - discriminator(logit)) for logit in logits])


# name, options -> what the critic and what the generator minimises in the paper
PAPERS = {
    ("minimax", ()): (
        lambda real, fake: -(log_of_real(real) + log_of_fake(fake)),
        lambda fake: log_of_fake(fake),
    ),
    ("non_saturating", ()): (
        lambda real, fake: -(log_of_real(real) + log_of_fake(fake)),
        lambda fake: -log_of_real(fake),
    ),
    ("lsgan", ()): (
        lambda real, fake: mean([(x - 1) ** 2 for x in real]) / 2 + mean([x**2 for x in fake]) / 2,
        lambda fake: mean([(x - 1) ** 2 for x in fake]) / 2,
    ),
    ("lsgan", (("a", -1.0), ("b", 1.0), ("c", 0.0))): (
        lambda real, fake: (
            mean([(x - 1) ** 2 for x in real]) / 2 + mean([(x + 1) ** 2 for x in fake]) / 2
        ),
        lambda fake: mean([x**2 for x in fake]) / 2,
    ),
    ("wgan", ()): (
        lambda real, fake: -(mean(real) - mean(fake)),
        lambda fake: -mean(fake),
    ),
}

each_paper = pytest.mark.parametrize(
    ("name", "options", "critic", "generator"),
    [
        pytest.param(name, dict(options), *paper, id=f"{name}{dict(options) or ''}")
        for (name, options), paper in PAPERS.items()
    ],
)
moderate = st.lists(st.floats(-12, 12), min_size=1, max_size=8)


@each_paper
@settings(deadline=None, max_examples=60)
@given(real=moderate, fake=moderate)
def test_a_loss_is_its_papers_equation(name, options, critic, generator, real, fake):
    built = build_loss(name, options)
    real_logits, fake_logits = (torch.tensor(x, dtype=torch.float64) for x in (real, fake))
    assert built.critic(real_logits, fake_logits).item() == pytest.approx(critic(real, fake), 1e-9)
    for given_real in (None, real_logits):
        found = built.generator(fake_logits, given_real).item()
        assert found == pytest.approx(generator(fake), rel=1e-9)


def test_every_registered_loss_is_held_against_its_paper():
    assert {name for name, _ in PAPERS} == set(LOSSES)


@each_paper
def test_gradients_are_those_of_the_papers_equation(name, options, critic, generator):
    """Central differences of the equation, one logit at a time."""
    built = build_loss(name, options)
    real, fake, step = [-2.0, 0.3, 4.0], [1.5, -0.7, 0.0], 1e-6
    real_logits, fake_logits = (torch.tensor(x, dtype=torch.float64) for x in (real, fake))
    for logits in (real_logits, fake_logits):
        logits.requires_grad_()
    built.critic(real_logits, fake_logits).backward()

    def moved(logits: list[float], index: int, by: float) -> list[float]:
        return [logit + by * (i == index) for i, logit in enumerate(logits)]

    assert real_logits.grad is not None
    assert fake_logits.grad is not None
    for i in range(3):
        up, down = (critic(moved(real, i, by), fake) for by in (step, -step))
        assert real_logits.grad[i].item() == pytest.approx((up - down) / (2 * step), abs=1e-8)
        up, down = (critic(real, moved(fake, i, by)) for by in (step, -step))
        assert fake_logits.grad[i].item() == pytest.approx((up - down) / (2 * step), abs=1e-8)
    fake_logits.grad = None
    built.generator(fake_logits, None).backward()
    assert fake_logits.grad is not None
    for i in range(3):
        up, down = (generator(moved(fake, i, by)) for by in (step, -step))
        assert fake_logits.grad[i].item() == pytest.approx((up - down) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(name, dtype):
    values = torch.tensor([-1e4, 1e4, -1e4, 1e4], dtype=dtype)
    real_logits, fake_logits = values.clone().requires_grad_(), values.flip(0).requires_grad_()
    loss = build_loss(name, {})
    total = loss.critic(real_logits, fake_logits) + loss.generator(fake_logits, real_logits)
    total.backward()
    for tensor in (total, real_logits.grad, fake_logits.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", ["minimax", "non_saturating"])
def test_a_sure_and_wrong_critic_is_told_by_how_many_logits(name):
    """-log D of a logit of -1e4 is 1e4, where log(sigmoid) would be infinite."""
    wrong = build_loss(name, {}).critic(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert wrong.item() == 2e4
    right = build_loss(name, {}).critic(torch.tensor([1e4]), torch.tensor([-1e4]))
    assert right.item() == 0


def test_only_the_minimax_generator_starves_while_the_critic_wins():
    def gradient(name: str) -> float:
        logits = torch.tensor([-20.0], requires_grad=True)
        build_loss(name, {}).generator(logits, None).backward()
        assert logits.grad is not None
        return abs(logits.grad.item())

    assert gradient("minimax") < 1e-8
    assert gradient("non_saturating") > 0.99


@pytest.mark.parametrize("name", LOSSES)
def test_a_map_of_patch_scores_counts_element_by_element(name):
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(2, 1, 3, 3, generator=generator).double() for _ in range(2))
    loss = build_loss(name, {})

    def flat(logits: Tensor) -> Tensor:
        return logits.flatten()

    assert loss.critic(real, fake).item() == pytest.approx(
        loss.critic(flat(real), flat(fake)).item()
    )
    elements = [
        loss.critic(r[None], f[None]).item() for r, f in zip(flat(real), flat(fake), strict=True)
    ]
    assert loss.critic(real, fake).item() == pytest.approx(mean(elements))
    elements = [loss.generator(f[None], None).item() for f in flat(fake)]
    assert loss.generator(fake, None).item() == pytest.approx(mean(elements))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("wgam", {}, "unknown loss wgam; did you mean wgan"),
        ("non-saturating", {}, "did you mean non_saturating"),
        ("xyz", {}, "known: minimax, non_saturating, lsgan, wgan"),
        ("lsgan", {"d": 1.0}, r"`objective\.loss\.options\.d`: lsgan takes a, b, c"),
        ("wgan", {"a": 1.0}, "wgan takes none"),
    ],
)
def test_an_unknown_loss_or_option_is_named_with_what_there_is(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        build_loss(name, options)
