"""Dropout and noise follow from slots in training and from positions in samples, as written out."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.tiny_networks import TinyCritic, TinyGenerator
from ganscale.errors import UserError
from ganscale.evaluation.exported_generator import export_generator, load_generator
from ganscale.evaluation.images import GeneratedImages
from ganscale.evaluation.sampling import (
    CHUNK_SIZE,
    generate_images,
    interpolate_latents,
    interpolation_positions,
    sample_latents,
)
from ganscale.networks.build import build_network
from ganscale.networks.fingerprint import fingerprint
from ganscale.networks.random_layers import Dropout, NoiseInjection, name_random_layers
from ganscale.random import drawing, normal_like, uniform_like

SLOTS = torch.arange(6) + 20
SHAPE = (2, 8, 8)


def drawn(layer: nn.Module, x: Tensor, seed: int = 0) -> Tensor:
    with drawing(seed, ("test",), SLOTS):
        return layer(x)


def generator() -> nn.Module:
    facts = {"latent_dim": 6, "sample_shape": SHAPE}
    options = {"draws": True}
    torch.manual_seed(0)
    return build_network("generator", f"{TinyGenerator.__module__}:TinyGenerator", options, **facts)


def test_dropout_keeps_what_its_uniform_numbers_leave_and_makes_up_for_the_rest():
    x = torch.randn(6, 4, 5, 5)
    uniform = drawn(lambda x: uniform_like(x, "a"), x)  # type: ignore[arg-type]
    torch.testing.assert_close(drawn(Dropout(0.3, "a"), x), x * (uniform < 0.7) / 0.7)
    per_channel = drawn(lambda x: uniform_like(x[:, :, :1, :1], "a"), x)  # type: ignore[arg-type]
    whole = drawn(Dropout(0.3, "a", whole_channels=True), x)
    torch.testing.assert_close(whole, x * (per_channel < 0.7) / 0.7)


def test_noise_is_one_map_times_the_strength_of_each_channel():
    x, layer = torch.randn(6, 4, 5, 3), NoiseInjection(4, "a")
    assert torch.equal(drawn(layer, x), x)
    layer.strength.data.copy_(torch.tensor([0.0, 1.0, -2.0, 0.5]))
    noise = drawn(lambda x: normal_like(x[:, :1], "a"), x)  # type: ignore[arg-type]
    expected = x + layer.strength.view(1, 4, 1, 1) * noise
    torch.testing.assert_close(drawn(layer, x), expected)


def test_in_evaluation_noise_is_random_fixed_or_off():
    x = torch.zeros(6, 1, 4, 4)
    made: dict[str, Tensor] = {}
    for evaluation in ("random", "fixed", "off"):
        layer = NoiseInjection(1, "a", evaluation=evaluation).eval()
        layer.strength.data.fill_(1)
        made[evaluation] = drawn(layer, x)
        assert torch.equal(made[evaluation], drawn(layer, x, seed=1)) == (evaluation != "random")
        if evaluation != "random":
            assert torch.equal(layer(x), made[evaluation])  # also outside of a forward
    assert len(made["random"].unique(dim=0)) == 6
    assert len(made["fixed"].unique(dim=0)) == 1
    assert made["fixed"].std() > 0.5
    assert not made["off"].any()
    assert torch.equal(Dropout(0.5).eval()(x + 1), x + 1)


def test_layers_without_a_name_have_their_path_when_a_network_is_built():
    critic = build_network(
        "critic", f"{TinyCritic.__module__}:TinyCritic", {"draws": True}, sample_shape=SHAPE
    )
    dropouts = [module for module in critic.modules() if isinstance(module, Dropout)]
    assert [layer.draw_name for layer in dropouts] == ["dropout.0", "dropout.1"]
    layers = nn.Sequential(Dropout(0.5, "mine"), Dropout(0.5))
    with pytest.raises(UserError, match="a Dropout has no name to draw with"):
        drawn(layers, torch.ones(6, 3))
    name_random_layers(layers)
    assert [layer.draw_name for layer in layers] == ["mine", "1"]
    shared = nn.Sequential(layers[0], layers[0])
    with pytest.raises(UserError, match="draws 'mine' twice"):
        drawn(shared, torch.ones(6, 3))


def test_impossible_options_are_refused():
    for p in (-0.1, 1.0):
        with pytest.raises(UserError, match="must be at least 0 and below 1"):
            Dropout(p)
    with pytest.raises(UserError, match="random, fixed or off, not 'on'"):
        NoiseInjection(evaluation="on")


def test_samples_have_their_noise_by_seed_and_position():
    network, latents = generator(), sample_latents(3, 0, CHUNK_SIZE + 5, 6)
    whole = torch.cat([*generate_images(network, latents, seed=3)])
    later = torch.arange(7, len(latents))
    part = torch.cat([*generate_images(network, latents[7:], seed=3, positions=later)])
    assert torch.equal(part, whole[7:])
    other = torch.cat([*generate_images(network, latents, seed=4)])
    assert not torch.allclose(other, whole, atol=1e-3)
    same = torch.cat([*generate_images(network, latents[:1].expand(4, -1), seed=3)])
    assert len(same.unique(dim=0)) == 4
    judged = GeneratedImages(network, 3, len(latents), 6, None)
    chunks = [judged.chunk(range(0, 9)).images, judged.chunk(range(9, len(latents))).images]
    as_bytes = ((whole + 1) * 127.5).round()
    assert (torch.cat(chunks) - as_bytes).abs().max() <= 1


def test_a_row_of_an_interpolation_has_one_noise():
    network = generator()
    latents = interpolate_latents(0, 2, 4, 6)[:1].expand(8, -1)
    images = torch.cat(
        [*generate_images(network, latents, positions=interpolation_positions(2, 4))]
    )
    first, second = images.chunk(2)
    assert all(torch.equal(image, first[0]) for image in first)
    assert all(torch.equal(image, second[0]) for image in second)
    assert not torch.allclose(first[0], second[0], atol=1e-3)


def test_an_exported_generator_has_the_noise_of_its_seed(tmp_path):
    network = generator()
    target = f"{TinyGenerator.__module__}:TinyGenerator"
    facts = {"latent_dim": 6, "sample_shape": SHAPE, "num_classes": 0}
    export_generator(
        tmp_path / "out", network, target=target, options={"draws": True}, about={}, **facts
    )
    loaded = load_generator(tmp_path / "out")
    latents = sample_latents(5, 0, CHUNK_SIZE, 6)
    expected = torch.cat([*generate_images(network, latents, seed=5)])
    assert torch.equal(loaded.sample(CHUNK_SIZE, seed=5), expected)
    assert torch.equal(loaded(latents, seed=5), expected)
    assert torch.equal(loaded(latents), loaded(latents))
    assert not torch.allclose(loaded(latents), expected, atol=1e-3)


def test_a_fingerprint_is_of_fixed_numbers_in_float64():
    first, second = (fingerprint(generator(), (6,), 0) for _ in range(2))
    assert first == second
    assert first.dtype == "float64"
