"""Evaluations against the formulas on the whole set at once, and what they refuse."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ganscale.data.dataset import open_data
from ganscale.data.images.decoding import decode
from ganscale.data.shard_reader import ShardReader
from ganscale.errors import UserError
from ganscale.evaluation.evaluator import Evaluator
from ganscale.evaluation.figures import METRICS, Figures
from ganscale.evaluation.images import DataSetImages, FileImages
from ganscale.evaluation.quality.class_scores import class_divergence
from ganscale.evaluation.quality.kernel_distance import kernel_distance
from ganscale.evaluation.quality.neighbours import density_and_coverage, precision_and_recall
from ganscale.evaluation.rounds import Interrupted
from ganscale.runtime import Runtime
from ganscale.schema import DataConfig, EvaluationConfig
from ganscale.shards.sources import list_images
from tests.helpers.class_scores import class_scores
from tests.helpers.feature_networks import Projection
from tests.helpers.images import encoded

OURS = "tests.helpers.feature_networks:Projection"
SHAPE = (1, 32, 32)


@pytest.fixture
def data(digits: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(
        path=str(digits), resolution=32, channels=1, cache=str(tmp_path / "cache"), workers=1
    )


def evaluate(
    data: DataConfig,
    runtime: Runtime,
    samples: np.ndarray,
    is_stopped: Callable[[], bool] = lambda: False,
    **settings: object,
) -> Figures:
    manifest = open_data(data).manifest
    assert manifest is not None
    config = EvaluationConfig(network=OURS, samples=len(samples), **settings)  # type: ignore[arg-type]
    evaluator = Evaluator(config, data, manifest, runtime)
    images = DataSetImages(manifest, data, samples)
    try:
        return evaluator.evaluate(images, is_stopped, lambda *_: None)
    finally:
        images.close()


def features_of(data: DataConfig, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Read and projected here, in one batch."""
    manifest = open_data(data).manifest
    assert manifest is not None
    reader = ShardReader(manifest, data)
    pixels = np.stack([decode(reader.read(int(i)), 32, 1) for i in samples])
    reader.close()
    return Projection(SHAPE).features(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_figures_are_those_of_the_whole_sets(data: DataConfig, runtime: Runtime) -> None:
    samples = np.arange(0, 5000, 10)
    metrics = [metric for metric in METRICS if metric != "kid_subsets"]
    found = evaluate(data, runtime, samples, metrics=metrics, batch_size=64)
    real, real_classes = features_of(data, np.arange(5000))
    fake, fake_classes = features_of(data, samples)
    # The trace of the root is the sum of the roots of the eigenvalues of the product.
    (mean_r, mean_f), (cov_r, cov_f) = ([f(x) for x in (real, fake)] for f in (_mean, _covariance))
    product = torch.linalg.eigvals(cov_r @ cov_f).real.clamp_min(0).sqrt().sum()
    distance = (mean_r - mean_f).square().sum() + cov_r.trace() + cov_f.trace() - 2 * product
    real, fake = real.float(), fake.float()  # as they are kept
    scores = class_scores(fake_classes)
    histogram = torch.bincount(real_classes.argmax(1), minlength=5)
    expected = {
        "fd": distance.item(),
        "fd64": distance.item(),  # of eight features, eight are the main components
        "kid": kernel_distance(real, fake),
        "is": scores.inception_score,
        "modes": scores.modes_covered,
        "class_kl": class_divergence(scores.histogram, histogram),
        **dict(zip(("precision", "recall"), precision_and_recall(real, fake), strict=True)),
        **dict(zip(("density", "coverage"), density_and_coverage(real, fake), strict=True)),
    }
    for metric, value in expected.items():
        assert found.values[f"eval/{metric}_Projection"] == pytest.approx(value, rel=1e-6), metric
    assert (found.identity.reference_images, found.identity.samples) == (5000, 500)


def test_figures_do_not_depend_on_the_batch(data: DataConfig, runtime: Runtime) -> None:
    metrics = [*METRICS]
    samples = np.arange(300)
    found = []
    for batch_size in (16, 250):
        data.cache = f"{data.cache}{batch_size}"  # the reference is computed anew
        found.append(evaluate(data, runtime, samples, metrics=metrics, batch_size=batch_size))
    assert found[0].values == pytest.approx(found[1].values, rel=1e-9)
    assert found[0].identity == found[1].identity


def test_a_reference_is_computed_once_for_a_machine_and_again_if_its_cache_is_damaged(
    data: DataConfig, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    samples = np.arange(100)
    caplog.set_level("INFO")
    first = evaluate(data, runtime, samples)
    assert "features of the reference's 5,000 images" in caplog.text
    caplog.clear()
    assert evaluate(data, runtime, samples).values == first.values
    assert "features of the reference" not in caplog.text
    (cached,) = (Path(data.cache) / "references").glob("*.safetensors")
    cached.write_bytes(cached.read_bytes()[:-100])
    assert evaluate(data, runtime, samples).values == first.values
    assert "is damaged" in caplog.text


def test_a_reference_of_fewer_images_is_the_same_choice_whatever_the_settings_of_the_run(
    data: DataConfig, runtime: Runtime
) -> None:
    samples = np.arange(100)
    first = evaluate(data, runtime, samples, reference_images=700)
    data.lanes, data.block_samples, data.cache = 4, 16, f"{data.cache}2"
    second = evaluate(data, runtime, samples, reference_images=700)
    assert first.identity.reference_images == 700
    assert first.values == pytest.approx(second.values, rel=1e-12)


def test_a_stop_interrupts_between_batches(data: DataConfig, runtime: Runtime) -> None:
    asked = []

    def is_stopped() -> bool:
        asked.append(True)
        return len(asked) > 3

    with pytest.raises(Interrupted):
        evaluate(data, runtime, np.arange(100), is_stopped, batch_size=16)
    assert len(asked) == 4
    assert not [*(Path(data.cache) / "references").glob("*.safetensors")]


def test_files_of_another_size_are_refused(
    data: DataConfig, runtime: Runtime, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate((32, 32, 24)):
        (folder / f"{i}.png").write_bytes(encoded(np.full((size, size), 9, np.uint8)))
    config = EvaluationConfig(network=OURS, samples=3)
    evaluator = Evaluator(config, data, open_data(data).manifest, runtime)
    images = FileImages(list_images(str(folder)), SHAPE)
    with pytest.raises(UserError, match=r"2\.png in .* has 24 x 24 pixels, not 32 x 32"):
        evaluator.evaluate(images, lambda: False, lambda *_: None)


def test_some_of_many_files_are_a_random_choice_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in range(100):
        file = tmp_path / f"class{number // 25}" / f"{number:03d}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encoded(np.full((4, 4), number, np.uint8)))
    source = list_images(str(tmp_path))
    chosen = FileImages(source, (1, 4, 4), 40)
    numbers = chosen.chunk(range(40)).images[:, 0, 0, 0]
    assert numbers.tolist() == sorted({*numbers.tolist()})
    per_class = torch.bincount(numbers.long() // 25)
    assert per_class.min() > 3
    fewer = FileImages(source, (1, 4, 4), 20).chunk(range(20)).images[:, 0, 0, 0]
    assert {*fewer.tolist()} < {*numbers.tolist()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["fid"]}, "`fid` is the Fréchet distance of the published Inception"),
        ({"metrics": ["fdd"]}, "there is no `fdd`"),
        ({"metrics": []}, "evaluation.metrics is empty"),
        ({"metrics": ["kid"], "reference": "x.npz"}, "`kid` needs the images of the reference"),
        ({"reference": "missing.npz"}, "missing.npz cannot be read"),
        ({"metrics": ["recall"], "samples": 3}, "`recall` needs 4 samples or more, not 3"),
        (
            {"metrics": ["density"], "reference_images": 5},
            "`density` needs 6 images of the reference or more, not 5",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_computed(
    data: DataConfig, runtime: Runtime, settings: dict, message: str
) -> None:
    config = EvaluationConfig(network=OURS, **settings)
    with pytest.raises(UserError, match=message):
        Evaluator(config, data, open_data(data).manifest, runtime)


def _mean(features: torch.Tensor) -> torch.Tensor:
    return features.mean(0)


def _covariance(features: torch.Tensor) -> torch.Tensor:
    return torch.cov(features.T)
