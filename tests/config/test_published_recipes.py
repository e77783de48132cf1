"""The shipped configs of R3GAN and StyleGAN2 have the numbers that their authors published."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ganscale.config import resolve
from ganscale.networks.build import build_network
from ganscale.networks.r3gan import R3GANCritic, R3GANGenerator, ResidualBlock, Stage
from ganscale.schedules import Schedule
from ganscale.schema import Config
from tests.helpers.processes import REPOSITORY

CONFIGS = REPOSITORY / "configs"
STYLEGAN2 = sorted(CONFIGS.glob("stylegan2_*.yaml"))


@dataclass(frozen=True)
class Recipe:
    """A row of R3GAN's table of hyperparameters (Huang et al. 2024, arXiv:2501.05441; the rest is
    in its public code)."""

    resolution: int
    batch: int
    gamma: tuple[float, float]
    augmentation: float  # its probability at the end
    ema: int  # its half-life at the end
    over_images: int  # the length of all schedules
    widths: list[int]  # from 4x4 pixels up
    bfloat16_stages: int
    group_width: int = 16
    is_conditional: bool = False


RECIPES = {
    "cifar10": Recipe(
        32, 512, (0.05, 0.005), 0.55, 5_000_000, 20_000_000, [768] * 4, 3, is_conditional=True
    ),
    "ffhq64": Recipe(64, 256, (2, 0.2), 0.3, 500_000, 20_000_000, [768] * 4 + [384], 4),
    "ffhq256": Recipe(256, 256, (150, 15), 0.3, 500_000, 20_000_000, [768] * 4 + [384, 192, 96], 4),
    "imagenet32": Recipe(
        32, 4096, (0.5, 0.05), 0.5, 50_000_000, 200_000_000, [1536] * 4, 3, 32, True
    ),
    "imagenet64": Recipe(64, 4096, (1, 0.1), 0.4, 50_000_000, 200_000_000, [1536] * 5, 4, 32, True),
}


def preset(name: str) -> Config:
    return resolve([str(CONFIGS / f"r3gan_{name}.yaml")]).config


def test_every_preset_of_the_paper_is_held_to_it() -> None:
    of_our_own = {"emoji32"}
    shipped = {path.stem.removeprefix("r3gan_") for path in CONFIGS.glob("r3gan_*.yaml")}
    assert shipped - of_our_own == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_of_r3gan_trains_as_the_paper_does(name: str) -> None:
    recipe, config = RECIPES[name], preset(name)
    over = recipe.over_images
    assert config.data.size == (recipe.resolution, recipe.resolution)
    assert config.data.flip
    training = config.training
    assert (training.global_batch_size, training.conditional) == (
        recipe.batch,
        recipe.is_conditional,
    )
    assert (training.precision, training.tf32, training.generator_real) == (
        "float32",
        False,
        "fresh",
    )
    objective = config.objective
    assert (objective.loss.name, objective.n_critic, objective.clip) == ("relativistic", 1, None)
    assert {name: (each.weight, each.interval) for name, each in objective.penalties.items()} == {
        name: (Schedule(*recipe.gamma, over), 1) for name in ("r1", "r2")
    }
    for optimizer in (config.optimizer.critic, config.optimizer.generator):
        assert optimizer.name == "adam"
        assert optimizer.learning_rate == Schedule(2e-4, 5e-5, over)
        assert optimizer.betas == [0, Schedule(0.9, 0.99, over)]
        assert (optimizer.eps, optimizer.weight_decay) == (1e-8, 0)
    augmentation = config.augmentation
    assert (augmentation.pipeline, augmentation.adaptive) == ("ada", None)
    assert augmentation.strengths == {"blit": 1, "geom": 1, "color": 0.5, "cutout": 1}
    assert augmentation.probability == Schedule(0, recipe.augmentation, over)


@pytest.mark.parametrize("name", RECIPES)
def test_the_ramp_up_of_the_ema_does_not_shorten_the_papers_half_life(name: str) -> None:
    recipe, ema = RECIPES[name], preset(name).ema
    half_life = ema.half_life_images
    assert half_life == Schedule(0, recipe.ema, recipe.over_images)
    assert isinstance(half_life, Schedule)
    for seen in range(recipe.batch, 2 * recipe.over_images, recipe.over_images // 500):
        assert half_life.at(seen) <= ema.ramp_up * seen


@pytest.mark.parametrize("role", ["generator", "critic"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_of_r3gan_has_the_papers_networks(name: str, role: str) -> None:
    recipe, config = RECIPES[name], preset(name)
    of_role = getattr(config, role)
    facts = {"sample_shape": config.data.sample_shape, "num_classes": 10 * recipe.is_conditional}
    facts |= {"latent_dim": of_role.latent_dim} if role == "generator" else {}
    with torch.device("meta"):
        network = build_network(role, of_role.target, of_role.options, **facts)
    assert isinstance(network, R3GANGenerator | R3GANCritic)
    stages: list[Stage] = [*network.stages]  # type: ignore[list-item]
    if role == "generator":
        assert config.generator.latent_dim == 64
        inputs = 64 + 64 * recipe.is_conditional  # an embedding of the class beside the latent
        assert network.modulation.in_features == inputs  # type: ignore[union-attr]
    else:
        stages.reverse()
    found = [[each for each in stage if isinstance(each, ResidualBlock)] for stage in stages]
    assert [[each.conv1.in_channels for each in blocks] for blocks in found] == [
        [width] * 2 for width in recipe.widths
    ]
    for block in (block for blocks in found for block in blocks):
        assert block.conv2.out_channels == 2 * block.conv1.in_channels
        assert block.conv2.weight.shape[1] == recipe.group_width
    count = len(recipe.widths)
    assert [stage.is_bfloat16 for stage in stages] == [
        stage >= count - recipe.bfloat16_stages for stage in range(count)
    ]


@pytest.mark.parametrize("path", STYLEGAN2, ids=lambda path: path.stem)
def test_a_preset_of_stylegan2_has_the_published_numbers(path: Path) -> None:
    """Karras et al. 2020 (arXiv:1912.04958, arXiv:2006.06676), and the automatic settings of their
    code."""
    config = resolve([str(path)]).config
    resolution, batch = config.data.size[0], config.training.global_batch_size
    gamma = 0.0002 * resolution**2 / batch
    assert f"{resolution}" in path.stem
    (r1,) = config.objective.penalties.values()
    assert [*config.objective.penalties] == ["r1"]
    assert r1.weight == pytest.approx(gamma, rel=1e-12)
    assert r1.interval == 16
    lengths = config.objective.generator_penalties["path_length"]
    assert (lengths.weight, lengths.interval, lengths.decay) == (2, 4, 0.01)
    assert (config.objective.loss.name, config.objective.n_critic) == ("non_saturating", 1)
    rate = 2e-3 if resolution >= 1024 else 2.5e-3
    for optimizer in (config.optimizer.critic, config.optimizer.generator):
        assert (optimizer.name, optimizer.learning_rate) == ("adam", rate)
        assert (optimizer.betas, optimizer.eps) == ([0, 0.99], 1e-8)
    assert (config.ema.half_life_images, config.ema.ramp_up) == (10_000, 0.05)
    adaptive = config.augmentation.adaptive
    assert adaptive is not None
    assert (adaptive.target, adaptive.every_images) == (0.6, 4 * batch)
    assert config.augmentation.strengths == {"blit": 1, "geom": 1, "color": 1}
    if "ada" in path.stem:  # the emoji's are ours: fewer images, smaller networks
        assert adaptive.full_images == 500_000
        assert config.generator.latent_dim == 512
        base = 16384 if resolution < 512 else 32768
        for options in (config.generator.options, config.critic.options):
            assert (options["channel_base"], options["bfloat16_stages"]) == (base, 4)
        assert config.generator.options["style_mixing"] == 0.9
        assert config.critic.options["group_size"] == 4
