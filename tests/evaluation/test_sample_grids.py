"""The grids of a run, made by networks of a few weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ganscale.config import resolve
from ganscale.data.batch import Batch
from ganscale.data.images.grid import image_grid
from ganscale.data.images.preprocessing import to_bytes
from ganscale.evaluation.sample_grids import SampleGrids
from ganscale.objectives.objective import build_objective
from ganscale.randomness import normal
from ganscale.run_folder import RunFolder
from ganscale.runtime import Runtime
from ganscale.training.state import TrainingState

CONFIG = """
data: {path: nowhere, resolution: 8, channels: 1}
generator: {target: mlp, latent_dim: 4, options: {width: 16, depth: 1}}
critic: {target: mlp, options: {width: 16, depth: 1}}
objective: {loss: {name: wgan}}
optimizer: {critic: {learning_rate: 1e-3}, generator: {learning_rate: 1e-3}}
training: {total_images: 80, global_batch_size: 4}
samples: {count: 20, interpolations: 2}
"""


def never() -> bool:
    return False


@pytest.fixture
def state(tmp_path: Path, runtime: Runtime) -> TrainingState:
    (tmp_path / "run.yaml").write_text(CONFIG)
    config = resolve([str(tmp_path / "run.yaml")]).config
    state = TrainingState(config, build_objective(config.objective), runtime, num_classes=0)
    with torch.no_grad():  # else the EMA is the generator
        for parameter in state.ema.parameters():
            parameter.mul_(3)
    state.images_seen = 64
    return state


def grids_of(
    state: TrainingState, folder: Path, *settings: str, lacks_real: bool = True
) -> SampleGrids:
    config = resolve([str(folder / "run.yaml"), *settings]).config
    run = config, RunFolder(folder), state.generator, state.ema
    return SampleGrids(*run, state.num_classes, state.images_seen, lacks_real=lacks_real)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def batch_of(*values: int) -> Batch:
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 1)
    return Batch(images, torch.full([len(values)], -1), torch.arange(len(values)))


def test_ema_and_non_ema_weights_show_the_same_latents(state, tmp_path):
    files = grids_of(state, tmp_path).make(64, never)
    assert {name: path.name for name, path in files.items()} == {
        "samples/ema": "images-000000064.png",
        "samples/non_ema": "non_ema-000000064.jpg",
        "samples/interpolation": "interpolation-000000064.jpg",
    }
    latents = normal(0, "samples", torch.arange(20), 4)
    for name, network, largest_error in (
        ("samples/ema", state.ema, 1),  # lossless, but for how a batch of 20 is summed
        ("samples/non_ema", state.generator, 40),
    ):
        with torch.no_grad():
            images = to_bytes(network.eval()(latents)).numpy()
        expected = image_grid(images, columns=4).squeeze(2).astype(int)
        assert np.abs(pixels(files[name]) - expected).max() <= largest_error
    assert pixels(files["samples/interpolation"]).shape == (2 * 8, 8 * 8)


def test_only_what_is_wanted_is_made(state, tmp_path):
    grids = grids_of(
        state, tmp_path, "samples.non_ema=false", "samples.interpolations=0", "samples.real=false"
    )
    assert [*grids.make(64, never)] == ["samples/ema"]
    assert grids.add_real_images([batch_of(*range(20))]) is None


def test_a_stop_gives_all_of_them_up(state, tmp_path):
    """The fourth time it is asked: after the average's two chunks and the raw one's first."""
    asked = 0

    def is_stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked == 4

    grids = grids_of(state, tmp_path)
    state.generator.train()
    assert grids.make(64, is_stopped) == {}
    assert asked == 4
    assert not (tmp_path / "samples").exists()
    assert state.generator.training


def test_real_images_are_the_first_that_were_trained_on(state, tmp_path):
    state.images_seen = 0
    grids = grids_of(state, tmp_path, "samples.count=4")
    assert grids.add_real_images([batch_of(10, 60)]) is None
    path = grids.add_real_images([batch_of(110), batch_of(160, 210)])
    assert path == tmp_path / "samples" / "real.jpg"
    quarters = pixels(tmp_path / "samples" / "real.jpg").reshape(2, 8, 2, 8).mean(axis=(1, 3))
    assert np.abs(quarters - [[10, 60], [110, 160]]).max() < 2
    assert grids.add_real_images([batch_of(1, 2, 3, 4)]) is None


def test_a_resumed_run_keeps_its_real_images(state, tmp_path):
    real = tmp_path / "samples" / "real.jpg"
    real.parent.mkdir()
    real.write_bytes(b"of before")
    batches = [batch_of(*range(20))]
    assert grids_of(state, tmp_path, lacks_real=False).add_real_images(batches) is None
    grids = grids_of(state, tmp_path)  # a kill cost the row, not the file
    assert [grids.add_real_images(batches), grids.add_real_images(batches)] == [real, None]
    assert real.read_bytes() == b"of before"
    state.images_seen = 0  # it starts again
    assert grids_of(state, tmp_path).add_real_images(batches) == real
    assert real.read_bytes() != b"of before"


def test_the_walk_of_a_row_stays_in_one_class(state, tmp_path):
    """The labels of 3 walks of 8 images: a generator that shows its label shows three greys."""

    class ShowsItsLabel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            grey = labels.to(torch.float32) / 5 - 1 + 0 * self.weight
            return grey.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    state.ema, state.num_classes = ShowsItsLabel(), 10
    grids = grids_of(state, tmp_path, "samples.interpolations=3", "samples.non_ema=false")
    rows = pixels(grids.make(64, never)["samples/interpolation"])
    greys = rows.reshape(3, 8, 64).mean(axis=(1, 2))
    assert np.abs(rows.reshape(3, 8, 64) - greys[:, None, None]).max() < 4
    assert np.abs(greys - [0, 25.5, 51]).max() < 2
