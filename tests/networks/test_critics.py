"""What a gradient penalty needs from every critic: independent samples and second derivatives."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from ganscale.networks.build import build_network
from tests.helpers.networks import without_zeros

CRITICS = {
    "mlp": ("mlp", {"width": 8}),
    "dcgan": ("dcgan", {"width": 2}),
    "dcgan with layer norm": ("dcgan", {"width": 2, "norm": "layer"}),
    "dcgan with instance norm": ("dcgan", {"width": 2, "norm": "instance"}),
    "resnet": ("resnet", {"width": 4}),
    "r3gan": ("r3gan", {"widths": [8, 4, 4], "group_width": 4}),
    "stylegan2": ("stylegan2", {"widths": [8, 4, 4], "group_size": 1}),
    "resnet with spectral norm": ("resnet", {"width": 4, "spectral_norm": True}),
}


@pytest.fixture(params=CRITICS)
def critic(request):
    torch.manual_seed(0)
    target, options = CRITICS[request.param]
    critic = build_network(
        "critic", target, options, sample_shape=(1, 16, 16), num_classes=0
    ).double()
    if options.get("spectral_norm"):
        critic.eval()  # in training, every forward refines the estimate
    return without_zeros(critic)


def test_a_logit_does_not_depend_on_the_other_samples(critic):
    images, others = torch.randn(2, 5, 1, 16, 16, dtype=torch.float64)
    others[2] = images[2]
    assert (critic(images) - critic(others)).abs().min(dim=0).indices == 2
    torch.testing.assert_close(critic(images)[2], critic(others)[2], rtol=0, atol=1e-14)
    torch.testing.assert_close(critic(images)[2:3], critic(images[2:3]), rtol=0, atol=1e-14)


def test_first_and_second_derivatives_match_finite_differences(critic):
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    weight = next(critic.parameters())

    def squared_norm(images, _):  # of the gradient, as a penalty takes it
        (gradient,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
        return gradient.square().sum() + critic(images).tanh().sum()

    assert gradcheck(lambda images, _: critic(images), (images, weight), fast_mode=True)
    assert gradcheck(squared_norm, (images, weight), fast_mode=True)
    assert gradgradcheck(lambda images, _: critic(images).tanh(), (images, weight), fast_mode=True)
