"""The loop as a whole, in this process, on networks of a few hundred weights."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ganscale.config import resolve
from ganscale.errors import NonFiniteError
from ganscale.report.history import faults_of, run_state
from ganscale.report.run_reader import read_runs
from ganscale.run_folder import in_its_folder
from ganscale.runtime import Runtime
from ganscale.shards.indexing import build_manifest
from ganscale.tracking.alerts import read_alerts
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
    assert seen == [logits, penalty, logits, penalty, of_generator, panel]
    assert all(parameter.grad is not None for parameter in trainer.state.generator.parameters())


@pytest.mark.parametrize("breaks_at", [0, 20, 24])
def test_a_run_that_met_a_nan_continues_from_its_last_good_update(folder, runtime, breaks_at):
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
    whole.state.critic_updater.optimizer.register_step_pre_hook(
        lambda *_: critics.update({whole.state.images_seen: state_of(whole.state.critic)})
    )
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
        spoilt = {name: value * (math.nan if is_last else 1) for name, value in meters.items()}
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


def interrupt_at(trainer: Trainer, images_seen: int, error: type[BaseException]) -> None:
    """As a kill: no checkpoint is saved."""
    trainer.cycle.run = partial(_run_until, trainer, trainer.cycle.run, images_seen, error)
    with pytest.raises(error):
        trainer.run()


def _run_until(trainer, run, images_seen, error, *arguments, **options):
    if trainer.state.images_seen >= images_seen:
        raise error
    return run(*arguments, **options)


def rows_of_pictures(trainer: Trainer) -> list[tuple[str, int]]:
    rows: list[dict[str, Any]] = list(read_rows(trainer.folder.record))
    return [
        (name, row["progress/images_seen"])
        for row in rows
        for name in ("samples/ema", "samples/real")
        if name in row
    ]


def test_the_rows_of_pictures_survive_a_kill_before_the_first_checkpoint(folder, runtime):
    more = ("samples.every_images=40", "training.total_images=48")
    killed = trainer_of(folder, runtime, "pictures", *more)
    interrupt_at(killed, 24, RuntimeError)
    assert killed.folder.sample_grid(0).exists()
    continued = trainer_of(folder, runtime, "pictures", *more)
    assert continued.run() == 0
    whole = trainer_of(folder, runtime, "whole-pictures", *more)
    assert whole.run() == 0
    assert rows_of_pictures(continued) == rows_of_pictures(whole)
    assert ("samples/ema", 0) in rows_of_pictures(whole)


def test_a_row_of_pictures_of_which_one_could_not_be_written_is_made_after_the_resume(
    folder, runtime
):
    more = ("samples.every_images=40", "checkpoint.every_images=40")
    failing = trainer_of(folder, runtime, "unwritten", *more)
    obstacle = failing.folder.sample_grid(40, "interpolation")
    obstacle.mkdir(parents=True)  # root may write into any folder
    interrupt_at(failing, 48, RuntimeError)
    assert failing.folder.sample_grid(40).exists()
    assert ("samples/ema", 40) not in rows_of_pictures(failing)
    obstacle.rmdir()
    continued = trainer_of(folder, runtime, "unwritten", *more)
    assert continued.resumed_at == 40
    assert continued.run() == 0
    assert ("samples/ema", 40) in rows_of_pictures(continued)


def test_a_row_of_real_pictures_after_the_checkpoint_survives_a_kill(folder, runtime):
    more = ("samples.count=20", "checkpoint.every_images=8")
    killed = trainer_of(folder, runtime, "real", *more)
    interrupt_at(killed, 24, RuntimeError)
    killed.writer.close()
    assert ("samples/real", 16) in rows_of_pictures(killed)
    picture = killed.folder.real_samples.read_bytes()
    for path in killed.folder.checkpoints.glob("images-*"):
        if path.name != "images-000000008":
            shutil.rmtree(path)
    continued = trainer_of(folder, runtime, "real", *more)
    assert continued.resumed_at == 8
    assert continued.run() == 0
    assert ("samples/real", 8) in rows_of_pictures(continued)
    assert killed.folder.real_samples.read_bytes() == picture


def test_a_run_that_trains_nothing_leaves_the_stored_settings_as_they_were(folder, runtime):
    more = ("training.schedule=linear",)
    done = trainer_of(folder, runtime, "nothing", *more)
    assert done.run() == 0
    stored = done.folder.config.read_bytes()
    shorter = ("training.total_images=40", "resume.allow=[training.total_images]")
    again = trainer_of(folder, runtime, "nothing", *more, *shorter)
    assert again.run() == 0
    longer = ("training.total_images=96", "resume.allow=[training.total_images]")
    stopped = trainer_of(folder, runtime, "nothing", *more, *longer)
    stopped.stop.request()
    assert stopped.run() == 75
    assert done.folder.config.read_bytes() == stored
    assert trainer_of(folder, runtime, "nothing", *more).run() == 0


def test_a_run_whose_identity_was_deleted_continues_from_its_checkpoint(folder, runtime):
    more = ("checkpoint.every_images=40",)
    killed = trainer_of(folder, runtime, "no-identity", *more)
    interrupt_at(killed, 64, RuntimeError)
    before = killed.folder.record.read_bytes()
    killed.folder.identity.unlink()
    continued = trainer_of(folder, runtime, "no-identity", *more)
    assert continued.resumed_at == 40
    assert continued.run() == 0
    after = continued.folder.record.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n", 0, len(before) // 2)])


def test_the_config_in_a_copied_run_folder_means_the_copy(folder, runtime, monkeypatch):
    stopped = trainer_of(folder, runtime, "original", "training.total_images=40")
    assert stopped.run() == 0
    original = {path: path.read_bytes() for path in stopped.folder.path.rglob("*.json*")}
    shutil.copytree(stopped.folder.path, folder / "elsewhere" / "fork")
    monkeypatch.chdir(folder / "elsewhere" / "fork")
    for config in ("config.yaml", "../fork/config.yaml", str(Path.cwd() / "config.yaml")):
        resolved = in_its_folder(resolve([config, "training.total_images=80"]))
        assert Path(resolved.config.run.folder, resolved.config.run.name).samefile(Path.cwd())
    fork = Trainer(resolved, runtime)
    assert fork.resumed_at == 40
    assert fork.run() == 0
    assert f"is a copy of {stopped.folder.path}" in fork.folder.log.read_text()
    assert fork.folder.read_identity()["id"] != stopped.folder.read_identity()["id"]
    assert [alert.images_seen for alert in read_alerts(fork.folder)] == [80]
    assert {path: path.read_bytes() for path in original} == original
    named = in_its_folder(resolve(["config.yaml", "run.name=other"])).config.run
    assert named.name == "other"


def test_a_stop_of_ones_own_is_not_a_fault_in_the_report(folder, runtime):
    stopped = trainer_of(folder, runtime, "stopped")
    stopped.cycle.run = partial(_stop_after, stopped, stopped.cycle.run)
    assert stopped.run() == 75
    (run,) = read_runs([stopped.folder.path])
    assert run_state(run) == ("stopped; the same command continues it", "note")
    assert faults_of(run) == []
    assert "stopped on request at 16 images" in stopped.folder.log.read_text()


def _stop_after(trainer, run, *arguments, **options):
    trainer.stop.request()
    return run(*arguments, **options)
