"""A step's loss and gradients are those of the written-out objective."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.rivals.formulas import LOSSES, cross_entropy
from ganscale.augmentation.pipelines import build_pipeline
from ganscale.metrics.meters import SQUARE, MeterAccumulator, parts_of
from ganscale.objectives.objective import Objective, build_objective
from ganscale.objectives.penalties import Draws
from ganscale.runtime import Runtime
from ganscale.schema import (
    LossConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PenaltyConfig,
    TrainingConfig,
)
from ganscale.training import step_forwards
from ganscale.training.critic_step import CriticStep
from ganscale.training.generator_step import GeneratorStep
from ganscale.training.network_updater import NetworkUpdater, NonFiniteGuard
from tests.helpers.networks import SmoothCritic, draw

BATCH, WEIGHT = 4, 10.0


class SmallGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 12).double()

    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(self.layer(latents)).view(-1, 3, 2, 2)


def objective(loss: str, **penalties: PenaltyConfig) -> Objective:
    return build_objective(ObjectiveConfig(LossConfig(loss), penalties))


GRADIENT_PENALTY = {"wgan_gp": PenaltyConfig(WEIGHT)}


def critic_inputs(built: Objective, batch: int = BATCH, update: int = 0) -> dict[str, Any]:
    real, fake = draw(batch, 3, 2, 2, seed=5), draw(batch, 3, 2, 2, seed=6)
    points = built.penalty_points(real, fake, Draws(0, torch.arange(batch)), update)
    return {"real_images": real, "fake_images": fake, "labels": None, "points": points}


def generator_inputs(batch: int = BATCH) -> dict[str, Any]:
    real = draw(batch, 3, 2, 2, seed=5)
    return {"latents": draw(batch, 5, seed=8), "real_images": real, "labels": None}


LOGIT_FIGURES = {
    "_mean": torch.mean,
    SQUARE: lambda logits: (logits**2).mean(),
    "_sign_rate": lambda logits: 2 * (logits > 0).double().mean() - 1,
}


def terms_relative_to_means(better: Tensor, worse: Tensor) -> list[Tensor]:
    """The terms of the relativistic average loss, which depend on each other."""
    return [cross_entropy(1, better - worse.mean()), cross_entropy(0, worse - better.mean())]


close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_penalty", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_critic_steps_loss_and_gradients_are_the_formulas(runtime, name, with_penalty):
    critic, by_hand = SmoothCritic(), SmoothCritic()
    built = objective(name, **(GRADIENT_PENALTY if with_penalty else {}))
    inputs = critic_inputs(built)
    loss, meters, norms, logits = CriticStep(critic, built, "float64")(**inputs)
    loss.backward()
    sums = MeterAccumulator(runtime)
    sums.add(meters, {}, norms, logits)

    real, fake = by_hand(inputs["real_images"]), by_hand(inputs["fake_images"])
    terms = LOSSES[name].critic(real, fake)
    adversarial = total = sum(terms, torch.tensor(0.0))
    shown = {f"logits/real{name}": figure(real) for name, figure in LOGIT_FIGURES.items()}
    shown |= {f"logits/fake{name}": figure(fake) for name, figure in LOGIT_FIGURES.items()}
    shown["logits/pairs_in_order"] = (
        torch.tensor([r > f for r, f in zip(real.tolist(), fake.tolist(), strict=True)])
        .double()
        .mean()
    )
    if with_penalty:
        norms = by_hand.gradient_norms(inputs["points"]["wgan_gp"])
        penalty = ((norms - 1) ** 2).mean()
        total = adversarial + WEIGHT * penalty
        shown |= {"penalty/wgan_gp": penalty, "loss/penalty_wgan_gp": WEIGHT * penalty}
        shown["penalty/wgan_gp_gradient_norm"] = norms.mean()
        shown[f"penalty/wgan_gp_gradient_norm{SQUARE}"] = (norms**2).mean()
        shown["penalty/wgan_gp_gradient_norm_max"] = norms.max()
    total.backward()
    close(loss, total)
    for parameter, expected in zip(critic.parameters(), by_hand.parameters(), strict=True):
        close(parameter.grad, expected.grad)
    shown |= {"loss/critic": total, "loss/critic_adversarial": adversarial}
    if name == "relativistic_average":
        terms = terms_relative_to_means(real, fake)
    if name != "relativistic":
        shown |= {"loss/critic_real": terms[0], "loss/critic_fake": terms[1]}
    close(sums.read(), {name: value.item() for name, value in shown.items()})
    close(logits, {"real": real.detach(), "fake": fake.detach()})


def test_a_lazy_penalty_weighs_its_interval_times_as_much_when_it_is_due():
    lazy = objective("wgan", r1=PenaltyConfig(WEIGHT, interval=4))
    steady = objective("wgan", r1=PenaltyConfig(4 * WEIGHT))
    critic = SmoothCritic()
    losses = {
        update: CriticStep(critic, lazy, "float64")(**critic_inputs(lazy, update=update)).loss
        for update in range(5)
    }
    expected = CriticStep(critic, steady, "float64")(**critic_inputs(steady)).loss
    adversarial = CriticStep(critic, objective("wgan"), "float64")
    without = adversarial(**critic_inputs(objective("wgan"))).loss
    assert [losses[0].item(), losses[4].item()] == pytest.approx([expected.item()] * 2, rel=1e-12)
    assert [losses[update].item() for update in (1, 2, 3)] == [without.item()] * 3


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_the_parts_of_a_row_add_up_to_its_trained_loss(runtime, name, accumulate):
    """Also over an interval in which a lazy penalty was due once and another one always."""
    built = objective(name, wgan_gp=PenaltyConfig(WEIGHT), r1=PenaltyConfig(3.0, interval=4))
    critic, sums = SmoothCritic(), MeterAccumulator(runtime)
    trained = updater(CriticStep(critic, built, "float64"), critic, runtime, accumulate)
    for step in range(6):
        sums.add(*trained.update(critic_inputs(built, update=step), 0))
    row = sums.read()
    penalties = row["loss/penalty_wgan_gp"] + row["loss/penalty_r1"]
    assert row["loss/critic_adversarial"] + penalties == pytest.approx(
        row["loss/critic"], rel=1e-14
    )
    assert row["loss/penalty_wgan_gp"] == pytest.approx(WEIGHT * row["penalty/wgan_gp"], rel=1e-14)
    # Due in steps 0 and 4 of 6, with 4 times its weight; alone it is the mean of those two.
    assert row["loss/penalty_r1"] == pytest.approx(2 / 6 * 4 * 3 * row["penalty/r1"], rel=1e-14)
    assert ("loss/critic_real" in row) == (name != "relativistic")
    if "loss/critic_real" in row:
        parts = row["loss/critic_real"] + row["loss/critic_fake"]
        assert parts == pytest.approx(row["loss/critic_adversarial"], rel=1e-14)


def test_labels_go_with_real_fake_and_penalised_images_alike():
    seen: list[list[int]] = []

    class ClassCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Parameter(draw(3, seed=1))

        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            seen.append(labels.tolist())
            return images.flatten(1).sum(1) * self.score[labels]

    built = objective("wgan", **GRADIENT_PENALTY)
    step = CriticStep(ClassCritic(), built, "float64")
    step(**{**critic_inputs(built), "labels": torch.tensor([0, 2, 1, 2])})
    assert seen == [[0, 2, 1, 2, 0, 2, 1, 2], [0, 2, 1, 2]]


@pytest.mark.parametrize("with_real_logits", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_generator_steps_loss_and_gradients_are_the_formulas(name, with_real_logits):
    generator, critic, inputs = SmallGenerator(), SmoothCritic(), generator_inputs()
    step = GeneratorStep(generator, critic, objective(name), "float64")
    loss, meters, _, logits = step(**inputs, with_real_logits=with_real_logits)
    parameters = list(generator.parameters())
    found = torch.autograd.grad(loss, parameters)
    fake, real = critic(generator(inputs["latents"])), critic(inputs["real_images"])
    expected = LOSSES[name].generator(fake, real.detach())
    close(loss, expected)
    close(found, torch.autograd.grad(expected, parameters))
    parts = {"loss/generator_fake": expected}
    if name == "relativistic_average":
        of_fake, of_real = terms_relative_to_means(fake, real)
        parts = {"loss/generator_real": of_real, "loss/generator_fake": of_fake}
    parts = {} if name == "relativistic" else parts
    close(meters, {k: v.detach() for k, v in {"loss/generator": expected, **parts}.items()})
    close(logits["fake"], fake.detach())
    needs_real = name.startswith("relativistic")
    assert ("real" in logits) == (with_real_logits or needs_real)
    if "real" in logits:
        close(logits["real"], real.detach())
    assert list(step.parameters()) == parameters  # the critic is not this module's to synchronize


def updater(
    step: CriticStep | GeneratorStep, network: nn.Module, runtime: Runtime, parts: int = 1
) -> NetworkUpdater:
    return NetworkUpdater(
        "updater",
        step,
        network,
        OptimizerConfig("sgd", 0.1),  # Adam would amplify the rounding of gradients that cancel
        TrainingConfig(total_images=1000, accumulate=parts),
        runtime,
        NonFiniteGuard(runtime.device),
    )


class ForwardsSeen(nn.Module):
    """A critic of patches that notes how many images each forward has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(6, 4, 3), nn.Tanh()
        ).double()
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        return self.layers(images).mean(1)


BOTH = [2 * BATCH]
APART = [BATCH, BATCH]


@pytest.mark.parametrize("saves_launches", [False, True])
@pytest.mark.parametrize(
    ("penalties", "forwards"),
    [
        ({"r1": PenaltyConfig(WEIGHT)}, APART),
        ({"r2": PenaltyConfig(WEIGHT, patch_score="mean")}, APART),
        ({"r1": PenaltyConfig(2.0), "r2": PenaltyConfig(3.0)}, BOTH),
        ({"r1": PenaltyConfig(2.0), "r2": PenaltyConfig(3.0, patch_score="mean")}, BOTH),
        ({"r1": PenaltyConfig(2.0, interval=2), "wgan_gp": PenaltyConfig(3.0)}, [*APART, BATCH]),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["non_saturating", "relativistic_average"])
def test_penalties_at_the_critics_own_images_use_the_forwards_of_the_loss(
    runtime, monkeypatch, name, penalties, forwards, saves_launches, accumulate
):
    """With the gradients of separate forwards, on a device that waits for launches, too."""
    monkeypatch.setattr(step_forwards, "has_cheap_launches", lambda device: not saves_launches)
    built, critic, by_hand = objective(name, **penalties), ForwardsSeen(), ForwardsSeen()
    inputs = critic_inputs(built)
    update = updater(CriticStep(critic, built, "float64"), critic, runtime, accumulate)
    found = update.update(inputs, 0)

    real, fake = by_hand(inputs["real_images"]), by_hand(inputs["fake_images"])
    expected = {"loss/critic_adversarial": torch.stack(LOSSES[name].critic(real, fake)).sum()}
    for penalty, config in penalties.items():
        at = inputs["points"][penalty].detach().requires_grad_()
        scores = by_hand(at).flatten(1)
        scores = scores.sum() if config.patch_score == "sum" else scores.mean(1).sum()
        (gradients,) = torch.autograd.grad(scores, at, create_graph=True)
        square = gradients.square().sum((1, 2, 3))
        value = (square.sqrt() - 1).square() if penalty == "wgan_gp" else square / 2
        expected[f"penalty/{penalty}"] = value.mean()
        close(found.norms[f"penalty/{penalty}_gradient_norm"], square.sqrt().detach())
    weights = {n: config.weight * config.interval for n, config in penalties.items()}
    loss = sum((w * expected[f"penalty/{n}"] for n, w in weights.items()), torch.tensor(0.0))
    (loss + expected["loss/critic_adversarial"]).backward()
    for parameter, other in zip(critic.parameters(), by_hand.parameters(), strict=True):
        close(parameter.grad, other.grad)
    for meter, value in expected.items():
        close(found.meters[meter], value.detach())
    close(found.logits, {"real": real.detach(), "fake": fake.detach()})
    if saves_launches:
        forwards = [*BOTH, *forwards[2:]] if forwards[0] == BATCH else forwards
    of_micro_batch = [images // accumulate for images in forwards]
    assert critic.seen[-len(of_micro_batch) :] == of_micro_batch


def test_where_launches_cost_more_than_a_small_batch_the_generators_loss_takes_one_forward(
    monkeypatch,
):
    results = []
    for saves_launches in (False, True):
        monkeypatch.setattr(
            step_forwards, "has_cheap_launches", lambda _, saves=saves_launches: not saves
        )
        generator, critic = SmallGenerator(), ForwardsSeen()
        step = GeneratorStep(generator, critic, objective("relativistic"), "float64")
        loss, *_, logits = step(**generator_inputs())
        results.append([torch.autograd.grad(loss, [*generator.parameters()]), logits])
        assert critic.seen == (BOTH if saves_launches else APART)
        assert not logits["real"].requires_grad
    close(*results)


@pytest.mark.parametrize("penalty", ["r1", "r2"])
def test_the_size_of_a_micro_batch_does_not_decide_on_precision(monkeypatch, penalty):
    """Small batches save launches, in other forwards than large ones."""
    monkeypatch.setattr(step_forwards, "has_cheap_launches", lambda device: False)
    built = objective("non_saturating", **{penalty: PenaltyConfig(WEIGHT)})
    real, fake = draw(BATCH, 3, 2, 2, seed=5).float(), draw(BATCH, 3, 2, 2, seed=6).float()
    points = {penalty: real if penalty == "r1" else fake}
    inputs: dict[str, Any] = {"real_images": real, "fake_images": fake, "labels": None}
    step, found = CriticStep(SmoothCritic().float(), built, "bfloat16", "float32"), []
    for few_pixels in (0, 1 << 18):
        monkeypatch.setattr(step_forwards, "_FEW_PIXELS", few_pixels)
        found.append((step(**inputs, points=points).logits, step.logits(**inputs, points=points)))
    close(*found, rtol=1e-5)


class MeanSquare(nn.Module):
    """Of operators that autocast does not cast."""

    def forward(self, images: Tensor) -> Tensor:
        return images.square().flatten(1).mean(1)


@pytest.mark.parametrize("is_augmented", [True, False])
def test_the_size_of_a_micro_batch_does_not_round_images_of_the_generators_step(
    monkeypatch, is_augmented
):
    monkeypatch.setattr(step_forwards, "has_cheap_launches", lambda device: False)
    pipeline = build_pipeline("diffaugment", {}, 3)
    numbers = pipeline.draw("test").at(0, torch.arange(BATCH))
    drawn = {"parameters": pipeline.parameters(numbers, 1.0)}
    inputs: dict[str, Any] = {"labels": None}
    inputs |= {"latents": draw(BATCH, 5).float(), "real_images": draw(BATCH, 3, 2, 2).float()}
    if is_augmented:
        inputs["augmentation"] = {"real": drawn, "fake": drawn}
    networks = SmallGenerator().float(), SmoothCritic().float() if is_augmented else MeanSquare()
    step = GeneratorStep(
        *networks,
        objective("relativistic"),
        "bfloat16",
        pipeline=pipeline if is_augmented else None,
    )
    found = []
    for few_pixels in (0, 1 << 18):
        monkeypatch.setattr(step_forwards, "_FEW_PIXELS", few_pixels)
        found.append(step(**inputs).logits)
    close(*found, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_change_no_update_of_the_critic(runtime, name, parts):
    built, critics, results = objective(name, **GRADIENT_PENALTY), [], []
    for accumulate in (1, parts):
        critic = SmoothCritic()
        trained = updater(CriticStep(critic, built, "float64"), critic, runtime, accumulate)
        results.append([trained.update(critic_inputs(built, batch=8), seen) for seen in (0, 8)])
        critics.append(critic)
    close(*(list(critic.parameters()) for critic in critics), rtol=1e-12)
    close(*results)  # meters, and norms and logits in the order of the batch


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_change_no_update_of_the_generator(runtime, name):
    generators, results = [], []
    for accumulate in (1, 2):
        generator = SmallGenerator()
        step = GeneratorStep(generator, SmoothCritic(), objective(name), "float64")
        trained = updater(step, generator, runtime, accumulate)
        results.append(trained.update({**generator_inputs(8), "with_real_logits": True}, 0))
        generators.append(generator)
    close(*(list(generator.parameters()) for generator in generators), rtol=1e-12)
    close(*results)


def test_a_first_look_at_the_logits_leaves_no_trace_in_buffers(runtime):
    """A loss over the whole batch needs all logits before the first micro-batch."""

    class Counting(SmoothCritic):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("forwards", torch.zeros(()))
            self.forwards: Tensor

        def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
            self.forwards += 1
            return super().forward(images, labels)

    counts = []
    for name in ("wgan", "relativistic_average"):
        critic = Counting()
        built = objective(name)
        trained = updater(CriticStep(critic, built, "float64"), critic, runtime, 2)
        trained.update(critic_inputs(built), 0)
        counts.append(critic.forwards.item())
    assert counts == [2, 2]


def test_a_generator_update_leaves_the_critic_without_gradients(runtime):
    generator, critic = SmallGenerator(), SmoothCritic()
    before = [parameter.clone() for parameter in critic.parameters()]
    step = GeneratorStep(generator, critic, objective("wgan"), "float64")
    updater(step, generator, runtime).update({**generator_inputs(), "with_real_logits": True}, 0)
    for parameter, value in zip(critic.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, value)
    assert all(parameter.grad is not None for parameter in generator.parameters())


def test_a_critic_update_leaves_the_generator_without_gradients(runtime):
    """Even where a caller forgot to make the fakes without a graph."""
    generator, critic, built = (
        SmallGenerator(),
        SmoothCritic(),
        objective("wgan", **GRADIENT_PENALTY),
    )
    inputs = {**critic_inputs(built), "fake_images": generator(draw(4, 5, seed=8))}
    updater(CriticStep(critic, built, "float64"), critic, runtime).update(inputs, 0)
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_fakes_that_were_kept_give_the_update_of_fakes_made_again(runtime):
    """Also when the critic has moved in between, as it has in a run."""
    made, kept, critic = SmallGenerator(), SmallGenerator(), SmoothCritic()
    inputs = generator_inputs()
    fakes = kept(inputs["latents"])
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter *= 1.5
    results = []
    for generator, given in ((made, {}), (kept, {"latents": None, "fake_images": fakes})):
        step = GeneratorStep(generator, critic, objective("relativistic"), "float64")
        results.append(updater(step, generator, runtime).update({**inputs, **given}, 0))
    close(list(made.parameters()), list(kept.parameters()), rtol=1e-15)
    close(*results, rtol=1e-15)


def test_nothing_that_a_step_reports_keeps_its_graph_alive(runtime):
    critic, built = SmoothCritic(), objective("lsgan", **GRADIENT_PENALTY)
    output = CriticStep(critic, built, "float64")(**critic_inputs(built))
    step = GeneratorStep(SmallGenerator(), critic, objective("relativistic"), "float64")
    for loss, *seen in (output, step(**generator_inputs())):
        assert loss.requires_grad
        meters = [meter for figures in seen for meter in figures.values()]
        assert not any(part.requires_grad for meter in meters for part in parts_of(meter))


def test_in_a_bfloat16_run_the_loss_and_the_penalty_are_float32():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1))
    built = objective("wgan", **GRADIENT_PENALTY)
    inputs = critic_inputs(built)
    inputs |= {name: inputs[name].float() for name in ("real_images", "fake_images")}
    inputs["points"] = {name: images.float() for name, images in inputs["points"].items()}
    found, of_logits = {}, {}
    for precision in ("float32", "bfloat16"):
        loss, meters, _, logits = CriticStep(layers, built, precision)(**inputs)
        assert loss.dtype == logits["real"].dtype == torch.float32
        found[precision], of_logits[precision] = meters, logits["real"].mean().item()
    assert torch.equal(found["bfloat16"]["penalty/wgan_gp"], found["float32"]["penalty/wgan_gp"])
    assert of_logits["float32"] != of_logits["bfloat16"]  # the logits, though, are bfloat16's
    assert of_logits["float32"] == pytest.approx(of_logits["bfloat16"], abs=0.02)

    rounded = CriticStep(layers, built, "bfloat16", penalty_precision="bfloat16")(**inputs)
    exact = found["float32"]["penalty/wgan_gp"]
    assert rounded.meters["penalty/wgan_gp"].dtype == torch.float32
    assert rounded.meters["penalty/wgan_gp"] != exact
    assert rounded.meters["penalty/wgan_gp"].item() == pytest.approx(exact.item(), rel=0.05)


def test_in_a_bfloat16_run_r1_and_r2_in_float32_make_the_critics_step_one_in_float32():
    """A forward in bfloat16 for the loss would only add to it."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1))
    built = objective("relativistic", r1=PenaltyConfig(0.5), r2=PenaltyConfig(0.5))
    inputs = critic_inputs(built)
    inputs |= {name: inputs[name].float() for name in ("real_images", "fake_images")}
    inputs["points"] = {"r1": inputs["real_images"], "r2": inputs["fake_images"]}
    losses = {}
    for precisions in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        losses[precisions] = CriticStep(critic, built, *precisions)(**inputs).loss
    assert losses["bfloat16", "float32"] == losses["float32", "float32"]
    assert losses["bfloat16", "bfloat16"] != losses["float32", "float32"]
