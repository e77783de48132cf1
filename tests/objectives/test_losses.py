"""The losses are those of their papers."""

import sys
from functools import partial
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.rivals import formulas
from benchmarks.rivals.formulas import cross_entropy, squared_error
from ganscale.errors import UserError
from ganscale.objectives.losses import LOSSES, Loss, Terms, build_loss, total


def smoothed(real: Tensor, fake: Tensor) -> list[Tensor]:
    """Label 0.9 for real images, 0 for fakes: Salimans et al. 2016 (arXiv:1606.03498), 3.4."""
    return [cross_entropy(0.9, real), cross_entropy(0, fake)]


# name, options, the paper's loss
PAPERS = {
    **{name: ({}, paper) for name, paper in formulas.LOSSES.items()},
    "minimax, smoothed": ({"smoothing": 0.1}, formulas.LOSSES["minimax"]._replace(critic=smoothed)),
    "non_saturating, smoothed": (
        {"smoothing": 0.1},
        formulas.LOSSES["non_saturating"]._replace(critic=smoothed),
    ),
    "lsgan, equation 8": (
        {"a": -1.0, "b": 1.0, "c": 0.0},
        formulas.Loss(
            lambda real, fake: [squared_error(1, real), squared_error(-1, fake)],
            lambda fake, _: squared_error(0, fake),
        ),
    ),
}
each_paper = pytest.mark.parametrize(
    ("name", "options", "paper"),
    [pytest.param(name.split(",")[0], *case, id=name) for name, case in PAPERS.items()],
)
logit = st.floats(-10, 10)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def float64(*logits) -> list[Tensor]:
    return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in logits]


def critic_loss(loss: Loss, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return total(loss.critic(real_logits, fake_logits))


def generator_loss(loss: Loss, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    return total(loss.generator_terms(fake_logits, real_logits))


@each_paper
@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(logit, logit), min_size=1, max_size=8))
def test_a_loss_is_its_papers_equation(name, options, paper, pairs):
    loss = build_loss(name, options)
    real, fake = float64(*zip(*pairs, strict=True))
    close(critic_loss(loss, real, fake), sum(paper.critic(real, fake)))
    for optional in [real] if loss.generator_needs_real else [real, None]:
        close(generator_loss(loss, fake, optional), paper.generator(fake, real))


def test_every_registered_loss_is_held_against_its_paper():
    assert {name.split(",")[0] for name in PAPERS} == set(LOSSES)


@each_paper
def test_gradients_are_those_of_the_papers_equation(name, options, paper):
    loss, (real, fake) = build_loss(name, options), float64([-2.0, 0.3, 4.0], [1.5, -0.7, 0.0])
    of_critic = torch.autograd.grad(critic_loss(loss, real, fake), (real, fake))
    close(of_critic, torch.autograd.grad(paper.critic(real, fake), (real, fake)))
    of_generator = torch.autograd.grad(generator_loss(loss, fake, real), fake)
    close(of_generator, torch.autograd.grad(paper.generator(fake, real), fake))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(name, dtype):
    values = torch.tensor([-1e4, 1e4, -1e4, 1e4], dtype=dtype)
    real_logits, fake_logits = values.clone().requires_grad_(), values.flip(0).requires_grad_()
    loss = build_loss(name, {})
    both = critic_loss(loss, real_logits, fake_logits)
    both = both + generator_loss(loss, fake_logits, real_logits)
    both.backward()
    for tensor in (both, real_logits.grad, fake_logits.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


@pytest.mark.parametrize(
    "name", ["minimax", "non_saturating", "relativistic", "relativistic_average"]
)
def test_a_sure_and_wrong_critic_loses_as_many_nats_as_logits(name):
    """-log D of a logit of -1e4 is 1e4, where log(sigmoid) would be infinite."""
    loss = build_loss(name, {})
    wrong = critic_loss(loss, torch.tensor([-1e4]), torch.tensor([1e4]))
    assert wrong.item() == 4e4 if name == "relativistic_average" else 2e4
    right = critic_loss(loss, torch.tensor([1e4]), torch.tensor([-1e4]))
    assert right.item() == 0


def test_only_the_minimax_generator_starves_while_the_critic_wins():
    def gradient(name: str) -> float:
        logits = torch.tensor([-20.0], requires_grad=True)
        generator_loss(build_loss(name, {}), logits).backward()
        assert logits.grad is not None
        return abs(logits.grad.item())

    assert gradient("minimax") < 1e-8
    assert gradient("non_saturating") > 0.99


@pytest.mark.parametrize("name", LOSSES)
def test_a_map_of_patch_scores_counts_element_by_element(name):
    draws = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(2, 1, 3, 3, generator=draws).double() for _ in range(2))
    loss = build_loss(name, {})
    flat_real, flat_fake = real.flatten(), fake.flatten()
    of_critic, of_generator = critic_loss(loss, real, fake), generator_loss(loss, fake, real)
    torch.testing.assert_close(of_critic, critic_loss(loss, flat_real, flat_fake))
    torch.testing.assert_close(of_generator, generator_loss(loss, flat_fake, flat_real))
    if loss.needs_global_batch:
        return
    pairs = list(zip(flat_real.split(1), flat_fake.split(1), strict=True))
    critic_mean = fmean(critic_loss(loss, r, f).item() for r, f in pairs)
    assert of_critic.item() == pytest.approx(critic_mean)
    generator_mean = fmean(generator_loss(loss, f, r).item() for r, f in pairs)
    assert of_generator.item() == pytest.approx(generator_mean)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_takes_real_logits_for_its_generator_only_if_it_compares(name):
    loss, fake_logits = build_loss(name, {}), torch.tensor([0.5])
    assert loss.generator_needs_real == name.startswith("relativistic")
    if loss.generator_needs_real:
        with pytest.raises(ValueError, match="needs the logits of real images"):
            generator_loss(loss, fake_logits)


def test_options_of_a_generator_loss_are_not_taken_for_real_logits() -> None:
    logits = torch.tensor([0.25, 1.0])

    def with_margin(fake_logits: Tensor, margin: float = 1.0) -> Terms:
        return {"fake": (margin - fake_logits).mean()}

    def with_real(fake_logits: Tensor, real_logits: Tensor) -> Terms:
        return {"pair": (real_logits - fake_logits).mean()}

    def maybe_with_real(fake_logits: Tensor, real_logits: Tensor | None = None) -> Terms:
        assert real_logits is not None
        return {"pair": (real_logits - fake_logits).mean()}

    critic = with_real
    assert not Loss(critic, with_margin).generator_needs_real
    assert not Loss(critic, partial(with_margin, margin=2.0)).generator_needs_real
    assert not Loss(critic, lambda fake, *, scale=1.0: {"fake": scale * fake}).generator_needs_real
    assert Loss(critic, with_real).generator_needs_real
    assert Loss(critic, maybe_with_real).generator_needs_real
    terms = Loss(critic, with_margin).generator_terms(logits, torch.full((2,), 7.0))
    assert terms["fake"].item() == 1 - 0.625


def test_a_loss_that_compares_images_with_the_whole_batch_is_found_by_trial():
    found = {name for name in LOSSES if build_loss(name, {}).needs_global_batch}
    assert found == {"relativistic_average"}

    def variance(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        return {"real": real.var(), "fake": fake.mean()}

    def centred(fake: Tensor) -> dict[str, Tensor]:
        return {"fake": (fake - fake.mean()).square().mean()}

    wgan = build_loss("wgan", {})
    assert Loss(variance, wgan.generator).needs_global_batch
    assert Loss(wgan.critic, centred).needs_global_batch
    assert not Loss(wgan.critic, wgan.generator).needs_global_batch


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("wgam", {}, r"unknown loss 'wgam' \(did you mean 'wgan'\?\)"),
        ("non-saturating", {}, "did you mean 'non_saturating'"),
        ("xyz", {}, "unknown loss 'xyz'; choose from minimax, non_saturating, lsgan, wgan"),
        ("lsgan", {"d": 1.0}, "loss lsgan has no option 'd'; choose from a, b, c"),
        ("wgan", {"a": 1.0}, "loss wgan has no option 'a'; it has no options"),
        ("no.such.module:loss", {}, "no module no in the current folder"),
        ("math:sqrt", {"x": 4.0}, "math:sqrt is not a loss: it must be a subclass"),
        ("collections:Counter", {}, "collections:Counter is not a loss"),
    ],
)
def test_an_unknown_loss_or_option_is_named_with_what_there_is(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        build_loss(name, options)


def test_a_loss_of_ones_own_is_found_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "from ganscale.objectives.losses import Loss\n"
        "def scaled(factor=1.0) -> Loss:\n"
        "    return Loss(lambda r, f: {'pair': factor * (f - r).mean()},\n"
        "                lambda f: {'fake': -factor * f.mean()})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loss = build_loss("my_losses:scaled", {"factor": 3.0})
    assert critic_loss(loss, torch.tensor([1.0]), torch.tensor([2.0])).item() == 3
    with pytest.raises(UserError, match=r"has no option 'faktor' \(did you mean 'factor'\?\)"):
        build_loss("my_losses:scaled", {"faktor": 3.0})


@pytest.mark.parametrize(
    ("critic", "sentence"),
    [
        ("f.mean() - r.mean()", "must return its terms, a dict of scalar tensors under 'real'"),
        ("{'real': r, 'fake': f}", "must return its terms"),
        ("{'reel': r.mean(), 'fake': f.mean()}", "must return its terms"),
        ("{}", "must return its terms"),
        ("{'real': r.no_such_method()}", "fails: AttributeError"),
    ],
)
def test_a_loss_of_ones_own_that_returns_no_terms_is_refused(
    tmp_path, monkeypatch, critic, sentence
):
    (tmp_path / "bad_losses.py").write_text(
        "from ganscale.objectives.losses import Loss\n"
        "def of() -> Loss:\n"
        f"    return Loss(lambda r, f: {critic}, lambda f: {{'fake': -f.mean()}})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_losses", raising=False)
    with pytest.raises(UserError, match=sentence):
        build_loss("bad_losses:of", {})
