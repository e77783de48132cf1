"""The gradient penalty against closed forms, and differences of those, in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ganscale.objectives.penalties import input_gradient_norms, interpolates, wgan_gp


class SmoothCritic(nn.Module):
    """D(x) = v . tanh(W x + b) + c, whose input gradient is W^T (v * (1 - tanh^2))."""

    def __init__(self, inputs: int, width: int = 5, seed: int = 0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(
            torch.randn(width, inputs, generator=draws).double() / inputs**0.5
        )
        self.bias = nn.Parameter(torch.randn(width, generator=draws).double())
        self.last = nn.Parameter(torch.randn(width, generator=draws).double())
        self.last_bias = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(images.flatten(1) @ self.weight.T + self.bias)
        return hidden @ self.last + self.last_bias


def penalty_by_hand(images: np.ndarray, weight, bias, last) -> float:
    hidden = np.tanh(images.reshape(len(images), -1) @ weight.T + bias)
    gradients = ((1 - hidden**2) * last) @ weight
    norms = np.array([np.sqrt((gradient**2).sum()) for gradient in gradients])
    return float(((norms - 1) ** 2).mean())


def random_images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_a_linear_critic_has_the_norm_of_its_weights_everywhere():
    weight = random_images(2, 4, 4, seed=2)
    images = random_images(3, 2, 4, 4)
    norms = input_gradient_norms(lambda x, _: (x * weight).flatten(1).sum(1), images, None)
    length = float(np.sqrt((weight.numpy() ** 2).sum()))
    assert norms.tolist() == pytest.approx([length] * 3, rel=1e-12)
    assert wgan_gp(norms).item() == pytest.approx((length - 1) ** 2, rel=1e-12)


def test_a_patch_map_is_averaged_before_it_is_differentiated():
    """w.x at each of P pixels, averaged: the gradient is w / P at each, its norm |w| / sqrt P."""
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64)
    norms = input_gradient_norms(
        lambda x, _: (x * weight.view(1, 2, 1, 1)).sum(1, keepdim=True),
        random_images(3, 2, 6, 6),
        None,
    )
    assert norms.tolist() == pytest.approx([5 / 6] * 3, rel=1e-12)


def test_the_penalty_and_its_gradients_are_those_of_the_closed_form():
    critic, images = SmoothCritic(12), random_images(4, 3, 2, 2)
    penalty = wgan_gp(input_gradient_norms(critic, images, None))
    penalty.backward()
    parameters = [p.detach().numpy().copy() for p in (critic.weight, critic.bias, critic.last)]
    assert penalty.item() == pytest.approx(penalty_by_hand(images.numpy(), *parameters), rel=1e-12)
    step = 1e-6
    for which, parameter in enumerate((critic.weight, critic.bias, critic.last)):
        assert parameter.grad is not None
        for index in np.ndindex(*parameter.shape):
            values = []
            for sign in (1, -1):
                moved = [array.copy() for array in parameters]
                moved[which][index] += sign * step
                values.append(penalty_by_hand(images.numpy(), *moved))
            slope = (values[0] - values[1]) / (2 * step)
            assert parameter.grad[index].item() == pytest.approx(slope, abs=1e-8)
    assert critic.last_bias.grad is None or critic.last_bias.grad.item() == 0


def test_a_samples_norm_does_not_depend_on_the_rest_of_its_batch():
    critic, images = SmoothCritic(12), random_images(4, 3, 2, 2)
    alone = [input_gradient_norms(critic, image[None], None).item() for image in images]
    assert input_gradient_norms(critic, images, None).tolist() == pytest.approx(alone, rel=1e-12)


def test_labels_reach_the_critic_with_their_images():
    def critic(images: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return images.flatten(1).sum(1) * labels

    labels = torch.tensor([1, 2, 3])
    norms = input_gradient_norms(critic, random_images(3, 1, 2, 2), labels)
    assert norms.tolist() == pytest.approx([2.0, 4.0, 6.0], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_critic_is_penalised_by_one_and_gets_finite_gradients(dtype):
    critic = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1)).to(dtype)
    for parameter in critic.parameters():
        nn.init.zeros_(parameter)
    images = random_images(3, 2, 2, 2).to(dtype)
    penalty = wgan_gp(input_gradient_norms(lambda x, _: critic(x), images, None))
    penalty.backward()
    assert penalty.item() == 1
    for parameter in critic.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_inside_autocast_the_penalty_is_what_it_is_in_float32():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 1))
    images = random_images(4, 3, 4, 4).bfloat16()
    gradients = []
    for enabled in (False, True):
        critic.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if enabled:
                assert critic(images).dtype == torch.bfloat16
            norms = input_gradient_norms(lambda x, _: critic(x), images, None)
            penalty = wgan_gp(norms)
        assert norms.dtype == penalty.dtype == torch.float32
        penalty.backward()
        gradients.append(
            [penalty.detach(), *(p.grad for p in critic.parameters() if p.grad is not None)]
        )
    for in_float32, in_autocast in zip(*gradients, strict=True):
        assert torch.equal(in_float32, in_autocast)


def test_interpolates_mix_each_pair_by_its_own_coefficient():
    real, fake = random_images(4, 3, 2, 2), random_images(4, 3, 2, 2, seed=5)
    coefficients = torch.tensor([0.0, 0.25, 0.5, 1.0])
    mixed = interpolates(real, fake, coefficients).numpy()
    for i, epsilon in enumerate([0.0, 0.25, 0.5, 1.0]):
        expected = epsilon * real[i].numpy() + (1 - epsilon) * fake[i].numpy()
        np.testing.assert_allclose(mixed[i], expected, rtol=0, atol=1e-15)


def test_interpolates_of_bfloat16_images_are_made_in_float32():
    real, fake = random_images(2, 1, 4, 4).bfloat16(), random_images(2, 1, 4, 4, seed=5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = interpolates(real, fake, torch.tensor([0.3, 0.6]))
    assert mixed.dtype == torch.float32
    expected = interpolates(real.double(), fake.double(), torch.tensor([0.3, 0.6]))
    assert torch.allclose(mixed.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_penalty_sends_no_gradient_into_real_or_fake_images():
    real, fake = random_images(3, 3, 2, 2).requires_grad_(), random_images(3, 3, 2, 2, seed=5)
    fake.requires_grad_()
    critic = SmoothCritic(12)
    images = interpolates(real, fake, torch.tensor([0.2, 0.5, 0.9]))
    wgan_gp(input_gradient_norms(critic, images, None)).backward()
    assert real.grad is None
    assert fake.grad is None
    assert critic.weight.grad is not None
