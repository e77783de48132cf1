"""The loop as a whole, in this process, on networks of a few hundred weights."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ganscale.config import resolve
from ganscale.errors import NonFiniteError, UserError
from ganscale.runtime import Runtime
from ganscale.shards.indexing import build_manifest
from ganscale.tracking.alerts import read_alerts
from ganscale.training.network_setup import load_run_generator
from ganscale.training.trainer import Trainer
from tests.helpers.images import encoded
from tests.helpers.runs import read_rows
from tests.helpers.tars import write_tar

CONFIG = """
data: {resolution: 8, channels: 1, lanes: 4, block_samples: 4, workers: 0}
generator: {target: mlp, latent_dim: 4, options: {width: 16, depth: 1}}
critic: {target: mlp, options: {width: 16, depth: 1}}
objective: {loss: {name: wgan}, penalties: {wgan_gp: {weight: 10}}, n_critic: 2}
optimizer: {critic: {learning_rate: 1e-3}, generator: {learning_rate: 1e-3}}
training: {total_images: 80, global_batch_size: 4}
log: {every_images: 16, wandb: disabled}
samples: {count: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trainer")
    draws = np.random.default_rng(0)
    images = (encoded(draws.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(23))
    members = [(f"{sample}.png", image) for sample, image in enumerate(images)]
    write_tar(root / "data" / "shard-0.tar", members)
    build_manifest(root / "data")
    (root / "run.yaml").write_text(CONFIG)
    return root


def settings(folder: Path, name: str, *more: str) -> list[str]:
    where = [f"data.path={folder / 'data'}", f"run.folder={folder / 'runs'}", f"run.name={name}"]
    return [str(folder / "run.yaml"), *where, *more]


def trainer_of(folder: Path, runtime: Runtime, name: str, *more: str) -> Trainer:
    return Trainer(resolve(settings(folder, name, *more)), runtime)


def test_the_critic_sees_fakes_and_mixed_images_without_the_generators_graph(folder, runtime):
    trainer = trainer_of(folder, runtime, "graph", "training.total_images=8")
    seen: list[tuple[int, bool, bool]] = []
    trainer.state.critic.register_forward_pre_hook(
        lambda _, inputs: seen.append((len(inputs[0]), inputs[0].requires_grad, inputs[0].is_leaf))
    )
    trainer.run()
    logits, penalty = (8, False, True), (4, True, True)
    of_generator, panel = (4, True, False), (4, False, True)
    of_checkpoint = (4, False, True)
    assert seen == [logits, penalty, logits, penalty, of_generator, panel, of_checkpoint]
    assert all(parameter.grad is not None for parameter in trainer.state.generator.parameters())


CHANGING = """
import torch
from torch import nn

class Generator(nn.Module):
    def __init__(self, latent_dim, sample_shape):
        super().__init__()
        self.shape, self.layer = sample_shape, nn.Linear(latent_dim, 64)

    def forward(self, latents):
        return torch.tanh(self.layer(latents)).view(-1, *self.shape)
"""


def test_a_run_whose_networks_code_has_changed_is_refused_unless_it_is_allowed(
    folder, runtime, tmp_path, monkeypatch
):
    """The weights fit, but a pixel has moved."""
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "nets_that_move.py"
    source.write_text(CHANGING)
    networks = tmp_path / "networks.yaml"
    networks.write_text("generator: {target: 'nets_that_move:Generator', latent_dim: 4}")
    more = [str(networks)]
    trainer_of(folder, runtime, "moved", "training.total_images=8", *more).run()
    trainer_of(folder, runtime, "moved", "training.total_images=16", *more).run()
    source.write_text(CHANGING.replace("(latents)).view", "(latents)).roll(1, 1).view"))
    monkeypatch.delitem(sys.modules, "nets_that_move")
    more.append("training.total_images=24")
    message = r"generator nets_that_move:Generator computes something else .*generator\.target\]"
    with pytest.raises(UserError, match=message):
        trainer_of(folder, runtime, "moved", *more)
    run = folder / "runs" / "moved"
    with pytest.raises(UserError, match=r"computes something else .*--allow-changed-code"):
        load_run_generator(run, "ema")
    load_run_generator(run, "ema", allow_changed_code=True)
    trainer_of(folder, runtime, "moved", *more, "resume.allow=[generator.target]").run()
    load_run_generator(run, "ema")


def test_the_contiguous_layout_holds_for_images_of_one_channel(folder, runtime, tmp_path):
    networks = tmp_path / "networks.yaml"
    small = "{target: dcgan, options: {width: 4}}"
    networks.write_text(f"generator: {small}\ncritic: {small}")
    more = ["training.total_images=8", "training.memory_format=contiguous", "data.resolution=16"]
    trainer = trainer_of(folder, runtime, "layout", str(networks), *more)
    maps: list[torch.Tensor] = []
    for module in trainer.state.critic.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: maps.append(output.detach()))
    trainer.run()
    assert len(maps) > 10
    assert all(each.view(-1).shape == (each.numel(),) for each in maps)


@pytest.mark.parametrize("breaks_at", [0, 20, 24])
def test_a_run_that_met_a_nan_continues_from_its_last_good_update(
    folder, runtime, monkeypatch, breaks_at
):
    """Whether the NaN came in the first or the second critic update of a cycle."""
    broken = trainer_of(folder, runtime, f"broken-{breaks_at}")
    next(broken.state.critic.parameters()).register_hook(
        lambda gradient: gradient * (math.nan if broken.state.images_seen == breaks_at else 1)
    )
    with pytest.raises(NonFiniteError, match=f"became NaN or infinite after {breaks_at} images"):
        broken.run()
    saved = broken.folder.checkpoints / f"images-{breaks_at:09d}"
    assert "NaN" not in (saved / "state.json").read_text()
    (alert,) = read_alerts(broken.folder)
    assert (alert.kind, "with a lower learning rate" in alert.text) == ("nan", True)
    rows: list[dict[str, Any]] = list(read_rows(broken.folder.record))
    times = [row["progress/images_seen"] for row in rows]
    assert times == sorted(times)
    assert times[-1] == breaks_at
    assert math.isnan(rows[-1]["optim/critic_gradient_norm"])
    assert math.isnan(rows[-1]["optim/critic_gradient_norm_max"])
    assert math.isfinite(rows[-1]["loss/critic"])
    assert rows[-1]["audit/non_finite"] == 1
    assert f"{breaks_at} of 80 images, critic" in broken.folder.log.read_text()

    whole = trainer_of(folder, runtime, f"whole-{breaks_at}")
    critics = {}
    optimizer = whole.state.critic_updater.optimizer
    step = optimizer.step

    def step_after_a_copy(learning_rate: float, images_seen: int) -> None:
        critics[whole.state.images_seen] = state_of(whole.state.critic)
        step(learning_rate, images_seen)

    monkeypatch.setattr(optimizer, "step", step_after_a_copy)
    assert whole.run() == 0
    for name, tensor in load_file(saved / "critic.safetensors").items():
        assert torch.equal(tensor, critics[breaks_at][name]), name

    # A copy, since this process holds the lock of the folder as long as it lives.
    shutil.copytree(broken.folder.path, folder / "runs" / f"copy-{breaks_at}")
    continued = trainer_of(folder, runtime, f"copy-{breaks_at}")
    assert continued.resumed_at == breaks_at
    assert continued.run() == 0
    assert "NaN" not in (continued.folder.path / "metrics.jsonl").read_text()
    resumed_rows: list[dict[str, Any]] = list(read_rows(continued.folder.record))
    assert list(map(str, resumed_rows[: len(rows)])) == list(map(str, rows))  # NaN is not NaN
    assert {
        row["audit/non_finite"] for row in resumed_rows[len(rows) :] if "loss/critic" in row
    } == {1}
    assert continued.state.health.non_finite_events == 1
    assert continued.state.images_seen >= 80


def test_a_row_with_a_loss_that_is_no_number_counts_it(folder, runtime, monkeypatch):
    """Though all gradients were finite."""
    broken = trainer_of(folder, runtime, "loss")
    add = broken.state.meters.add

    def breaking(meters: dict, *maxima: dict) -> None:
        is_last = broken.state.images_seen == 28
        spoilt = dict.fromkeys(meters, math.nan) if is_last else meters
        add(spoilt, *maxima)

    monkeypatch.setattr(broken.state.meters, "add", breaking)
    with pytest.raises(NonFiniteError, match="became nan within the 16 images before 32"):
        broken.run()
    first, last = (row for row in read_rows(broken.folder.record) if "loss/critic" in row)
    assert (first["audit/non_finite"], last["audit/non_finite"]) == (0, 1)
    assert last["progress/images_seen"] == 32


def test_weights_do_not_depend_on_how_often_rows_are_logged(folder, runtime):
    """With a penalty, a lazy one and none, when the gradient norm at real images is measured."""
    for name, setting in (("always", "weight=10"), ("lazy", "interval=3"), ("never", "weight=0")):
        ends = []
        for every in (8, 80):
            asked = f"log.every_images={every}", f"objective.penalties.wgan_gp.{setting}"
            ends.append(trainer_of(folder, runtime, f"rows-{name}-{every}", *asked))
            assert ends[-1].run() == 0
        often, seldom = (trainer.state.audited() for trainer in ends)
        assert often.keys() == seldom.keys()
        for tensor_name, tensor in often.items():
            assert torch.equal(tensor, seldom[tensor_name]), (name, tensor_name)
        assert len(list(read_rows(ends[0].folder.record))) > 10


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_a_profile_tells_where_the_time_of_a_cycle_goes(folder, runtime):
    trainer = trainer_of(
        folder, runtime, "profiled", "profile.cycles=3", "checkpoint.every_images=8"
    )
    assert trainer.run() == 0
    written = trainer.folder.path / "profile"
    events = json.loads((written / "trace.json").read_text())["traceEvents"]
    spans = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    # 3 cycles of 2 critic steps, each cycle with a checkpoint
    for name, count in (("critic forward", 6), ("generator backward", 3), ("checkpoint", 3)):
        assert spans.count(name) == count
    sections = (written / "table.txt").read_text().partition("\n\n")[0].splitlines()[1:]
    assert {"data wait", "critic update", "ema", "checkpoint"} <= {s[:36].strip() for s in sections}
    assert sum(float(line[46:54].strip(" %")) for line in sections) == pytest.approx(100, abs=1)


def test_a_run_too_short_to_be_profiled_says_so(folder, runtime):
    trainer = trainer_of(folder, runtime, "short", "profile.cycles=30", "training.total_images=16")
    assert trainer.run() == 0
    assert "ended before 30 cycles could be profiled" in trainer.folder.log.read_text()
