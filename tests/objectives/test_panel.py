"""The panel shows every loss on one step's logits, and leaves the step alone."""

import math

import pytest
import torch

from ganscale.objectives.losses import LOSSES
from ganscale.objectives.panel import critic_panel, generator_panel

REAL, FAKE = [0.5, -1.0, 2.0], [0.0, 1.5, -0.5]


def test_the_panel_holds_every_loss_with_its_default_labels():
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    cross_entropy = sum(math.log(1 + math.exp(-x)) for x in REAL) / 3
    cross_entropy += sum(math.log(1 + math.exp(x)) for x in FAKE) / 3
    critic = {
        "minimax": cross_entropy,
        "non_saturating": cross_entropy,
        "lsgan": (0.25 + 4 + 1) / 6 + (0 + 2.25 + 0.25) / 6,
        "wgan": 1 / 3 - 0.5,
    }
    generator = {
        "minimax": -sum(math.log(1 + math.exp(x)) for x in FAKE) / 3,
        "non_saturating": sum(math.log(1 + math.exp(-x)) for x in FAKE) / 3,
        "lsgan": (1 + 0.25 + 2.25) / 6,
        "wgan": -1 / 3,
    }
    assert set(critic) == set(LOSSES)
    found = critic_panel(real, fake)
    assert found == {f"panel/critic/{k}": pytest.approx(v, rel=1e-6) for k, v in critic.items()}
    found = generator_panel(fake, real)
    assert found == {
        f"panel/generator/{k}": pytest.approx(v, rel=1e-6) for k, v in generator.items()
    }


def test_the_panel_builds_no_graph():
    real, fake = (torch.tensor(x, requires_grad=True) for x in (REAL, FAKE))
    for value in (critic_panel(real, fake) | generator_panel(fake, real)).values():
        assert not value.requires_grad
        assert value.ndim == 0
