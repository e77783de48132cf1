"""Training with augmentation is the published mathematics, and does not know its cluster either;
`test_invariance.py` has it among its combinations."""

import pytest
import torch
from torch import Tensor

from benchmarks.invariance import (
    GLOBAL_BATCH,
    Combination,
    config_of,
    record,
    synthetic_batch,
)
from benchmarks.rivals import formulas
from ganscale.augmentation.pipelines import build_pipeline
from ganscale.cli.main import main
from ganscale.config import resolve
from ganscale.data.images.preprocessing import to_network_range
from ganscale.errors import UserError
from ganscale.objectives.objective import build_objective
from ganscale.random import drawing, normal_like
from ganscale.randomness import normal, uniform
from ganscale.runtime import Runtime
from ganscale.training.state import TrainingState
from tests.distributed.test_invariance import WrittenOut, assert_same
from tests.distributed.test_promise import curve
from tests.distributed.test_resume import wait_for_checkpoints
from tests.helpers.processes import end_tree
from tests.helpers.runs import MINIMAL, Runs, checkpoint_bits


class AugmentedByHand(WrittenOut):
    """The critic only ever sees T(x), and penalties are taken at x; a draw of its own for real and
    fake images of each step, in a forward of its own."""

    def augment(self, images: Tensor, purpose: str, slots: Tensor) -> Tensor:
        categories = ["blit", "geom", "color", "filter", "noise", "cutout"]
        pipeline = build_pipeline("ada", dict.fromkeys(categories, 1.0), images.shape[1])
        numbers = uniform(self.seed, purpose, slots, pipeline.columns)
        with drawing(self.seed, (purpose,), slots):
            noise = normal_like(images, "noise")
        parameters = pipeline.parameters(numbers, 0.7)
        return pipeline(images, {"parameters": parameters, "noise": noise})

    def critic_step(self, real: Tensor, latents: Tensor, slots: Tensor) -> dict[str, float]:
        with torch.no_grad():
            fake = self.generator(latents)
        purposes = {"real": "augmentation/critic real", "fake": "augmentation/critic fake"}
        images = {"real": real, "fake": fake}
        logits = [self.critic(self.augment(images[k], purposes[k], slots)) for k in images]
        loss = torch.stack(formulas.LOSSES[self.loss].critic(*logits)).sum()
        points = {"r1": ("real", real), "r2": ("fake", fake)}
        if self.penalty == "wgan_gp":
            share = uniform(self.seed, "interpolation", slots).double()[:, :, None, None]
            points = {"wgan_gp": ("real", share * real + (1 - share) * fake)}
        for name, (kind, point) in points.items():
            squares = self.slopes_before(point, purposes[kind], slots)
            value = squares.mean() / 2
            if name == "wgan_gp":
                value = 10 * (squares.sqrt() - 1).square().mean()
            loss = loss + value
        self.critic_gradients = self.descend(self.critic, loss)
        return {}

    def slopes_before(self, images: Tensor, purpose: str, slots: Tensor) -> Tensor:
        squares = []
        for image, slot in zip(images, slots, strict=True):
            image = image[None].clone().requires_grad_()
            score = self.critic(self.augment(image, purpose, slot[None])).sum()
            (slope,) = torch.autograd.grad(score, image, create_graph=True)
            squares.append(slope.square().sum())
        return torch.stack(squares)

    def generator_step_on(self, latents: Tensor, real: Tensor, slots: Tensor) -> None:
        fake = self.augment(self.generator(latents), "augmentation/generator fake", slots)
        with torch.no_grad():
            of_real = self.critic(self.augment(real, "augmentation/generator real", slots))
        loss = formulas.LOSSES[self.loss].generator(self.critic(fake), of_real)
        self.generator_gradients = self.descend(self.generator, loss)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("loss", "penalties"), [("relativistic", "r1+r2"), ("wgan", "wgan_gp")])
def test_one_process_computes_the_published_formulas_through_the_augmentation(
    loss: str, penalties: str, accumulate: int
) -> None:
    config = config_of(Combination(loss, penalties, "ada"), accumulate, "float64")
    config.training.total_images = 6 * GLOBAL_BATCH
    runtime = Runtime.start()
    found = record(config, runtime)
    start = TrainingState(config, build_objective(config.objective), runtime, 0)
    by_hand = AugmentedByHand(start.critic, start.generator, loss, penalties, config.seed)
    latent_dim = config.generator.latent_dim
    for step in range(6):
        batch = synthetic_batch(config, runtime, step * GLOBAL_BATCH)
        real = to_network_range(batch.images).double()
        latents = normal(config.seed, "latents/critic", batch.slots, latent_dim).double()
        by_hand.critic_step(real, latents, batch.slots)
        images = (step + 1) * GLOBAL_BATCH
        assert_same(by_hand.critic_gradients, found[f"critic gradients at {images} images"])
        if step % config.objective.n_critic == config.objective.n_critic - 1:
            latents = normal(config.seed, "latents/generator", batch.slots, latent_dim).double()
            by_hand.generator_step_on(latents, real, batch.slots)
            of_run = found[f"generator gradients at {images} images"]
            assert_same(by_hand.generator_gradients, of_run)
    assert_same(dict(by_hand.critic.named_parameters()), found["critic"])
    assert_same(dict(by_hand.generator.named_parameters()), found["generator"])


ADAPTIVE = (
    "training.total_images=1600",
    "checkpoint.every_images=320",
    "log.every_images=160",
    "objective.loss.name=hinge",
    "augmentation=ada",
    "augmentation.adaptive.target=0.0",
    "augmentation.adaptive.every_images=48",
    "augmentation.adaptive.full_images=2000",
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_with_the_adaptive_controller_ends_with_the_bits_of_a_whole_one(
    runs: Runs, ranks: int
) -> None:
    """Checkpoints are written between two adjustments."""
    runs.finish("whole", *ADAPTIVE, ranks=ranks)
    process = runs.start("killed", *ADAPTIVE, "data.workers=2", ranks=ranks)
    try:
        wait_for_checkpoints(runs, "killed", 1, process)
    finally:
        end_tree(process)
        process.communicate()
    assert "continues at" in runs.finish("killed", *ADAPTIVE, "data.workers=2", ranks=ranks)
    assert checkpoint_bits(runs.checkpoints("killed")[-1]) == checkpoint_bits(
        runs.checkpoints("whole")[-1]
    )
    whole, killed = curve(runs.rows("whole")), curve(runs.rows("killed"))
    assert [row["augment/probability"] for row in killed] == [
        row["augment/probability"] for row in whole
    ]
    assert [row["augment/sign_rate"] for row in killed] == [
        row["augment/sign_rate"] for row in whole
    ]
    assert len({row["augment/probability"] for row in whole}) > 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["augmentation=adaa"], "`augmentation.pipeline` must be one of none, ada, diffaugment"),
        (["augmentation=ada"], "`augmentation.probability` must be above 0 unless"),
        (["augmentation=ada", "augmentation.probability=1.5"], "must be at most 1, not 1.5"),
        (["augmentation=ada", "augmentation.probability=-1"], "must be at least 0, not -1"),
        (["augmentation.probability=0.5"], "`augmentation.pipeline` must be ada or diffaugment"),
        (["augmentation.adaptive=0.6"], "`augmentation.pipeline` must be ada or diffaugment"),
        (["augmentation=ada", "augmentation.adaptive=1"], "must be below 1, not 1"),
    ],
)
def test_settings_of_augmentation_that_make_no_sense_are_refused(
    tmp_path, settings: list[str], message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(UserError) as refusal:
        resolve([str(file), *settings])
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["augmentation.strengths.blitt=1"], "augmentation.strengths.blitt: unknown (did you mean"),
        (["augmentation.strengths.hue=1"], "augmentation.strengths.hue needs images of three"),
        (["augmentation.strengths.blit=2"], "augmentation.strengths.blit must be between 0 and 1"),
        (["augmentation.adaptive=0.6"], "the loss wgan with these options is not smallest at 0"),
    ],
)
def test_mistakes_that_need_the_data_or_the_loss_end_the_run_before_it_starts(
    runs: Runs, capsys, settings: list[str], message: str
) -> None:
    given = runs.settings("mistaken", "augmentation=ada", "augmentation.probability=0.5")
    for command in (["train"], ["train", "--dry-run"], ["plan"]):
        assert main([*command, *given, *settings]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
