"""Networks that would fail or depend on the cluster are refused before the first step."""

import sys
from typing import Any

import pytest
import torch

from ganscale.errors import UserCodeError, UserError
from ganscale.networks.stylegan2.critic import StyleGAN2Critic
from ganscale.objectives.objective import build_objective
from ganscale.schema import (
    Config,
    CriticConfig,
    DataConfig,
    GeneratorConfig,
    LossConfig,
    ObjectiveConfig,
    OptimizerConfig,
    OptimizersConfig,
    PenaltyConfig,
    TrainingConfig,
)
from ganscale.training.network_setup import build_networks
from tests.helpers.users_networks import (
    BACKBONE,
    CLUSTER_CRITICS,
    FAILING_CRITICS,
    WORKING_CRITICS,
)

MODULE = "tests.helpers.users_networks"


def built(
    critic: str = "plain",
    generator: str = "",
    *,
    seed: int = 0,
    target: str = f"{MODULE}:Generator",
    critic_target: str = f"{MODULE}:Critic",
    penalty: str = "wgan_gp",
    **training,
) -> tuple[Any, Any]:
    config = Config(
        seed=seed,
        data=DataConfig(path="unused", resolution=8),
        generator=GeneratorConfig(target, 6, {"features": generator}),
        critic=CriticConfig(critic_target, {"features": critic}),
        objective=ObjectiveConfig(LossConfig("wgan"), {penalty: PenaltyConfig(10.0)}),
        optimizer=OptimizersConfig(OptimizerConfig(learning_rate=0.1)),
        training=TrainingConfig(total_images=100, global_batch_size=48, **training),
    )
    objective = build_objective(config.objective)
    return build_networks(config, objective, 0, torch.device("cpu"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("critic", CLUSTER_CRITICS)
def test_a_critic_that_would_depend_on_the_cluster_is_refused_for_the_right_reason(critic, seed):
    with pytest.raises(UserError, match=CLUSTER_CRITICS[critic]):
        built(critic, seed=seed)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("critic", FAILING_CRITICS)
def test_a_critic_that_would_fail_in_a_step_is_refused_with_the_line_of_its_code(critic):
    with pytest.raises(UserError, match=FAILING_CRITICS[critic]):
        built(critic)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("critic", WORKING_CRITICS)
def test_a_critic_that_keeps_to_each_image_is_accepted(critic, precision):
    built(critic, precision=precision)


def test_a_view_of_a_feature_map_works_in_the_contiguous_layout():
    built("view_of_a_feature_map", memory_format="contiguous")


@pytest.mark.parametrize("generator", ["mixed", "functional_norm"])
def test_a_generator_that_mixes_latents_is_refused_unless_by_a_batch_norm(generator):
    with pytest.raises(UserError, match="depends on the other latents of its batch"):
        built(generator=generator)
    built(generator="norm")


def test_a_generator_may_look_at_groups_of_latents_that_it_declares():
    built(generator="pairs")
    built("minibatch_standard_deviation", "pairs")
    with pytest.raises(UserError, match="run of 2 consecutive images"):
        built(generator="strided_pairs")


def test_the_groups_of_one_network_are_not_allowed_to_the_other():
    with pytest.raises(UserError, match="depends on the other latents of its batch"):
        built("minibatch_standard_deviation", "mixed")
    with pytest.raises(UserError, match="depends on the other images of its batch"):
        built("deviation_over_groups", "pairs")


UNCONTROLLED = ["uncontrolled_weights", "counting_constructor", "weights_outside_the_state"]


@pytest.mark.parametrize("critic", UNCONTROLLED)
def test_initial_weights_that_do_not_follow_from_the_seed_are_refused(critic):
    with pytest.raises(UserError, match="two critics of the same seed have different initial"):
        built(critic)


def test_initial_weights_from_numpys_generator_follow_from_the_seed():
    (_, first), (_, second), (_, other) = (built("numpy_weights", seed=s) for s in (0, 0, 1))
    assert torch.equal(first.matrix, second.matrix)
    assert not torch.equal(first.matrix, other.matrix)


def test_the_trial_leaves_the_networks_of_the_run_as_they_were_built():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    generator, critic = built(generator="norm")
    assert torch.equal(before, torch.get_rng_state())
    assert critic.gate.item() == 0
    assert critic.last.weight.dtype == torch.float32
    assert not generator.norm.running_mean.any()
    assert generator.training
    assert critic.training


def test_the_trial_does_not_move_weights_that_all_networks_share():
    before = BACKBONE.weight.clone()
    _, critic = built("shared_backbone")
    assert critic.backbone is BACKBONE
    assert torch.equal(BACKBONE.weight, before)
    assert BACKBONE.weight.dtype == torch.float32


def test_a_hook_on_the_gradient_of_a_weight_is_refused():
    with pytest.raises(UserError, match="the critic's `matrix` has a gradient hook"):
        built("gradient_hook")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("critic", ["reordered", "clamped"])
def test_a_critic_whose_loss_and_penalty_cannot_share_a_backward_is_refused(critic, precision):
    target = f"{MODULE}:ConvolutionalCritic"
    built("plain", critic_target=target, precision=precision)
    with pytest.raises(UserError, match="hooks that change gradients, and for layers that change"):
        built(critic, critic_target=target, precision=precision)


def test_a_module_may_draw_when_it_is_imported(tmp_path, monkeypatch):
    source = tmp_path / "nets_that_draw.py"
    source.write_text(
        "import torch\nfrom tests.helpers.users_networks import Generator as Base\n"
        "SCALES = torch.randn(8)\n\n\nclass Generator(Base):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    built(target="nets_that_draw:Generator")


def test_an_exception_of_the_users_is_kept_as_the_cause():
    with pytest.raises(UserCodeError) as caught:
        built("exception")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("batch", [4, 8])
def test_the_trial_of_our_own_networks_computes_no_more_than_a_step(batch, monkeypatch):
    seen = []
    forward = StyleGAN2Critic.forward

    def noted(self, images, labels=None):
        seen.append((len(images), images.dtype))
        return forward(self, images, labels)

    monkeypatch.setattr(StyleGAN2Critic, "forward", noted)
    config = Config(
        data=DataConfig(path="unused", resolution=16),
        generator=GeneratorConfig("stylegan2", 6, {"widths": 8, "style_dim": 8}),
        critic=CriticConfig("stylegan2", {"widths": 8, "group_size": 4}),
        objective=ObjectiveConfig(LossConfig("non_saturating"), {"r1": PenaltyConfig(1.0)}),
        optimizer=OptimizersConfig(OptimizerConfig(learning_rate=0.1)),
        training=TrainingConfig(total_images=100, global_batch_size=batch),
    )
    build_networks(config, build_objective(config.objective), 0, torch.device("cpu"))
    assert {dtype for _, dtype in seen} == {torch.float32}
    assert max(size for size, _ in seen) == batch  # real and fake images each


def test_a_penalty_with_a_dimension_is_refused(tmp_path, monkeypatch):
    (tmp_path / "long_penalties.py").write_text(
        "from ganscale.objectives.penalties import Penalty\n"
        "def own() -> Penalty:\n"
        "    value = lambda g: g.flatten(1).norm(dim=1).mean(dim=0, keepdim=True)\n"
        "    return Penalty(lambda real, fake, draws: real, value)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"long_penalties:own has the shape \(1,\): it must be a"):
        built(penalty="long_penalties:own")


@pytest.mark.parametrize(
    ("value", "is_mean"),
    [
        ("(g.flatten(1).norm(dim=1) - 1).square().mean()", True),
        (
            "((g.flatten(1).norm(dim=1) - 1).square().mean(), g.flatten(1).norm(dim=1).detach())",
            True,
        ),
        ("(g.flatten(1).norm(dim=1).mean() - 1).square()", False),
        ("g.flatten(1).norm(dim=1).sum()", False),
        ("g.square().mean().sqrt()", False),
    ],
)
def test_a_penalty_that_is_not_a_mean_over_images_is_refused(tmp_path, monkeypatch, value, is_mean):
    """Micro-batches and ranks each have a part of the images."""
    (tmp_path / "tried_penalties.py").write_text(
        "from ganscale.objectives.penalties import Penalty\n"
        f"def own() -> Penalty: return Penalty(lambda real, fake, draws: real, lambda g: {value})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tried_penalties", raising=False)
    if is_mean:
        built(penalty="tried_penalties:own")
        return
    with pytest.raises(
        UserError, match="tried_penalties:own is not the mean of a function of each"
    ):
        built(penalty="tried_penalties:own")


def test_a_penalty_for_one_size_of_batches_is_refused_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "sized_penalties.py").write_text(
        "from ganscale.objectives.penalties import Penalty\n"
        "def value(g):\n    if len(g) == 2:\n        raise ValueError('too few')\n"
        "    return g.square().mean()\n"
        "def own() -> Penalty: return Penalty(lambda real, fake, draws: real, value)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserCodeError, match="penalty sized_penalties:own fails on a part of a batch"
    ):
        built(penalty="sized_penalties:own")
