"""The gradient penalties against closed forms, and differences of those, in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ganscale.objectives.penalties import PENALTIES, Draws, input_gradients, norms
from ganscale.randomness import uniform
from tests.helpers.networks import SmoothCritic

BATCH, SHAPE = 4, (3, 2, 2)


def gradients_by_hand(images: np.ndarray, weight, bias, last) -> np.ndarray:
    hidden = np.tanh(images.reshape(len(images), -1) @ weight.T + bias)
    return (((1 - hidden**2) * last) @ weight).reshape(images.shape)


def lengths(gradients: np.ndarray) -> np.ndarray:
    return np.array([np.sqrt((gradient**2).sum()) for gradient in gradients])


def lengths_of_pixels(gradients: np.ndarray) -> np.ndarray:
    return np.sqrt((gradients**2).sum(axis=1))


# The papers' values of gradients at the points, in NumPy.
VALUES = {
    "wgan_gp": lambda gradients: ((lengths(gradients) - 1) ** 2).mean(),
    "wgan_lp": lambda gradients: (np.maximum(0, lengths(gradients) - 1) ** 2).mean(),
    "dragan": lambda gradients: ((lengths(gradients) - 1) ** 2).mean(),
    "r1": lambda gradients: (lengths(gradients) ** 2).mean() / 2,
    "r2": lambda gradients: (lengths(gradients) ** 2).mean() / 2,
    "wgan_gp_pixel": lambda gradients: ((lengths_of_pixels(gradients) - 1) ** 2).mean(),
}
each_penalty = pytest.mark.parametrize("name", PENALTIES)


def random_images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def draws_of(batch: int, first: int = 1000, seed: int = 7) -> Draws:
    return Draws(seed, first + torch.arange(batch))


def value(name: str, critic, images: Tensor, labels: Tensor | None = None) -> Tensor:
    return PENALTIES[name]().value_and_norms(input_gradients(critic, images, labels))[0]


def test_every_registered_penalty_is_held_against_its_paper():
    assert set(VALUES) == set(PENALTIES)


@each_penalty
@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0])
def test_a_linear_critic_is_penalised_for_its_weights_wherever_it_is_looked_at(name, scale):
    weight = scale * random_images(*SHAPE, seed=2)
    length = float(np.sqrt((weight.numpy() ** 2).sum()))
    expected = {
        "wgan_gp": (length - 1) ** 2,
        "wgan_lp": (length - 1) ** 2 if length > 1 else 0,
        "dragan": (length - 1) ** 2,
        "r1": length**2 / 2,
        "r2": length**2 / 2,
        "wgan_gp_pixel": ((lengths_of_pixels(weight.numpy()[None]) - 1) ** 2).mean(),
    }
    penalty = PENALTIES[name]()
    real, fake = random_images(BATCH, *SHAPE), random_images(BATCH, *SHAPE, seed=5)
    images = penalty.points(real, fake, draws_of(BATCH))
    found = value(name, lambda x, _: (x * weight).flatten(1).sum(1), images)
    assert found.item() == pytest.approx(expected[name], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("patch_score", "length"), [("sum", 5 * 6), ("mean", 5 / 6)])
def test_the_score_of_a_patch_map_is_its_sum_or_its_mean(patch_score, length):
    """w.x at each of P pixels: the gradient of the sum is w at each, its norm |w| sqrt P; that of
    the mean is smaller by P."""
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64)
    gradients = input_gradients(
        lambda x, _: (x * weight.view(1, 2, 1, 1)).sum(1, keepdim=True),
        random_images(3, 2, 6, 6),
        None,
        patch_score=patch_score,
    )
    assert norms(gradients).tolist() == pytest.approx([length] * 3, rel=1e-12)


@each_penalty
def test_a_penalty_and_its_gradients_are_those_of_the_closed_form(name):
    """Central differences of the closed form, weight by weight."""
    critic, images = SmoothCritic(), random_images(BATCH, *SHAPE)
    penalty = value(name, critic, images)
    penalty.backward()
    parameters = [p.detach().numpy().copy() for p in (critic.weight, critic.bias, critic.last)]

    def by_hand(moved: list[np.ndarray]) -> float:
        return float(VALUES[name](gradients_by_hand(images.numpy(), *moved)))

    assert penalty.item() == pytest.approx(by_hand(parameters), rel=1e-12)
    step = 1e-6
    for which, parameter in enumerate((critic.weight, critic.bias, critic.last)):
        assert parameter.grad is not None
        for index in np.ndindex(*parameter.shape):
            values = []
            for sign in (1, -1):
                moved = [array.copy() for array in parameters]
                moved[which][index] += sign * step
                values.append(by_hand(moved))
            slope = (values[0] - values[1]) / (2 * step)
            assert parameter.grad[index].item() == pytest.approx(slope, abs=1e-7)
    assert critic.last_bias.grad is None or critic.last_bias.grad.item() == 0


def test_a_samples_gradient_does_not_depend_on_the_rest_of_its_batch():
    critic, images = SmoothCritic(), random_images(BATCH, *SHAPE)
    alone = torch.cat([input_gradients(critic, image[None], None) for image in images])
    torch.testing.assert_close(input_gradients(critic, images, None), alone)


def test_labels_reach_the_critic_with_their_images():
    def critic(images: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return images.flatten(1).sum(1) * labels

    labels = torch.tensor([1, 2, 3])
    gradients = input_gradients(critic, random_images(3, 1, 2, 2), labels)
    assert norms(gradients).tolist() == pytest.approx([2.0, 4.0, 6.0], rel=1e-12)


@each_penalty
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_critic_gets_a_finite_penalty_and_finite_gradients(name, dtype):
    critic = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1)).to(dtype)
    for parameter in critic.parameters():
        nn.init.zeros_(parameter)
    penalty = value(name, lambda x, _: critic(x), random_images(3, 2, 2, 2).to(dtype))
    penalty.backward()
    assert penalty.item() == VALUES[name](np.zeros((3, 2, 2, 2)))
    for parameter in critic.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@each_penalty
def test_inside_autocast_a_penalty_is_what_it_is_in_float32_and_nearly_in_float64(name):
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 1))
    images = 2 * random_images(BATCH, 3, 4, 4).bfloat16()

    def results(network: nn.Module, at: Tensor, in_bfloat16: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            assert (network(at).dtype == torch.bfloat16) == in_bfloat16
            penalty = value(name, lambda x, _: network(x), at)
        slopes = torch.autograd.grad(penalty, list(network.parameters())[:-1])
        return [penalty.detach(), *slopes]

    in_autocast = results(critic, images, in_bfloat16=True)
    assert in_autocast[0].dtype == torch.float32
    in_float32 = results(critic, images.float(), in_bfloat16=False)
    assert all(map(torch.equal, in_autocast, in_float32))
    in_float64 = results(critic.double(), images.double(), in_bfloat16=False)
    for found, exact in zip(in_autocast, in_float64, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def coefficients(purpose: str, draws: Draws) -> list[float]:
    return uniform(draws.seed, purpose, draws.slots).squeeze(1).double().tolist()


@pytest.mark.parametrize("name", ["wgan_gp", "wgan_lp"])
def test_each_pair_is_mixed_by_a_coefficient_of_its_own(name):
    real, fake, draws = (
        random_images(BATCH, *SHAPE),
        random_images(BATCH, *SHAPE, seed=5),
        draws_of(BATCH),
    )
    mixed = PENALTIES[name]().points(real, fake, draws).numpy()
    epsilons = coefficients("interpolation", draws)
    assert len(set(epsilons)) == BATCH
    for i, epsilon in enumerate(epsilons):
        expected = epsilon * real[i].numpy() + (1 - epsilon) * fake[i].numpy()
        np.testing.assert_allclose(mixed[i], expected, rtol=0, atol=1e-14)


def test_the_pixel_variant_mixes_all_pairs_by_one_coefficient():
    real, fake = random_images(BATCH, *SHAPE), random_images(BATCH, *SHAPE, seed=5)
    points = PENALTIES["wgan_gp_pixel"]().points
    mixed = points(real, fake, draws_of(BATCH))
    shares = ((mixed - fake) / (real - fake)).flatten()
    assert shares.min().item() == pytest.approx(shares.max().item(), rel=1e-9)
    assert 0 <= shares[0] < 1
    later = points(real, fake, draws_of(BATCH, first=2000))
    assert not torch.allclose(later, mixed)


def test_r1_looks_at_real_images_and_r2_at_fakes():
    real, fake = random_images(BATCH, *SHAPE), random_images(BATCH, *SHAPE, seed=5)
    assert torch.equal(PENALTIES["r1"]().points(real, fake, draws_of(BATCH)), real)
    assert torch.equal(PENALTIES["r2"]().points(real, fake, draws_of(BATCH)), fake)


def test_dragan_moves_real_images_up_by_a_share_of_half_their_deviation():
    """x + alpha u std(x) / 2, and the deviation is that of the batch as one list of numbers."""
    real = 3 + 2 * random_images(64, *SHAPE)
    moved = PENALTIES["dragan"]().points(real, real * 0, draws_of(64))
    deviation = real.numpy().std()
    shares = ((moved - real) / (deviation / 2)).flatten(1)
    assert shares.min() >= 0
    assert shares.max() < 1
    alphas = coefficients("dragan share", draws_of(64))
    for share, alpha in zip(shares, alphas, strict=True):
        noise = share / alpha  # uniform in [0, 1) for each element
        assert noise.max() < 1 + 1e-12
        assert noise.std() > 0.1
    # E[alpha u] = 1/4; its variance is 7/144, most of it from alpha, one a sample.
    assert shares.mean().item() == pytest.approx(0.25, abs=4 * (7 / 144 / 64) ** 0.5)


def test_a_ranks_points_are_its_part_of_the_global_batchs():
    """All but DRAGAN's, whose deviation is the global batch's: see the tests on several ranks."""
    real, fake = random_images(8, *SHAPE), random_images(8, *SHAPE, seed=5)
    for name in set(PENALTIES) - {"dragan"}:
        points = PENALTIES[name]().points
        whole = points(real, fake, draws_of(8))
        for part in (slice(0, 2), slice(2, 8)):
            draws = Draws(7, 1000 + torch.arange(8)[part], offset=part.start)
            assert torch.equal(points(real[part], fake[part], draws), whole[part]), name


def test_draws_have_one_number_a_sample_an_element_or_a_batch():
    draws, like = draws_of(BATCH), torch.zeros(BATCH, *SHAPE)
    assert draws.per_sample("a", like).shape == (BATCH, 1, 1, 1)
    assert draws.per_batch("a", like).numel() == 1
    elements = draws.per_element("a", like)
    assert elements.shape == like.shape
    assert len(elements.unique()) == elements.numel()
    assert not torch.equal(elements, draws.per_element("b", like))
    assert draws.per_sample("a", like.double()).dtype == torch.float64


@each_penalty
def test_a_penalty_sends_no_gradient_into_real_or_fake_images(name):
    real, fake = random_images(3, *SHAPE), random_images(3, *SHAPE, seed=5)
    real.requires_grad_()
    fake.requires_grad_()
    critic = SmoothCritic()
    value(name, critic, PENALTIES[name]().points(real, fake, draws_of(3))).backward()
    assert real.grad is None
    assert fake.grad is None
    assert critic.weight.grad is not None
