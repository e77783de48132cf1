"""A sample depends on its seed and position, not on the count or the first position."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from ganscale.evaluation.images import GeneratedImages
from ganscale.evaluation.sampling import (
    CHUNK_SIZE,
    generate_uint8,
    interpolate_latents,
    sample_labels,
    sample_latents,
)
from ganscale.networks.build import build_network
from ganscale.networks.forward import update_spectral_norms


def small_generator(target: str, num_classes: int = 0) -> nn.Module:
    torch.manual_seed(0)
    return build_network(
        "generator",
        target,
        {"r3gan": {"widths": 8, "group_width": 8}, "stylegan2": {"widths": 8}}.get(
            target, {"width": 8}
        ),
        latent_dim=8,
        sample_shape=(3, 16, 16),
        num_classes=num_classes,
    )


def generate_array(
    generator: nn.Module, latents: torch.Tensor, labels: torch.Tensor | None = None
) -> np.ndarray:
    """(count, height, width, channels) uint8"""
    return torch.cat(list(generate_uint8(generator, latents, labels))).numpy()


def images(generator: nn.Module, first: int, count: int, num_classes: int = 0) -> np.ndarray:
    latents = sample_latents(7, first, count, 8)
    return generate_array(generator, latents, sample_labels(first, count, num_classes))


@pytest.mark.parametrize(
    ("target", "num_classes"),
    [("mlp", 0), ("dcgan", 0), ("resnet", 0), ("resnet", 3), ("r3gan", 3), ("stylegan2", 3)],
)
def test_the_same_positions_give_the_same_bytes_in_any_request(target, num_classes):
    generator = small_generator(target, num_classes)
    whole = images(generator, 0, 3 * CHUNK_SIZE + 5, num_classes)
    assert whole.dtype == np.uint8
    assert whole.shape == (3 * CHUNK_SIZE + 5, 16, 16, 3)
    assert len(np.unique(whole.reshape(len(whole), -1), axis=0)) == len(whole)
    for first, count in (
        (0, 1),
        (0, CHUNK_SIZE),
        (0, CHUNK_SIZE + 1),
        (3, 7),
        (CHUNK_SIZE - 1, 2),
        (20, 33),
        (52, 1),
    ):
        part = images(generator, first, count, num_classes)
        assert np.array_equal(part, whole[first : first + count]), (first, count)


def test_chunks_come_one_at_a_time_and_the_last_is_shorter():
    chunks = generate_uint8(small_generator("mlp"), sample_latents(0, 0, 2 * CHUNK_SIZE + 3, 8))
    assert [len(chunk) for chunk in chunks] == [CHUNK_SIZE, CHUNK_SIZE, 3]


def test_the_network_always_gets_the_same_batch_size():
    """Kernels may round differently for another batch size."""
    generator, seen = small_generator("mlp"), []
    generator.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for count in (1, CHUNK_SIZE, CHUNK_SIZE + 1):
        list(generate_uint8(generator, sample_latents(0, 0, count, 8)))
    assert seen == [CHUNK_SIZE] * 4


def test_another_seed_gives_other_latents_and_a_later_start_the_later_ones():
    assert not torch.equal(sample_latents(0, 0, 4, 8), sample_latents(1, 0, 4, 8))
    assert torch.equal(sample_latents(0, 2, 2, 8), sample_latents(0, 0, 4, 8)[2:])


def test_labels_cycle_through_the_classes_from_any_start():
    labels = sample_labels(0, 7, 3)
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    later = sample_labels(4, 3, 3)
    assert later is not None
    assert later.tolist() == labels[4:].tolist()
    assert sample_labels(0, 7, 0) is None


def test_an_interpolation_begins_and_ends_at_the_latents_of_its_row():
    points = interpolate_latents(3, 4, 9, 64).view(4, 9, 64)
    ends = sample_latents(3, 0, 8, 64)
    assert torch.allclose(points[:, 0], ends[0::2], atol=1e-5)
    assert torch.allclose(points[:, -1], ends[1::2], atol=1e-5)


def test_an_interpolation_keeps_the_length_of_its_ends_and_turns_evenly():
    columns = 11
    points = interpolate_latents(3, 5, columns, 256).view(5, columns, 256).double()
    for row in points:
        lengths = row.norm(dim=1)
        # In 256 dimensions latents are 16 long, give or take 0.7, and nearly at right angles; the
        # middle of a straight line would be 11 long.
        assert lengths.min() > 0.97 * min(lengths[0], lengths[-1])
        assert lengths.max() < 1.03 * max(lengths[0], lengths[-1])
        # sin((1-t)a) start + sin(ta) stop: between unit ends, each step turns by the same angle.
        unit = [row[0] / lengths[0], row[-1] / lengths[-1]]
        angle = math.acos(float(unit[0] @ unit[1]))
        for column, point in enumerate(row):
            fraction = column / (columns - 1)
            start = math.sin((1 - fraction) * angle) * row[0]
            expected = (start + math.sin(fraction * angle) * row[-1]) / math.sin(angle)
            assert torch.allclose(point, expected, atol=1e-4)


def test_an_interpolation_of_one_column_is_its_first_latent():
    assert torch.allclose(interpolate_latents(3, 2, 1, 16), sample_latents(3, 0, 4, 16)[0::2])


@pytest.mark.parametrize("training", [True, False])
def test_the_generators_mode_is_restored_even_after_an_error(training):
    generator = small_generator("dcgan").train(training)
    state = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    list(generate_uint8(generator, sample_latents(0, 0, 3, 8)))
    assert generator.training is training
    # Evaluation mode inside: batch norm's running statistics are read and not written.
    assert all(torch.equal(state[name], tensor) for name, tensor in generator.state_dict().items())
    with pytest.raises(RuntimeError):
        list(generate_uint8(generator, torch.zeros(2, 5)))
    assert generator.training is training


@pytest.mark.parametrize("sample", [generate_uint8, "evaluation"])
def test_sampling_leaves_every_module_in_its_own_mode(sample):
    """`train()` would turn power iterations on again, which a run does once for all ranks, and
    norms that a user has frozen."""
    torch.manual_seed(0)
    linear = spectral_norm(nn.Linear(8, 3 * 16 * 16))
    frozen = nn.BatchNorm1d(3 * 16 * 16).eval()
    generator = nn.Sequential(linear, frozen, nn.Unflatten(1, (3, 16, 16)))
    update_spectral_norms(generator)
    modes = [module.training for module in generator.modules()]
    assert True in modes
    assert False in modes
    if sample == "evaluation":
        GeneratedImages(generator, 0, 4, 8, None).chunk(range(4))
    else:
        list(sample(generator, sample_latents(0, 0, 4, 8)))
    assert [module.training for module in generator.modules()] == modes


def test_images_have_no_graph_and_the_generators_precision():
    generator = small_generator("mlp").double()
    (chunk,) = generate_uint8(generator, sample_latents(0, 0, 2, 8))
    assert not chunk.requires_grad
    in_float32 = generate_array(generator.float(), sample_latents(0, 0, 2, 8))
    assert np.abs(chunk.numpy().astype(int) - in_float32.astype(int)).max() <= 1
