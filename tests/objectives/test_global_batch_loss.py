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
    gradients = logit_gradients(loss.critic, {"real": real, "fake": fake})
    expected = total(loss.critic(real, fake))
    torch.testing.assert_close(gradients.terms, loss.critic(real.detach(), fake.detach()))
    value, by_kind = total(gradients.terms), tuple(gradients.gradients.values())
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(by_kind, torch.autograd.grad(expected, (real, fake)))
    found = surrogate_loss({"real": real, "fake": fake}, gradients, scale=1)
    assert found.item() == value.item()
    torch.testing.assert_close(torch.autograd.grad(found, (real, fake)), by_kind)


def test_gradients_of_micro_batches_add_up_to_the_whole():
    real, fake, loss = logits(8, seed=1), logits(8, seed=2), LOSSES["relativistic_average"]()
    gradients = logit_gradients(loss.critic, {"real": real, "fake": fake})
    for index in range(4):
        rows = slice(index, None, 4)
        by_kind = {kind: gradient[rows] for kind, gradient in gradients.gradients.items()}
        share = gradients._replace(gradients=by_kind)
        # Averaged over 4 micro-batches, as the updater does, hence the scale.
        (surrogate_loss({"real": real[rows], "fake": fake[rows]}, share, scale=4) / 4).backward()
    expected = torch.autograd.grad(total(loss.critic(real.detach().requires_grad_(), fake)), fake)
    torch.testing.assert_close(fake.grad, expected[0])
    torch.testing.assert_close(real.grad, gradients.gradients["real"])


def test_large_logits_do_not_blur_the_value_that_is_shown():
    real, fake = (torch.tensor(x, requires_grad=True) for x in ([1e4, 1.0], [-2e4, 0.5]))
    logits = {"real": real, "fake": fake}
    gradients = logit_gradients(LOSSES["lsgan"]().critic, logits)
    value = total(gradients.terms) / 3e8
    small = gradients._replace(terms={"pair": value})
    assert surrogate_loss(logits, small, scale=8).item() == value.item()
