import pytest
import torch
from torch import nn

from ganscale.errors import UserError
from ganscale.networks.build import parameter_count
from ganscale.networks.dcgan import DCGANCritic, DCGANGenerator
from ganscale.networks.normalization import GlobalBatchNorm


@pytest.mark.parametrize("resolution", [16, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_resolution_and_channel_count_has_its_pair(resolution, channels):
    shape = (channels, resolution, resolution)
    images = DCGANGenerator(5, shape, width=4, max_width=8)(torch.randn(2, 5))
    assert images.shape == (2, *shape)
    assert DCGANCritic(shape, width=4, max_width=8)(images).shape == (2,)


def test_the_papers_generator_has_its_maps():
    with torch.device("meta"):
        generator = DCGANGenerator(100, (3, 64, 64), width=128)
        maps = []
        for layer in generator.layers:
            if isinstance(layer, nn.ConvTranspose2d):
                layer.register_forward_hook(lambda *call: maps.append(tuple(call[-1].shape[1:])))
        generator(torch.empty(2, 100))
    assert maps == [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32), (3, 64, 64)]


def test_parameter_counts_are_those_of_the_usual_64_pixel_pair():
    # The widely used pair of width 64 has 3,576,704 and 2,765,568 parameters, with batch norm on
    # both sides (as many as our layer norm) and no bias in the convolutions next to the images.
    generator = DCGANGenerator(100, (3, 64, 64))
    critic = DCGANCritic((3, 64, 64), norm="layer")
    assert parameter_count(generator) == 3_576_704 + 3
    assert parameter_count(critic) == 2_765_568 + 64


def test_weights_start_as_in_the_paper():
    torch.manual_seed(0)
    for network in (DCGANGenerator(100, (3, 64, 64)), DCGANCritic((3, 64, 64), norm="none")):
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
                assert abs(module.weight.mean().item()) < 2e-3
                assert module.bias is None or not module.bias.any()
            elif isinstance(module, GlobalBatchNorm):
                assert module.weight is not None
                assert module.bias is not None
                assert module.weight.mean().item() == pytest.approx(1.0, abs=0.02)
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.4)
                assert not module.bias.any()


def test_convolutions_before_batch_norm_have_no_bias_and_others_have():
    def biases(norm):
        layers = DCGANGenerator(8, (3, 32, 32), width=4, norm=norm).layers
        return [layer.bias is not None for layer in layers if isinstance(layer, nn.ConvTranspose2d)]

    assert biases("batch") == [False, False, False, True]
    assert biases("none") == [True, True, True, True]


def test_batch_norm_in_the_critic_is_refused_with_what_to_use_instead():
    with pytest.raises(UserError, match='"layer", "instance" or "none"'):
        DCGANCritic((3, 32, 32), norm="batch")


@pytest.mark.parametrize(
    ("shape", "hint"),
    [((3, 52, 52), "48x48 or 56x56"), ((3, 8, 8), "16x16 or 32x32"), ((1, 64, 33), "64x32")],
)
def test_a_size_without_layers_is_refused_with_the_nearest_sizes(shape, hint):
    with pytest.raises(UserError, match=hint):
        DCGANCritic(shape)


def test_points_are_refused():
    with pytest.raises(UserError, match="use mlp"):
        DCGANGenerator(8, (2,))


def test_labels_are_refused():
    with pytest.raises(UserError, match="use resnet"):
        DCGANGenerator(8, (3, 32, 32), num_classes=10)
