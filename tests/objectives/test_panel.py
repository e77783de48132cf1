"""The panel shows every loss on one step's logits, and leaves the step alone."""

import torch

from benchmarks.rivals.formulas import LOSSES as formulas
from ganscale.objectives.losses import LOSSES, build_loss
from ganscale.objectives.objective import panel_meters

PANEL = {name: build_loss(name, {}) for name in LOSSES}
REAL, FAKE = [0.5, -1.0, 2.0], [0.0, 1.5, -0.5]


def test_the_panel_holds_every_loss_with_its_default_labels():
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    of_critic = {f"panel/critic/{k}": sum(v.critic(real, fake)) for k, v in formulas.items()}
    of_generator = {f"panel/generator/{k}": v.generator(fake, real) for k, v in formulas.items()}
    torch.testing.assert_close(
        panel_meters("critic", PANEL, {"real": real, "fake": fake}), of_critic
    )
    torch.testing.assert_close(
        panel_meters("generator", PANEL, {"fake": fake, "real": real}), of_generator
    )


def test_the_panel_builds_no_graph():
    real, fake = (torch.tensor(x, requires_grad=True) for x in (REAL, FAKE))
    for value in (
        panel_meters("critic", PANEL, {"real": real, "fake": fake})
        | panel_meters("generator", PANEL, {"fake": fake, "real": real})
    ).values():
        assert not value.requires_grad
        assert value.ndim == 0
