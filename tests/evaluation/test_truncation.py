"""Truncation pulls styles towards their mean, in samples, exports and evaluations alike."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.tiny_networks import TinyGenerator, TinyStyleGenerator
from ganscale import load_generator
from ganscale.cli.main import main
from ganscale.data.images.preprocessing import to_bytes
from ganscale.errors import UserError
from ganscale.evaluation.figures import Identity
from ganscale.evaluation.truncation import truncated
from ganscale.randomness import normal
from tests.helpers.networks import draw
from tests.helpers.runs import Runs

SHAPE, LATENT_DIM, SEED = (3, 8, 8), 6, 5
EVALUATED = ("--network", "tests.helpers.feature_networks:Projection", "--metrics", "fd")


def generator_of(classes: int = 0) -> TinyStyleGenerator:
    torch.manual_seed(0)
    return TinyStyleGenerator(LATENT_DIM, SHAPE, classes).double()


@pytest.mark.parametrize("truncation", [0.5, 0.0, -0.7, 1.5])
@pytest.mark.parametrize("classes", [0, 3])
def test_styles_move_to_the_mean_of_their_class_by_the_equation(truncation, classes):
    generator, latents = generator_of(classes), draw(5, LATENT_DIM)
    labels = torch.tensor([2, 0, 2, 2, 0]) if classes else None
    found = truncated(generator, truncation, SEED, LATENT_DIM, labels)(latents, labels)
    many = normal(SEED, "truncation", torch.arange(10_000), LATENT_DIM).double()
    for index, latent in enumerate(latents):
        label = None if labels is None else labels[index]
        of_class = None if label is None else label.expand(len(many))
        mean = generator.styles(many, of_class).mean(0, keepdim=True)
        styles = generator.styles(latent[None], None if label is None else label[None])
        image = generator.synthesis(mean + truncation * (styles - mean))
        torch.testing.assert_close(found[index], image[0].detach(), rtol=1e-10, atol=1e-12)


def test_a_truncation_of_one_is_the_generator_itself_also_without_styles():
    for generator in (generator_of(), TinyGenerator(LATENT_DIM, SHAPE)):
        assert truncated(generator, 1, SEED, LATENT_DIM, None) is generator


class Flipped(TinyStyleGenerator):
    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(latents, labels).flip(-1)


@pytest.mark.parametrize(
    ("make", "truncation", "sentence"),
    [
        (TinyGenerator, 0.5, "truncation needs a generator that gives its styles: TinyGenerator"),
        (Flipped, 0.5, "Flipped makes other images in its forward than in synthesis"),
        (TinyStyleGenerator, float("nan"), "a truncation must be a finite number, not nan"),
        (TinyStyleGenerator, float("-inf"), "a truncation must be a finite number, not -inf"),
    ],
)
def test_what_cannot_be_truncated_is_refused(make, truncation, sentence):
    generator: nn.Module = make(LATENT_DIM, SHAPE)
    with pytest.raises(UserError, match=sentence):
        truncated(generator, truncation, SEED, LATENT_DIM, None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A short conditional run with a path length."""
    runs = Runs(tmp_path_factory.mktemp("runs"), digits)
    settings = [
        "training.total_images=128",
        "training.conditional=true",
        "critic.target=benchmarks.tiny_networks:TinyCritic",
        "generator.target=benchmarks.tiny_networks:TinyStyleGenerator",
        "objective.generator_penalties.path_length={weight: 2, interval: 2}",
    ]
    assert main(["train", *runs.settings("run", *settings)]) == 0
    rows = runs.rows("run")
    assert 0 < rows[0]["penalty/path_length_average"] == rows[1]["penalty/path_length_average"]
    return runs.folder / "run"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_a_conditional_export_has_the_classes_and_figures_of_its_run(
    trained: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = str(tmp_path / "exported")
    assert main(["checkpoint", "export", str(trained), exported]) == 0
    capsys.readouterr()
    asked = ["--reference", str(digits), "--samples", "48", "--json", "--metrics", "fd64"]
    asked += ["--network", "tests.helpers.feature_networks:Projection", "--seed", "3"]
    assert main(["evaluate", str(trained), exported, *asked]) == 0
    printed = capsys.readouterr().out  # after what is logged
    one, other = json.loads(printed[printed.index("[\n") :])
    assert one["eval/fd64_Projection"] == pytest.approx(other["eval/fd64_Projection"], rel=1e-9)
    assert one["eval/classes"] == other["eval/classes"]
    assert one["eval/classes"].startswith("as in data ")
    assert one["eval/identity"] == other["eval/identity"]


def test_samples_are_truncated_for_any_count_and_in_an_export_alike(
    trained: Path, tmp_path: Path
) -> None:
    def sampled(name: str, *asked: str) -> np.ndarray:
        folder = tmp_path / name
        assert main(["sample", str(trained), *asked, "--folder", str(folder)]) == 0
        return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])

    plain = sampled("plain", "--count", "12")
    assert np.array_equal(sampled("one", "--count", "12", "--truncation", "1"), plain)
    half = sampled("half", "--count", "12", "--truncation", "0.5")
    assert not np.array_equal(half, plain)
    assert np.array_equal(sampled("few", "--count", "3", "--truncation", ".5"), half[:3])
    mean = sampled("mean", "--count", "12", "--truncation", "0")
    assert np.array_equal(mean[:2], mean[10:])  # of classes 0 and 1
    assert not np.array_equal(mean[0], mean[1])
    only = sampled("only", "--count", "2", "--class", "1", "--truncation", "0")
    assert np.array_equal(only, mean[[1, 11]])
    sampled("beyond", "--count", "2", "--truncation", "-0.5")
    assert main(["checkpoint", "export", str(trained), str(tmp_path / "out")]) == 0
    images = load_generator(tmp_path / "out").sample(12, truncation=0.5)
    assert np.array_equal(to_bytes(images)[..., 0].numpy(), half)


def test_figures_with_a_truncation_are_other_figures(
    trained: Path, tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "export", str(trained), str(tmp_path / "out")]) == 0

    def evaluated(source: Path, *asked: str) -> dict:
        capsys.readouterr()
        options = ["--samples", "30", "--seed", "0", "--reference", str(digits), "--json"]
        assert main(["evaluate", str(source), *EVALUATED, *options, *asked]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed[printed.index("[\n") :])[0]  # after what is logged

    plain = evaluated(trained)
    assert "eval/truncation" not in plain
    assert evaluated(trained, "--truncation", "1")["eval/identity"] == plain["eval/identity"]
    half = evaluated(trained, "--truncation", "0.5")
    assert half["eval/truncation"] == 0.5
    assert half["eval/identity"] != plain["eval/identity"]
    assert half["eval/fd_Projection"] != plain["eval/fd_Projection"]
    exported = [evaluated(tmp_path / "out", "--truncation", each) for each in ("1", "0.5")]
    assert exported[0]["eval/fd_Projection"] != exported[1]["eval/fd_Projection"]
    assert main(["evaluate", str(digits), "--reference", str(digits), "--truncation", "2"]) == 2
    assert "--truncation is for generators" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "half"])
def test_a_truncation_that_is_not_a_finite_number_ends_with_a_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    command = ["sample", str(trained), "--grid", str(tmp_path / "x.png"), "--truncation", value]
    try:
        code = main(command)
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2
    assert "truncation" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "half"])
def test_such_a_truncation_is_refused_before_an_evaluation_reads_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(tmp_path / "nowhere"), "--truncation", value])
    assert ended.value.code == 2
    assert "argument --truncation: " in capsys.readouterr().err


def test_the_digits_of_figures_without_truncation_are_as_they_were():
    fields = "inception", "ab", "none", "data", 9, 50_000
    expected = hashlib.sha256(repr(fields).encode()).hexdigest()[:8]
    assert Identity(*fields).digest() == expected
    assert Identity(*fields, 0.7).digest() != expected
    assert Identity(*fields).differences(Identity(*fields, 0.7)) == ["truncation: 1.0, 0.7"]
