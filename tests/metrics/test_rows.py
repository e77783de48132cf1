"""The figures of a row are what their names say, by numpy and by hand."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.invariance import Combination, config_of, synthetic_batch
from ganscale.evaluation.figures import Figures, Identity, figure_name
from ganscale.metrics.input_gradient_norm import input_gradient_norm_meters
from ganscale.metrics.meters import SQUARE, MeterAccumulator
from ganscale.metrics.performance import PerformanceMeter
from ganscale.objectives.objective import build_objective
from ganscale.runtime import Runtime
from ganscale.schedules import Schedule
from ganscale.schema import PenaltyConfig
from ganscale.training.cycle import Cycle
from ganscale.training.ema import update_ema
from ganscale.training.evaluations import EVALUATED
from ganscale.training.metrics_row import (
    derived_metrics,
    logit_histograms,
    metrics_row,
    weight_meters,
)
from ganscale.training.state import TrainingState
from tests.helpers.processes import REPOSITORY


def cycle_of(runtime: Runtime, combination: Combination, accumulate: int = 1) -> Cycle:
    config = config_of(combination, accumulate, "float64")
    objective = build_objective(config.objective)
    return Cycle(config, objective, runtime, TrainingState(config, objective, runtime, 0))


def run(cycle: Cycle, cycles: int, after_critic_step: Any = lambda: None) -> dict[str, Any]:
    """The row after some cycles of which the last is logged."""
    logits: dict[str, Tensor] = {}
    for number in range(cycles):
        steps, seen = range(cycle.config.objective.n_critic), cycle.state.images_seen
        batches = [synthetic_batch(cycle.config, cycle.runtime, seen + 8 * step) for step in steps]

        def on_phase(phase: str, start: int = seen) -> None:
            if cycle.state.images_seen > start:
                after_critic_step()

        logits = cycle.run(batches, is_logged=number == cycles - 1, on_phase=on_phase)
    return metrics_row(cycle.state, cycle.runtime, 1000, logits)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_row_has_mean_deviation_and_signs_of_all_logits_since_the_last_one(
    runtime, monkeypatch, accumulate
):
    seen: list[dict[str, Tensor]] = []
    cycle = cycle_of(runtime, Combination("hinge", "dragan", "patches"), accumulate)
    update = cycle.state.critic_updater.update

    def noting(*arguments: Any) -> Any:
        found = update(*arguments)
        seen.append(found.logits)
        return found

    monkeypatch.setattr(cycle.state.critic_updater, "update", noting)
    row = run(cycle, 3)
    for kind in ("real", "fake"):
        values = np.concatenate([logits[kind].numpy().ravel() for logits in seen])
        assert len(values) == 3 * 2 * 8 * seen[0][kind][0].numel() > 48
        assert row[f"logits/{kind}_mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert row[f"logits/{kind}_std"] == pytest.approx(values.std(), rel=1e-9)
        assert row[f"logits/{kind}_sign_rate"] == pytest.approx(np.sign(values).mean(), rel=1e-12)
        last = seen[-1][kind].numpy().ravel()
        histogram = row[f"logits/{kind}_histogram"]
        both = np.concatenate([seen[-1][each].numpy().ravel() for each in ("real", "fake")])
        counts, edges = np.histogram(last, bins=32, range=(both.min(), both.max()))
        assert histogram["counts"] == counts.tolist()
        assert histogram["edges"] == pytest.approx(edges.tolist(), rel=1e-12, abs=1e-12)
    real, fake = (np.concatenate([e[k].numpy().ravel() for e in seen]) for k in ("real", "fake"))
    assert row["logits/pairs_in_order"] == (real > fake).mean()
    assert row["logits/wasserstein"] == pytest.approx(real.mean() - fake.mean(), rel=1e-9)


def test_a_penaltys_gradient_norms_have_mean_deviation_and_maximum(runtime, monkeypatch):
    norms: list[float] = []
    cycle = cycle_of(runtime, Combination("wgan", "wgan_gp"), accumulate=2)
    points = cycle.objective.penalty_points
    critic = cycle.state.critic

    def noting(*arguments: Any) -> dict[str, Tensor]:
        found = points(*arguments)
        for image in found["wgan_gp"]:
            image = image[None].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(critic(image).sum(), image)
            norms.append(gradient.norm().item())
        return found

    monkeypatch.setattr(type(cycle.objective), "penalty_points", lambda _, *rest: noting(*rest))
    row = run(cycle, 2)
    assert len(norms) == 2 * 2 * 8
    assert row["penalty/wgan_gp_gradient_norm"] == pytest.approx(np.mean(norms), rel=1e-9)
    assert row["penalty/wgan_gp_gradient_norm_std"] == pytest.approx(np.std(norms), rel=1e-6)
    assert row["penalty/wgan_gp_gradient_norm_max"] == pytest.approx(max(norms), rel=1e-9)
    expected = np.mean([(norm - 1) ** 2 for norm in norms])
    assert row["penalty/wgan_gp"] == pytest.approx(expected, rel=1e-9)
    assert row["loss/penalty_wgan_gp"] == pytest.approx(10 * expected, rel=1e-9)


@pytest.mark.parametrize("variant", ["plain", "spectral_norm", "patches"])
def test_without_a_penalty_the_critics_input_gradient_norm_is_measured(runtime, variant):
    cycle = cycle_of(runtime, Combination("hinge", "none", variant), accumulate=2)
    critic, images = cycle.state.critic, []
    row = run(cycle, 2, lambda: images.append(cycle.state.images_seen - 8))
    seen = cycle.to_device(synthetic_batch(cycle.config, runtime, images[-1])).images
    norms = []
    for image in seen:
        image = image[None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(image).sum(), image)
        norms.append(gradient.norm().item())
    assert len(norms) == 8
    assert row["input_gradient_norm/real_mean"] == pytest.approx(np.mean(norms), rel=1e-9)
    assert row["input_gradient_norm/real_std"] == pytest.approx(np.std(norms), rel=1e-6)
    assert row["input_gradient_norm/real_max"] == pytest.approx(max(norms), rel=1e-9)


def test_measuring_the_input_gradient_norm_leaves_gradients_and_buffers_alone():
    critic = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)
    )
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    images = torch.randn(4, 3, 2, 2)
    means, maxima = input_gradient_norm_meters(critic, images, None, "float32", micro_batches=2)
    assert not any(each.requires_grad for each in (*means.values(), *maxima.values()))
    assert all(torch.equal(before[name], each) for name, each in critic.state_dict().items())
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert critic.training


def test_the_largest_of_figures_that_are_no_numbers_is_none(runtime):
    meters = MeterAccumulator(runtime)
    meters.add({"a": torch.tensor(1.0)}, {"b": torch.tensor(math.nan)})
    meters.add({"a": torch.tensor(1.0)}, {"b": torch.tensor(2.0), "c": torch.tensor(3.0)})
    found = meters.read()
    assert math.isnan(found["b"])
    assert found["c"] == 3


def test_gradient_norms_are_averaged_and_their_largest_is_kept(runtime):
    cycle, norms = cycle_of(runtime, Combination("lsgan", "none")), []
    critic = cycle.state.critic_updater

    def note() -> None:
        gradients = [p.grad.flatten() for p in critic.parameters if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())

    row = run(cycle, 3, note)
    assert row["optim/critic_gradient_norm"] == pytest.approx(np.mean(norms), rel=1e-9)
    assert row["optim/critic_gradient_norm_max"] == pytest.approx(max(norms), rel=1e-9)


def weights_of(state: TrainingState) -> dict[str, Tensor]:
    trained = {"generator": state.generator_updater.parameters}
    return weight_meters(trained, state.generator, state.ema)


def test_weight_norms_and_the_distance_of_the_ema(runtime):
    state = cycle_of(runtime, Combination("wgan", "wgan_gp", "batch_norm")).state
    assert weights_of(state)["optim/ema_distance"] == 0
    weights = torch.cat([p.detach().flatten() for p in state.generator.parameters()])
    with torch.no_grad():
        for parameter in state.generator.parameters():
            parameter *= 3
    meters = weights_of(state)
    assert meters["optim/generator_weight_norm"] == pytest.approx(3 * weights.norm().item())
    assert meters["optim/ema_distance"] == pytest.approx(2 / 3, rel=1e-12)
    update_ema(state.ema, state.generator, decay=0.25)
    assert weights_of(state)["optim/ema_distance"] == pytest.approx(1 / 6, rel=1e-12)


def test_every_figure_of_a_row_is_explained_and_every_one_explained_is_logged(runtime):
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    explained = set(re.findall(r"`([a-z_]+/[A-Za-z0-9_/]+)`", page))
    logged = {"progress/images_seen", "progress/step"}
    for combination in (
        Combination("relativistic_average", "r1+r2", "patches"),
        Combination("relativistic", "wgan_gp"),
        Combination("wgan", "none", "clip_weights"),
        Combination("hinge", "none", "adaptive"),
        Combination("hinge", "none", "path_length"),
    ):
        cycle = cycle_of(runtime, combination)
        cycle.state.bad_samples["shard-0.tar", "cannot be decoded"] += 1
        meter = PerformanceMeter(cycle.config, runtime, 0, cycle_flops=1e9)
        logged |= run(cycle, 1).keys() | performance(cycle, meter).keys()
    logged |= run(scheduled_cycle(runtime), 1).keys()
    distances = {figure_name("fd", name): 1.0 for name in ("inception", "efficientnet_lite0")}
    identity = Identity("network", "checksum", "resize", "reference", 3, 3)
    logged |= Figures(distances, identity, 1.0).row().keys() | {EVALUATED}
    patterns = {name: re.sub("NAME|LOSS|REASON", "[a-z0-9_]+", name) for name in explained}
    unexplained = {
        name for name in logged if not any(re.fullmatch(p, name) for p in patterns.values())
    }
    assert not unexplained
    not_logged = {
        name for name, p in patterns.items() if not any(re.fullmatch(p, each) for each in logged)
    }
    assert not_logged == {"perf/device_memory_gib", "perf/peak_share"}  # of GPUs


def scheduled_cycle(runtime: Runtime) -> Cycle:
    """Of a run in which every number moves that can, within 40 images."""

    def schedule(start: float, end: float) -> Schedule:
        return Schedule(start, end, 40, "linear")

    config = config_of(Combination("wgan", "wgan_gp"), 1, "float64")
    for optimizer in (config.optimizer.critic, config.optimizer.generator):
        optimizer.name = "adam"
        optimizer.learning_rate = schedule(0.4, 0.0)
        optimizer.betas = [schedule(0.2, 0.1), schedule(0.9, 0.99)]
    config.objective.penalties = {"wgan_gp": PenaltyConfig(schedule(8.0, 4.0))}
    config.ema.half_life_images = schedule(0, 50)
    objective = build_objective(config.objective)
    return Cycle(config, objective, runtime, TrainingState(config, objective, runtime, 0))


def test_scheduled_numbers_are_logged_and_weigh_as_they_are_logged(runtime):
    cycle = scheduled_cycle(runtime)
    row = run(cycle, 1)  # two critic steps of 8 images
    expected = {
        **{f"optim/{n}_learning_rate": 0.24 for n in ("critic", "generator")},
        **{f"optim/{n}_beta1": 0.16 for n in ("critic", "generator")},
        **{f"optim/{n}_beta2": 0.936 for n in ("critic", "generator")},
        "penalty/wgan_gp_weight": 6.4,
        "optim/ema_half_life_images": 20,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    cycle = scheduled_cycle(runtime)
    weights, penalties = [], []
    for images_seen in (0, 8):
        batch = cycle.to_device(synthetic_batch(cycle.config, runtime, images_seen))
        cycle.critic_step(batch, cycle.fakes(batch, False), False)
        meters = cycle.state.meters.read()
        weights.append(meters["loss/penalty_wgan_gp"] / meters["penalty/wgan_gp"])
        penalties.append(meters["loss/critic"] - meters["loss/critic_adversarial"])
        assert penalties[-1] == pytest.approx(meters["loss/penalty_wgan_gp"], rel=1e-9)
    assert weights == pytest.approx([8.0, 7.2], rel=1e-12)


def performance(cycle: Cycle, meter: PerformanceMeter) -> dict[str, float]:
    interval = meter.interval(cycle.state.images_seen, 0.0)
    return meter.row(interval, cycle.state.averaging_seconds())


def test_the_share_of_a_peak_that_is_given(runtime):
    cycle = cycle_of(runtime, Combination("wgan", "wgan_gp"))
    cycle.config.log.peak_tflops = 0.5
    meter = PerformanceMeter(cycle.config, runtime, 0, cycle_flops=1e9)
    run(cycle, 1)
    row = performance(cycle, meter)
    assert row["perf/peak_share"] == pytest.approx(2 * row["perf/tflops"])


def test_a_deviation_of_equal_figures_is_zero_and_no_nan():
    mean = 0.1 + 0.2
    row = derived_metrics({"a/x_mean": mean, f"a/x{SQUARE}": mean**2 * (1 - 1e-16), **WITH_LOGITS})
    assert row["a/x_std"] == 0
    assert f"a/x{SQUARE}" not in row


def test_a_users_loss_may_be_named_after_squares():
    means = {"panel/critic/my_square": 2.0, "panel/critic/hinge": 1.0, **WITH_LOGITS}
    means["panel/critic/hinge_square"] = 3.0
    row = derived_metrics(means)
    assert row == {**means, "logits/wasserstein": 3.0}


WITH_LOGITS = {"logits/real_mean": 2.0, "logits/fake_mean": -1.0}


def test_a_row_without_steps_that_were_logged_has_no_histogram(runtime):
    assert logit_histograms({}, runtime) == {}
    histograms = logit_histograms({"real": torch.ones(5), "fake": torch.ones(5)}, runtime)
    assert sum(histograms["real"]["counts"]) == 5
    assert all(map(math.isfinite, histograms["real"]["edges"]))


def test_infinite_logits_are_counted_at_the_ends_of_finite_edges(runtime):
    inf = math.inf
    logits = {"real": torch.tensor([-inf, 0.0, inf]), "fake": torch.tensor([math.nan, 1.0, inf])}
    histograms = logit_histograms(logits, runtime)
    assert all(map(math.isfinite, histograms["real"]["edges"]))
    counts = histograms["real"]["counts"]
    assert (counts[0], counts[16], counts[-1], sum(counts)) == (1, 1, 1, 3)
    assert sum(histograms["fake"]["counts"]) == 3
