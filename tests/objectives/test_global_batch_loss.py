"""A loss over the whole batch is differentiated through numbers, and differs in nothing."""

import pytest
import torch

from ganscale.objectives.global_batch_loss import logit_gradients, surrogate_loss
from ganscale.objectives.losses import LOSSES, total


def logits(*shape: int, seed: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(5,), (5, 1), (3, 1, 2, 2)])
def test_value_and_gradients_are_those_of_the_loss_itself(name, shape):
    real, fake, loss = logits(*shape, seed=1), logits(*shape, seed=2), LOSSES[name]()
    terms, gradients = logit_gradients(loss.critic, real, fake)
    expected = total(loss.critic(real, fake))
    torch.testing.assert_close(terms, loss.critic(real.detach(), fake.detach()))
    value = total(terms)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (real, fake)))
    found = surrogate_loss(value, (real, fake), gradients, scale=1)
    assert found.item() == value.item()
    torch.testing.assert_close(torch.autograd.grad(found, (real, fake)), gradients)


def test_gradients_of_micro_batches_add_up_to_the_whole():
    real, fake, loss = logits(8, seed=1), logits(8, seed=2), LOSSES["relativistic_average"]()
    terms, gradients = logit_gradients(loss.critic, real, fake)
    for index in range(4):
        rows = slice(index, None, 4)
        share = tuple(gradient[rows] for gradient in gradients)
        # Averaged over 4 micro-batches, as the updater does, hence the scale.
        (surrogate_loss(total(terms), (real[rows], fake[rows]), share, scale=4) / 4).backward()
    expected = torch.autograd.grad(total(loss.critic(real.detach().requires_grad_(), fake)), fake)
    torch.testing.assert_close(fake.grad, expected[0])
    torch.testing.assert_close(real.grad, gradients[0])


def test_large_logits_do_not_blur_the_value_that_is_shown():
    real, fake = (torch.tensor(x, requires_grad=True) for x in ([1e4, 1.0], [-2e4, 0.5]))
    terms, gradients = logit_gradients(LOSSES["lsgan"]().critic, real, fake)
    value = total(terms) / 3e8
    assert surrogate_loss(value, (real, fake), gradients, scale=8).item() == value.item()
