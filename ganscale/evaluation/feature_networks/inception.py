"""The Inception network of the FID paper (Heusel et al., "GANs Trained by a Two Time-Scale Update
Rule Converge to a Local Nash Equilibrium", arXiv:1706.08500), as the TorchScript file that
StyleGAN2-ADA, StyleGAN3 and EDM use."""

import io
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ganscale.errors import UnavailableError, UserError
from ganscale.evaluation.feature_networks.checked import CheckedNetwork, checked
from ganscale.evaluation.feature_networks.feature_network import Features
from ganscale.evaluation.feature_networks.preprocessing import check_channels, squeezed, to_rgb
from ganscale.evaluation.feature_networks.recipe import Place
from ganscale.evaluation.feature_networks.weights_file import read_weights

NAME = "inception"
_SIZE = 299
ADDRESS = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


@dataclass(frozen=True)
class Inception:
    """2,048 features, and the 1,008 outputs of its classifier, without bias as in the Inception
    Score of StyleGAN's code.

    path: a file or address of a module `(images, return_features: bool)` that takes (batch, 3,
        height, width) uint8 images of any size and has a linear layer `output`
    sha256: of this file, whose code is executed: nothing else is loaded
    """

    path: Any = ADDRESS
    sha256: Any = SHA256

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise UserError(f"path={self.path} of feature network {NAME} must be a file or address")
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise UserError(
                f"sha256={self.sha256} of feature network {NAME} must be 64 hexadecimal digits in "
                "lower case"
            )

    @property
    def name(self) -> str:
        """Of another file: another network, whose Frechet distance is not FID."""
        return NAME if self.sha256 == SHA256 else f"{NAME}-{self.sha256[:8]}"

    def check(self, place: Place) -> None:
        self._read(place)

    def build(self, place: Place, device: torch.device) -> CheckedNetwork:
        module = _load(self._read(place), device)

        def extract(images: Tensor) -> Features:
            # Else TorchScript measures the first calls and compiles others, with other roundings.
            with torch.jit.optimized_execution(False):
                features = module(to_rgb(images), return_features=True)
            logits = F.linear(features, module.output.weight)
            return Features(features, logits.softmax(1))

        return checked(
            self.name,
            self.sha256,
            f"bilinear to {squeezed(_SIZE, place.sample_shape)} within the network's file",
            extract,
            device=device,
            sample_shape=place.sample_shape,
        )

    def _read(self, place: Place) -> bytes:
        check_channels(NAME, place.sample_shape)
        try:
            return read_weights(self.path, self.sha256, place.cache, place.retry_seconds)
        except UserError as error:
            raise UserError(f"feature network {NAME}: {error}") from error
        except UnavailableError as error:
            raise UnavailableError(
                f"feature network {NAME}: {error}; where there is no network, copy the file to "
                "this machine and set the option path"
            ) from error


def _load(content: bytes, device: torch.device) -> Any:
    problem = f"the file of feature network {NAME}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit as a whole
        try:
            module: Any = torch.jit.load(io.BytesIO(content), map_location=device)
        except RuntimeError as error:
            raise UserError(f"{problem} is not in the TorchScript format") from error
    try:
        arguments = [argument.name for argument in module.forward.schema.arguments]
        is_inception = "return_features" in arguments and module.output.weight.ndim == 2
    except AttributeError:
        is_inception = False
    if not is_inception:
        raise UserError(
            f"{problem} is not a network like StyleGAN's Inception: it lacks the argument "
            "`return_features` or the linear layer `output`"
        )
    return module.eval()
