"""Bytes and the networks' range are the same numbers; a flip goes with its slot."""

import pytest
import torch

from ganscale.data.images.preprocessing import random_flip, to_bytes, to_network_range

ALL_BYTES = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)


def test_every_byte_comes_back_as_it_was():
    assert torch.equal(to_bytes(to_network_range(ALL_BYTES)), ALL_BYTES)
    for dtype in (torch.float64, torch.float16):
        assert torch.equal(to_bytes(to_network_range(ALL_BYTES).to(dtype)), ALL_BYTES)


def test_the_range_is_minus_one_to_one_in_equal_steps():
    values = to_network_range(ALL_BYTES).flatten()
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx([2 * byte / 255 - 1 for byte in range(256)], abs=2e-7)
    assert (values[0].item(), values[-1].item()) == (-1, 1)


def test_values_outside_the_range_saturate():
    images = torch.tensor([-1e6, -1.5, 1.5, 1e6]).view(1, 1, 2, 2)
    assert to_bytes(images).flatten().tolist() == [0, 0, 255, 255]


def test_channels_move_and_stay_last_in_memory():
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    moved = to_network_range(images)
    assert moved.shape == (2, 3, 4, 5)
    assert moved.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved[1, 2], to_network_range(images[..., 2:])[1, 0])
    assert torch.equal(to_bytes(moved), images)


def test_half_of_the_images_are_mirrored_exactly_left_to_right():
    images = torch.arange(24.0).view(1, 2, 3, 4).expand(2000, -1, -1, -1)
    flipped = random_flip(images, 0, torch.arange(2000))
    mirror = torch.tensor(
        [[[list(reversed(row)) for row in c] for c in i] for i in images[:1].tolist()]
    )
    is_mirrored = [torch.equal(image, mirror[0]) for image in flipped]
    is_kept = [torch.equal(image, images[0]) for image in flipped]
    assert all(mirrored != kept for mirrored, kept in zip(is_mirrored, is_kept, strict=True))
    assert abs(sum(is_mirrored) - 1000) < 4 * 500**0.5


def test_a_flip_is_decided_by_seed_and_slot_alone():
    images = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    slots = 10**10 + torch.arange(64)
    whole = random_flip(images, 5, slots)
    halves = [random_flip(images[part], 5, slots[part]) for part in (slice(40), slice(40, 64))]
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(random_flip(images, 6, slots), whole)
    assert not torch.equal(random_flip(images, 5, slots + 64), whole)
    order = torch.arange(64).flip(0)
    assert torch.equal(random_flip(images[order], 5, slots[order])[order], whole)
