"""The main job as a user does it: train, look at the run folder, sample, go on."""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ganscale.cli.main import main
from ganscale.data.manifest import Manifest
from ganscale.errors import UserError
from ganscale.evaluation.sample_files import write_grid
from ganscale.objectives.losses import LOSSES
from tests.helpers.processes import REPOSITORY
from tests.helpers.runs import TINY, with_networks


def train(folder: Path, data: Path, *settings: str) -> int:
    """`ganscale train` in this process; the run is called `run`."""
    where = [f"run.folder={folder}", "run.name=run", f"data.path={data}"]
    return main(["train", *TINY, *where, *settings])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A short run with W&B offline."""
    folder = tmp_path_factory.mktemp("runs")
    settings = ("training.total_images=320", "log.wandb=offline", "checkpoint.every_images=160")
    settings = (*settings, "data.workers=2")
    assert train(folder, digits, *settings) == 0
    return folder / "run"


def test_a_run_leaves_its_folder_as_documented(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    seen = [row["progress/images_seen"] for row in rows if "loss/critic" in row]
    assert seen == list(range(32, 321, 32))
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["images_seen"] == 320
    assert summary["last"]["loss/critic"] == rows[-2]["loss/critic"]
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == [
        "images-000000160",
        "images-000000320",
    ]
    assert list(trained.glob("wandb/offline-run-*/*.wandb"))
    assert "320 of 320 images" in (trained / "log.txt").read_text()
    with Image.open(trained / "samples" / "images-000000320.png") as grid:
        assert grid.size == (64, 64)  # 4 digits of 32 pixels
    # The stored config is complete: it starts the same run again.
    assert main(["config", str(trained / "config.yaml")]) == 0


def test_samples_come_from_the_checkpoint_that_is_asked_for(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sampled(*asked: str) -> bytes:
        grid = tmp_path / "grid.png"
        assert main(["sample", str(trained), "--count", "4", "--grid", str(grid), *asked]) == 0
        return grid.read_bytes()

    earlier = sampled("--checkpoint", "images-000000160")
    assert sampled() == sampled("--checkpoint", "images-000000320") != earlier
    path = str(trained / "checkpoints" / "images-000000160")  # as a shell completes it
    assert sampled("--checkpoint", path) == earlier
    assert main(["sample", str(trained), "--grid", "x.png", "--checkpoint", "images-1"]) == 2
    said = capsys.readouterr().err
    assert "no checkpoint images-1; choose from images-000000160, images-000000320" in said


@pytest.mark.parametrize("name", ["grid", "grid.xyz", "grid.psd"])  # Pillow only reads .psd
def test_a_grid_needs_the_extension_of_a_picture(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    grid = tmp_path / "new" / name
    assert main(["sample", str(trained), "--grid", str(grid)]) == 2
    assert f"{grid} needs the extension of a picture" in capsys.readouterr().err
    assert not grid.parent.exists()


def test_a_grid_too_large_for_its_format_is_a_mistake(tmp_path: Path) -> None:
    chunks = [torch.zeros(1, 2, 16_384, 3, dtype=torch.uint8)]  # one pixel more than WebP has
    with pytest.raises(UserError, match=r"grid\.webp cannot be written"):
        write_grid(chunks, tmp_path / "grid.webp", columns=1)


def test_every_loss_stands_in_the_panel_of_every_row(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if "loss/critic" in row):
        for role in ("critic", "generator"):
            for loss in LOSSES:
                assert math.isfinite(row[f"panel/{role}/{loss}"])


def test_samples_are_the_same_for_any_count_and_go_to_grid_folder_and_shards(
    trained: Path, tmp_path: Path
) -> None:
    assert main(["sample", str(trained), "--count", "40", "--folder", str(tmp_path / "many")]) == 0
    few = ["--count", "6", "--folder", str(tmp_path / "few"), "--grid", str(tmp_path / "few.png")]
    assert main(["sample", str(trained), *few, "--columns", "3"]) == 0
    assert main(["sample", str(trained), "--count", "6", "--shards", str(tmp_path / "shards")]) == 0

    def pictures(folder: str) -> list[np.ndarray]:
        return [np.asarray(Image.open(path)) for path in sorted((tmp_path / folder).glob("*.png"))]

    many, images = pictures("many"), pictures("few")
    assert len(many) == 40
    assert np.array_equal(many[:6], images)
    rows = [np.concatenate(images[:3], axis=1), np.concatenate(images[3:], axis=1)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "few.png")), np.concatenate(rows))
    assert len(Manifest.load(tmp_path / "shards").samples) == 6


def test_interpolation_walks_from_one_image_to_another(trained: Path, tmp_path: Path) -> None:
    grid = tmp_path / "walk.png"
    command = ["sample", str(trained), "--count", "16", "--columns", "8", "--interpolate"]
    assert main([*command, "--grid", str(grid)]) == 0
    pixels = np.asarray(Image.open(grid)).astype(float).reshape(2, 32, 8, 32).transpose(0, 2, 1, 3)
    steps = np.abs(np.diff(pixels, axis=1)).mean(axis=(2, 3))
    whole = np.abs(pixels[:, -1] - pixels[:, 0]).mean(axis=(1, 2))
    assert (steps.max(axis=1) < whole).all()


@pytest.mark.parametrize("network", ["resnet", "r3gan", "stylegan2"])
def test_a_class_conditional_network_trains_and_samples_the_class_asked_for(
    tmp_path: Path, digits: Path, network: str
) -> None:
    where = [f"run.folder={tmp_path}", "run.name=run", f"data.path={digits}"]
    settings = [*TINY, *where, "training.total_images=64", "training.conditional=true"]
    if network != "resnet":
        settings = with_networks(network, settings)
    else:
        settings += [
            "generator={target: resnet, latent_dim: 8, options: {width: 4}}",
            "critic={target: resnet, options: {width: 4, spectral_norm: true}}",
        ]
    assert main(["train", *settings]) == 0
    run = str(tmp_path / "run")
    for label in ("3", "4"):
        command = ["sample", run, "--count", "2", "--class", label, "--folder"]
        assert main([*command, str(tmp_path / label)]) == 0
    three, four = (Image.open(tmp_path / label / "000000000.png") for label in ("3", "4"))
    assert not np.array_equal(np.asarray(three), np.asarray(four))
    assert main(["sample", run, "--class", "10", "--grid", str(tmp_path / "x.png")]) == 2


@pytest.mark.parametrize("piece", sorted((REPOSITORY / "configs" / "objective").glob("*.yaml")))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_objective_trains(tmp_path: Path, digits: Path, piece: Path, precision: str) -> None:
    settings = (str(piece), "training.total_images=320", f"training.precision={precision}")
    assert train(tmp_path, digits, *settings, "objective.n_critic=2") == 0
    last = json.loads((tmp_path / "run" / "summary.json").read_text())["last"]
    assert all(math.isfinite(value) for value in last.values())
    if piece.stem == "wgan":
        critic = load_file(tmp_path / "run" / "checkpoints" / "images-000000320" /
                           "critic.safetensors")  # fmt: skip
        assert max(weight.abs().max() for weight in critic.values() if weight.ndim > 1) <= 0.01


@pytest.mark.parametrize("config", ["dcgan64", "resnet32"])
def test_the_complete_configs_train(tmp_path: Path, digits: Path, config: str) -> None:
    command = ["train", str(REPOSITORY / "configs" / f"{config}.yaml"), f"run.folder={tmp_path}"]
    small = ["training.global_batch_size=4", "generator.options.width=8", "critic.options.width=8"]
    short = ["training.total_images=20", "samples.count=1", "log.wandb=disabled"]
    few = ["evaluation.samples=8", "evaluation.reference_images=64"]
    assert main([*command, *small, *short, *few, f"data.path={digits}"]) == 0


_MY_NETS = """
from torch import nn

class Generator(nn.Module):
    def __init__(self, latent_dim, sample_shape, hidden=8):
        super().__init__()
        self.shape, size = sample_shape, sample_shape[0] * sample_shape[1] * sample_shape[2]
        self.layers = nn.Sequential(nn.Linear(latent_dim, hidden), nn.Linear(hidden, size))

    def forward(self, latents):
        return self.layers(latents).tanh().view(-1, *self.shape)

class PatchCritic(nn.Module):
    def __init__(self, sample_shape):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(sample_shape[0], 4, 4, 4), nn.SiLU(),
                                    nn.Conv2d(4, 1, 3))

    def forward(self, images):
        return self.layers(images)

class TiedCritic(PatchCritic):
    def __init__(self, sample_shape):
        super().__init__(sample_shape)
        self.layers.append(nn.BatchNorm2d(1))
"""


def test_networks_of_the_users_own_train_from_an_import_path(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "my_nets.py").write_text(_MY_NETS)
    for critic in ("PatchCritic", "TiedCritic"):
        (tmp_path / f"{critic}.yaml").write_text(
            "generator: {target: 'my_nets:Generator', options: {hidden: 16}}\n"
            f"critic: {{target: 'my_nets:{critic}'}}\n"
        )
    monkeypatch.chdir(tmp_path)
    for critic, exit_code in (("PatchCritic", 0), ("TiedCritic", 2)):
        command = ["train", TINY[0], f"{critic}.yaml", *TINY[3:], f"data.path={digits}"]
        where = [f"run.folder={tmp_path}", f"run.name={critic}", "training.total_images=64"]
        assert main([*command, *where]) == exit_code
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    assert "the critic's layer `layers.3` is a batch norm" in capsys.readouterr().err


_MY_LOSSES = """
from ganscale.objectives.losses import Loss

def quadratic_potential(scale: float = 1.0) -> Loss:
    def critic(real_logits, fake_logits):
        gap = real_logits - fake_logits
        return {"pair": scale * (gap.square() / 2 - gap).mean()}

    return Loss(critic, lambda fake_logits: {"fake": -fake_logits.mean()})
"""


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_loss_of_the_users_own_trains_and_appears_in_the_panel(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, is_trained: bool
) -> None:
    (tmp_path / "potentials.py").write_text(_MY_LOSSES)
    monkeypatch.chdir(tmp_path)
    name = "potentials:quadratic_potential"
    trained = (f"objective.loss.name={name}", "objective.loss.options.scale=2")
    settings = trained if is_trained else (f"objective.panel=[{name}]",)
    assert train(tmp_path, digits, *settings, "training.total_images=64") == 0
    last = json.loads((tmp_path / "run" / "summary.json").read_text())["last"]
    assert math.isfinite(last["panel/critic/quadratic_potential"])
    assert math.isfinite(last["panel/generator/quadratic_potential"])


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_last_good_state(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture
) -> None:
    explosive = ("training.total_images=3200", "optimizer.critic.learning_rate=1e18")
    assert train(tmp_path, digits, *explosive) == 1
    message = capsys.readouterr().err
    assert "a gradient became NaN or infinite after" in message
    assert "the last good state is saved" in message
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    for file in checkpoint.glob("*.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values())
    # It is a checkpoint as any other, though this one is beyond saving by a lower rate.
    tamed = ("training.total_images=64", "optimizer.critic.learning_rate=1e-4")
    assert train(tmp_path, digits, *tamed) == 2
    assert train(tmp_path, digits, *tamed, "resume.allow=[optimizer]") in (0, 1)
