import pytest
import torch
from torch import nn

from benchmarks.ranks import run_ranks
from ganscale.networks.normalization import (
    ConditionalBatchNorm2d,
    GlobalBatchNorm,
    concatenated_batches,
)
from ganscale.networks.resnet import ResNetGenerator
from tests.networks import normalization_ranks as ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The results of two real gloo processes, each on its half of the global batch."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.networks.normalization_ranks:run", folder, ranks.WORLD_SIZE, seconds=600)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks.WORLD_SIZE)]


@pytest.fixture(scope="module")
def one_rank():
    return ranks.use_twice(ranks.make_generator(), slice(None))


def assert_equal_in_float64(actual, expected, **message):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, **message)


def test_two_ranks_make_the_images_of_the_full_batch(two_ranks, one_rank):
    assert_equal_in_float64(torch.cat([rank["images"] for rank in two_ranks]), one_rank["images"])


def test_two_ranks_have_the_input_gradients_of_the_full_batch(two_ranks, one_rank):
    # Each rank differentiates the sum of all ranks' losses, the full batch their mean.
    gradients = torch.cat([rank["latent gradients"] for rank in two_ranks]) / ranks.WORLD_SIZE
    assert_equal_in_float64(gradients, one_rank["latent gradients"])


def test_two_ranks_have_the_parameter_gradients_and_buffers_of_the_full_batch(two_ranks, one_rank):
    shared = [name for name in one_rank if name.startswith(("gradient of", "buffer"))]
    assert len(shared) > 20
    for name in shared:
        assert_equal_in_float64(
            two_ranks[0][name], one_rank[name], msg=lambda m, n=name: f"{n} {m}"
        )
        assert torch.equal(two_ranks[0][name], two_ranks[1][name]), name


def test_float32_statistics_survive_a_mean_of_ten_thousand_deviations(two_ranks):
    images = ranks.large_mean_images().double()
    expected = nn.BatchNorm2d(3).double()
    expected(images)
    torch.testing.assert_close(
        two_ranks[0]["large mean, running variance"],
        expected.running_var.float(),  # type: ignore[union-attr]
        rtol=1e-6,
        atol=0,
    )
    normalized = torch.cat([rank["large mean"] for rank in two_ranks])
    assert normalized.std(correction=0).item() == pytest.approx(1.0, abs=2e-3)


def test_bfloat16_images_stay_bfloat16_and_are_normalized_in_float32(two_ranks):
    normalized = torch.cat([rank["bfloat16"] for rank in two_ranks])
    torch.manual_seed(3)
    images = torch.randn(ranks.GLOBAL_BATCH, 3, 16, 16).bfloat16()
    expected = nn.BatchNorm2d(3)(images.float()).bfloat16()
    assert normalized.dtype == torch.bfloat16
    torch.testing.assert_close(normalized, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", ["bfloat16 gradients", "channels last gradients"])
def test_gradients_of_bfloat16_images_are_rounded_once(two_ranks, name):
    """The gradients are mostly their channel's mean, which normalization removes."""
    actual = torch.cat([rank[name] for rank in two_ranks])
    images, gradients = ranks.bfloat16_images_and_gradients()
    images = images.double().requires_grad_()
    nn.BatchNorm2d(3).double()(images).backward(gradients.double())
    expected = images.grad
    assert actual.dtype == torch.bfloat16
    assert expected is not None
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=2e-5)


@pytest.mark.parametrize("affine", [True, False])
def test_one_rank_equals_torchs_batch_norm(affine):
    torch.manual_seed(0)
    ours = GlobalBatchNorm(3, affine=affine).double()
    torchs = nn.BatchNorm2d(3, affine=affine).double()
    outcomes = []
    batches = torch.randn(3, 4, 3, 5, 5, dtype=torch.float64) * 2 + 1
    for norm in (ours, torchs):
        images = batches.clone().requires_grad_()
        outputs = torch.stack([norm(images[0]), norm(images[1]), norm.eval()(images[2])])
        outputs.pow(3).sum().backward()
        gradients = [parameter.grad for parameter in norm.parameters()]
        outcomes.append([outputs, images.grad, norm.running_mean, norm.running_var, *gradients])
    for actual, expected in zip(*outcomes, strict=True):
        assert_equal_in_float64(actual, expected)


def test_each_class_has_a_gain_and_a_bias_which_start_neutral():
    torch.manual_seed(0)
    norm = ConditionalBatchNorm2d(3, num_classes=4).double()
    images, labels = torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 3, 3, 1, 2])
    normalized = nn.BatchNorm2d(3).double()(images)
    assert_equal_in_float64(norm(images, labels), normalized)
    nn.init.normal_(norm.gain.weight)
    nn.init.normal_(norm.bias.weight)
    for sample, label in enumerate(labels):
        gain, bias = norm.gain.weight[label], norm.bias.weight[label]
        expected = normalized[sample] * gain[:, None, None] + bias[:, None, None]
        assert_equal_in_float64(norm(images, labels)[sample], expected)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_concatenated_batches_are_normalized_as_if_one_came_after_another(num_classes):
    def generator():
        torch.manual_seed(0)
        network = ResNetGenerator(6, (3, 16, 16), num_classes, width=4).double()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.5)
        return network

    concatenated, sequential = generator(), generator()
    latents = torch.randn(3, 4, 6, dtype=torch.float64)
    labels = torch.randint(3, (3, 4)) if num_classes else None
    with torch.no_grad():
        batches = zip(latents, (None,) * 3 if labels is None else labels, strict=True)
        expected = torch.cat([sequential(*batch) for batch in batches])
    inputs = latents.flatten(0, 1), None if labels is None else labels.flatten()
    with concatenated_batches(3):
        assert_equal_in_float64(concatenated(*inputs), expected)
    for (name, actual), buffer in zip(
        concatenated.named_buffers(), sequential.buffers(), strict=True
    ):
        assert_equal_in_float64(actual, buffer, msg=lambda m, n=name: f"{n} {m}")
    # A single batch of all of them has other statistics.
    assert (generator()(*inputs) - expected).abs().max() > 0.01
