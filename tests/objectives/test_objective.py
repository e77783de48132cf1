"""The config's objective is built whole, or refused with a sentence."""

import pytest
import torch

from ganscale.errors import UserError
from ganscale.objectives.losses import LOSSES
from ganscale.objectives.objective import build_objective
from ganscale.objectives.penalties import Draws
from ganscale.schema import ClipConfig, LossConfig, ObjectiveConfig, PenaltyConfig


def objective(penalties: dict[str, PenaltyConfig], **settings):
    return build_objective(ObjectiveConfig(LossConfig("wgan"), penalties, **settings))


def due(built, update: int) -> set[str]:
    images = torch.zeros(2, 1, 2, 2)
    return set(built.penalty_points(images, images, Draws(0, torch.arange(2)), update))


def test_an_objective_has_its_penalties_and_clipping():
    built = objective(
        {"wgan_gp": PenaltyConfig(10.0), "r1": PenaltyConfig(1.0, 4)}, clip=ClipConfig(0.1)
    )
    found = {name: (p.weight, p.interval) for name, p in built.penalties.items()}
    assert found == {"wgan_gp": (10.0, 1), "r1": (1.0, 4)}
    assert built.clip == ClipConfig(0.1)


def test_a_penalty_of_weight_zero_costs_nothing():
    assert objective({"wgan_gp": PenaltyConfig(0.0)}).penalties == {}


def test_a_lazy_penalty_is_due_at_every_so_many_updates_from_the_first_on():
    built = objective({"wgan_gp": PenaltyConfig(10.0), "r1": PenaltyConfig(1.0, 4)})
    always = {"wgan_gp"}
    found = [due(built, update) for update in range(9)]
    assert found == [always | {"r1"} if update in (0, 4, 8) else always for update in range(9)]
    assert due(built, 4 * 10**12) == {"wgan_gp", "r1"}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("wgan-gp", r"unknown penalty 'wgan-gp' \(did you mean 'wgan_gp'\?\)"),
        ("zzz", "unknown penalty 'zzz'; choose from wgan_gp, wgan_lp, dragan, r1, r2"),
    ],
)
def test_an_unknown_penalty_is_named_with_the_nearest(name, sentence):
    with pytest.raises(UserError, match=sentence):
        objective({name: PenaltyConfig(1.0)})


def test_what_does_not_make_losses_or_penalties_is_never_called(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text(
        "def make(**options):\n    raise AssertionError('called')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="hostile:make is not a penalty"):
        objective({"hostile:make": PenaltyConfig(1.0)})
    for settings in (
        ObjectiveConfig(LossConfig("hostile:make")),
        ObjectiveConfig(LossConfig("wgan"), panel=["hostile:make"]),
    ):
        with pytest.raises(UserError, match="hostile:make is not a loss"):
            build_objective(settings)


def test_the_panel_watches_all_known_losses_and_those_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "watched_losses.py").write_text(
        "from ganscale.objectives.losses import Loss\n"
        "def zero() -> Loss:\n    return Loss(lambda r, f: {'real': 0 * r.mean()},\n"
        "                lambda f: {'fake': 0 * f.mean()})\n"
        "def one() -> Loss:\n    return Loss(lambda r, f: {'real': 1 + 0 * r.mean()},\n"
        "                lambda f: {'fake': 1 + 0 * f.mean()})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loss = LossConfig("watched_losses:one")
    built = build_objective(ObjectiveConfig(loss, panel=["watched_losses:zero"]))
    assert set(built.panel) == {*LOSSES, "zero", "one"}
    assert set(objective({}).panel) == set(LOSSES)
