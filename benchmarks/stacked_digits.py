"""StackedMNIST: three digits in the color channels of an image, a classifier of its 1,000 classes,
and published results.

The data set is from "Unrolled GANs" (Metz et al. 2017, arXiv:1611.02163); the protocol, 26,000
samples that a classifier judges, from VEEGAN (Srivastava et al. 2017, arXiv:1705.07761).
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from PIL import Image
from torch import Tensor, nn

from ganscale.shards import bundled
from ganscale.shards.writing import write_shards
from ganscale.training.hidden_state import seeded

SAMPLES = 26_000
CHANNELS = 3
CLASSES = 10**CHANNELS
NETWORK = "benchmarks.stacked_digits:StackedDigits"

_HELD_OUT = 1_000  # of the 5,000 bundled digits
_EPOCHS, _BATCH, _LEARNING_RATE = 12, 64, 4e-3


def stacked(
    count: int, seed: int = 0
) -> tuple[UInt8[np.ndarray, "count 32 32 3"], Int64[np.ndarray, " count"]]:
    """Images of three digits, each drawn from all bundled ones, and their classes: the digits in
    red, green and blue, read as a number."""
    images, labels, _ = bundled.load("mnist")
    drawn = np.random.default_rng(seed).integers(len(images), size=(count, CHANNELS))
    digits = labels[drawn].astype(np.int64)
    stacks = images[drawn, :, :, 0].transpose(0, 2, 3, 1)
    return np.ascontiguousarray(stacks), digits @ (10 ** np.arange(CHANNELS)[::-1])


def write_stacked(folder: Path, count: int) -> None:
    """Shards of `count` stacked digits, through a zip of PNGs beside them."""
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as files:
        for number, pixels in enumerate(stacked(count)[0]):
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "png", compress_level=1)
            files.writestr(f"{number:06d}.png", stream.getvalue())
    write_shards(str(archive), folder)
    archive.unlink()


def digit_classifier() -> nn.Sequential:
    """(batch, 1, 32, 32) in [0, 1] to (batch, 10) logits."""
    layers = nn.Sequential()
    inputs = 1
    for outputs in (16, 32, 64):
        layers.extend([nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()])
        inputs = outputs
    return layers.extend([nn.Flatten(), nn.Linear(64 * 4 * 4, 10)])


def train_classifier(weights: Path) -> float:
    """Trains on 4,000 of the bundled digits, shifted by up to two pixels, and writes the weights;
    returns the accuracy on the other 1,000."""
    images, labels, _ = bundled.load("mnist")
    order = np.random.default_rng(0).permutation(len(images))
    pixels = torch.from_numpy(images[order]).permute(0, 3, 1, 2) / 255
    targets = torch.from_numpy(labels[order]).long()
    with seeded(0, "digit classifier"):
        classifier = digit_classifier()
        optimizer = torch.optim.Adam(classifier.parameters())
        batches = torch.cat([_HELD_OUT + torch.randperm(4_000) for _ in range(_EPOCHS)])
        chunks = batches.split(_BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, len(chunks))
        for rows in chunks:
            # Images have a black border of two pixels, so none leaves on one side to return on the
            # other.
            down, right = torch.randint(-2, 3, (2,)).tolist()
            logits = classifier(pixels[rows].roll((down, right), (2, 3)))
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, targets[rows]).backward()
            optimizer.step()
            schedule.step()
    torch.save(classifier.state_dict(), weights)
    with torch.no_grad():
        guesses = classifier(pixels[:_HELD_OUT]).argmax(1)
    return (guesses == targets[:_HELD_OUT]).double().mean().item()


class StackedDigits(nn.Module):
    """The feature network of the benchmark, for `evaluation.network`: the digits of each channel.

    weights: the file that `train_classifier` wrote
    """

    resize = "none"

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.classifier = digit_classifier()
        self.classifier.load_state_dict(torch.load(weights, weights_only=True))

    def features(
        self, images: UInt8[Tensor, "batch 3 32 32"]
    ) -> tuple[Float32[Tensor, "batch 30"], Float32[Tensor, "batch 1000"]]:
        """The logits of the three digits, and the probabilities of the 1,000 classes: the channels
        are classified each by itself."""
        logits = self.classifier(images.flatten(0, 1).unsqueeze(1) / 255).unflatten(0, (-1, 3))
        red, green, blue = logits.softmax(2).unbind(1)
        joint = torch.einsum("bi,bj,bk->bijk", red, green, blue)
        return logits.flatten(1), joint.flatten(1)


@dataclass(frozen=True)
class Published:
    """A published result. divergence: KL(generated || data), in nats"""

    method: str
    modes: float
    divergence: float


PUBLISHED = [
    Published("DCGAN (VEEGAN paper)", 99, 3.40),
    Published("ALI (VEEGAN paper)", 16, 5.40),
    Published("Unrolled GAN (VEEGAN paper)", 48.7, 4.32),
    Published("VEEGAN (VEEGAN paper)", 150, 2.95),
    Published("PacDCGAN2 (PacGAN paper)", 1000, 0.06),
]
