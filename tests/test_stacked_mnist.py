"""StackedMNIST's data and classifier, against what their classes say and a closed form."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.stacked_digits import (
    CLASSES,
    StackedDigits,
    stacked,
    train_classifier,
    write_stacked,
)
from ganscale.data.images.decoding import decode
from ganscale.data.manifest import Manifest
from ganscale.data.shard_reader import ShardReader
from ganscale.evaluation.quality.class_scores import ClassScores, class_divergence
from ganscale.schema import DataConfig
from ganscale.shards import bundled
from tests.helpers.class_scores import class_scores
from tests.helpers.processes import HANG_SECONDS, REPOSITORY


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[StackedDigits, float]:
    """Trained, with its accuracy on digits that it has not seen."""
    weights = tmp_path_factory.mktemp("classifier") / "digits.pt"
    accuracy = train_classifier(weights)
    return StackedDigits(str(weights)).eval(), accuracy


def probabilities(network: StackedDigits, images: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return network.features(torch.from_numpy(images).permute(0, 3, 1, 2))[1]


def test_a_class_is_the_number_that_the_digits_of_the_channels_make() -> None:
    images, classes = stacked(200, seed=1)
    digits, labels, _ = bundled.load("mnist")
    by_pixels = {digit.tobytes(): int(label) for digit, label in zip(digits, labels, strict=True)}
    for image, number in zip(images, classes, strict=True):
        read = [by_pixels[np.ascontiguousarray(image[:, :, c]).tobytes()] for c in range(3)]
        assert int("".join(map(str, read))) == number


def test_the_shards_hold_the_stacked_images_with_each_channel_in_its_place(tmp_path: Path) -> None:
    write_stacked(tmp_path / "data", 50)
    manifest = Manifest.load(str(tmp_path / "data"))
    reader = ShardReader(manifest, DataConfig(path=str(tmp_path / "data"), resolution=32))
    read = [decode(reader.read(sample), 32, 3) for sample in range(50)]
    reader.close()
    assert {pixels.tobytes() for pixels in read} == {x.tobytes() for x in stacked(50)[0]}
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


def test_the_classifier_reads_digits_that_it_has_not_seen_and_all_three_channels(
    classifier: tuple[StackedDigits, float],
) -> None:
    network, accuracy = classifier
    assert accuracy > 0.96
    images, classes = stacked(1000, seed=2)
    found = probabilities(network, images).argmax(1)
    # Most of these digits it has seen, and three have to be right.
    assert (found.numpy() == classes).mean() > 0.96**3


def test_real_images_have_every_mode_and_the_divergence_of_counting_alone(
    classifier: tuple[StackedDigits, float],
) -> None:
    """Of n samples of K classes from m others, (K - 1) / 2 * (1 / n + 1 / m) to first order (of the
    likelihood ratio's chi-squared distribution)."""
    network, _ = classifier

    def scores(count: int, seed: int) -> ClassScores:
        images, _ = stacked(count, seed)
        return class_scores(
            torch.cat([probabilities(network, part) for part in np.split(images, 8)])
        )

    judged, reference = scores(16_000, seed=3), scores(16_000, seed=4)
    assert judged.modes_covered == CLASSES
    expected = (CLASSES - 1) / 2 * (1 / 16_000 + 1 / 16_000)
    divergence = class_divergence(judged.histogram, reference.histogram)
    assert divergence == pytest.approx(expected, rel=0.25)


def test_the_quick_benchmark_trains_judges_and_stands_beside_the_published_results(
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.stacked_mnist", "--quick", "--json", str(file)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row["ratio"] for row in json.loads(file.read_text())["rows"]}
    assert 0 < rows["relativistic+r1+r2/modes"] <= 100
    # One class, the worst, is log(1,000) = 6.9 away, and more where the reference has less of it.
    assert 0 < rows["relativistic+r1+r2/KL"] < 8
    assert rows["published: PacDCGAN2 (PacGAN paper)/KL"] == 0.06
    assert "published: DCGAN (VEEGAN paper)/modes" in done.stdout
