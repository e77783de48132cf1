"""The panel shows every loss on one step's logits, and leaves the step alone."""

import math

import pytest
import torch

from ganscale.objectives.losses import LOSSES, build_loss
from ganscale.objectives.panel import critic_panel, generator_panel

PANEL = {name: build_loss(name, {}) for name in LOSSES}
REAL, FAKE = [0.5, -1.0, 2.0], [0.0, 1.5, -0.5]


def log_loss(differences: list[float]) -> float:
    return sum(math.log(1 + math.exp(-d)) for d in differences) / 3


CROSS_ENTROPY = log_loss(REAL) + log_loss([-x for x in FAKE])
CRITIC = {
    "minimax": CROSS_ENTROPY,
    "non_saturating": CROSS_ENTROPY,
    "lsgan": (0.25 + 4 + 1) / 6 + (0 + 2.25 + 0.25) / 6,
    "wgan": 1 / 3 - 0.5,
    "hinge": (0.5 + 2 + 0) / 3 + (1 + 2.5 + 0.5) / 3,
    "relativistic": log_loss([0.5, -2.5, 2.5]),
    "relativistic_average": log_loss([x - 1 / 3 for x in REAL]) + log_loss([0.5 - x for x in FAKE]),
}
GENERATOR = {
    "minimax": -log_loss([-x for x in FAKE]),
    "non_saturating": log_loss(FAKE),
    "lsgan": (1 + 0.25 + 2.25) / 6,
    "wgan": -1 / 3,
    "hinge": -1 / 3,
    "relativistic": log_loss([-0.5, 2.5, -2.5]),
    "relativistic_average": log_loss([x - 0.5 for x in FAKE]) + log_loss([1 / 3 - x for x in REAL]),
}


def test_the_panel_holds_every_loss_with_its_default_labels():
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    assert set(CRITIC) == set(GENERATOR) == set(LOSSES)
    found = critic_panel(PANEL, real, fake)
    assert found == {f"panel/critic/{k}": pytest.approx(v, rel=1e-5) for k, v in CRITIC.items()}
    found = generator_panel(PANEL, fake, real)
    assert found == {
        f"panel/generator/{k}": pytest.approx(v, rel=1e-5) for k, v in GENERATOR.items()
    }


def test_the_panel_builds_no_graph():
    real, fake = (torch.tensor(x, requires_grad=True) for x in (REAL, FAKE))
    for value in (critic_panel(PANEL, real, fake) | generator_panel(PANEL, fake, real)).values():
        assert not value.requires_grad
        assert value.ndim == 0
