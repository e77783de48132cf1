"""DINOv2 (Oquab et al., arXiv:2304.07193), whose features follow people's judgement more closely
than Inception's (Stein et al., "Exposing flaws of generative model evaluation metrics and their
unfair treatment of diffusion models", arXiv:2306.04675)."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ganscale.data.backoff import Backoff
from ganscale.data.remote.connections import permanent_reason
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
from ganscale.evaluation.feature_networks.weights_file import FULL_DISK
from ganscale.files import sha256, with_home

NAME = "dinov2"
_CONFIG, _WEIGHTS = "config.json", "model*.safetensors"
_SIZE = 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@dataclass(frozen=True)
class DINOv2:
    """The class token after the last layer norm: 1,024 features of the ViT-L/14.

    path: a folder with config.json and safetensors, or a name on the Hugging Face hub, whose files
        are kept in that library's own cache
    """

    path: Any = "facebook/dinov2-large"

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise UserError(
                f"path={self.path} of feature network {NAME} must be a folder or a name on the hub"
            )

    @property
    def name(self) -> str:
        return NAME

    def check(self, place: Place) -> None:
        check_channels(NAME, place.sample_shape)
        if find_spec("transformers") is None:
            raise UserError(
                f"feature network {NAME} needs transformers: pip install 'ganscale[dinov2]' "
                "installs it"
            )
        _weights(self._folder(place.retry_seconds))

    def build(self, place: Place, device: torch.device) -> CheckedNetwork:
        self.check(place)
        folder = self._folder(place.retry_seconds)
        model = _load(folder).to(device)
        mean, deviation = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (_MEAN, _DEVIATION)
        )

        def extract(images: Tensor) -> Features:
            x = resize(to_rgb(images).float().div(255), _SIZE, "bicubic")
            return Features(model((x - mean) / deviation).last_hidden_state[:, 0])

        return checked(
            NAME,
            _checksum(folder),
            f"bicubic, antialiased, to {squeezed(_SIZE, place.sample_shape)}",
            extract,
            device=device,
            sample_shape=place.sample_shape,
        )

    def _folder(self, retry_seconds: float) -> Path:
        folder = with_home(self.path)
        return folder if folder.is_dir() else _fetch(self.path, retry_seconds)


def _weights(folder: Path) -> list[Path]:
    """The files of weights. Raises UserError unless it is the folder of a DINOv2."""
    try:
        kind = json.loads((folder / _CONFIG).read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"feature network {NAME}: {folder} has no {_CONFIG} that can be read"
        ) from error
    if kind != "dinov2":
        raise UserError(
            f"feature network {NAME}: {folder} holds a model of type {kind}, not dinov2"
        )
    weights = sorted(folder.glob(_WEIGHTS))
    if not weights:
        raise UserError(f"feature network {NAME}: {folder} has no {_WEIGHTS}")
    return weights


def _checksum(folder: Path) -> str:
    """Of the only file of weights, or of the checksums of all."""
    checksums = [sha256(path) for path in _weights(folder)]
    if len(checksums) == 1:
        return checksums[0]
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def _fetch(name: str, retry_seconds: float) -> Path:
    """The folder in the hub's cache on this machine, fetched if it is not there yet."""
    with suppress(Exception):
        folder = _snapshot(name, local_files_only=True)
        if any(folder.glob(_WEIGHTS)):
            return folder
    from huggingface_hub import constants

    problem = (
        f"feature network {NAME}: {name} is neither a folder nor can it be fetched from the hub"
    )
    backoff = Backoff(retry_seconds)
    while True:
        try:
            return _snapshot(name)
        except Exception as error:
            cause = error.__cause__ or error
            reason = permanent_reason(cause)
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                reason = "the disk is full"
            if constants.HF_HUB_OFFLINE:
                reason = "HF_HUB_OFFLINE is set"
            if reason:
                raise UserError(f"{problem}: {reason}") from error
            backoff.wait(cause, problem)


def _snapshot(name: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    with _without_hub_bars():
        return Path(snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS], **options))


def _load(folder: Path) -> Any:
    try:
        from transformers import Dinov2Model
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"feature network {NAME}: transformers fails on import: {reason}"
        ) from error
    try:
        with _quiet():
            loaded: Any = Dinov2Model.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"feature network {NAME} cannot be read from {folder}: {reason}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # they are random numbers now
        raise UserError(
            f"feature network {NAME}: the weights in {folder} lack {missing[0]} and "
            f"{len(missing) - 1} more"
        )
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with _without_hub_bars():
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if has_bars:
                logging.enable_progress_bar()


@contextmanager
def _without_hub_bars() -> Iterator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    restore = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
        try:
            yield
        finally:
            restore()
