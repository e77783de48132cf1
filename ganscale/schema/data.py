"""What a run trains on, and what it trains."""

from dataclasses import dataclass
from typing import Any

from ganscale.resolution import Resolution, height_and_width
from ganscale.setting import setting


@dataclass
class RunConfig:
    """Name and folder of the run."""

    name: str = setting("Name of the run; by default the name of the first config file.", "")
    folder: str = setting("Folder of all runs; this one is kept in FOLDER/NAME.", "runs")


@dataclass
class DataConfig:
    """The training images and how they are read."""

    path: str = setting(
        "The folder or URL of a data set with a manifest, or shards (*.tar, with braces or "
        "wildcards) to stream without one, in an order that is not reproducible."
    )
    shards: str = setting(
        "Where the shards are if not where the manifest says: folder, URL or pipe:COMMAND.", ""
    )
    cache: str = setting(
        "Folder for copies of remote shards, shared by all runs of a machine.", "~/.cache/ganscale"
    )
    cache_gib: float = setting(
        "Size of this folder. If full, the least recently used shards are deleted.",
        100.0,
        unit="GiB",
        above=0,
    )
    retry_seconds: float = setting(
        "How long to retry failing I/O, then exit with code 75.", 300.0, unit="seconds", at_least=0
    )
    resolution: Resolution = setting(
        "Height and width: one number for square images, or [height, width]. Of each image, the "
        "largest centred part with this ratio of its sides is resized to it.",
        unit="pixels",
    )
    channels: int = setting("Color channels.", 3, choices={1: "gray", 3: "RGB"})
    flip: bool = setting("Mirror half of the images left to right.", False)
    workers: int = setting(
        "Decoding threads per rank, in a separate process. With 0, in the rank.", 2, at_least=0
    )
    lanes: int = setting(
        "Interleaved sequences of the data; ideally a multiple of the rank count.", 64, at_least=1
    )
    block_samples: int = setting("Consecutive samples of a shard read together.", 256, at_least=1)
    window_blocks: int = setting("Blocks of a lane in which samples are shuffled.", 8, at_least=1)
    max_bad_fraction: float = setting(
        "The run stops when a larger share of its samples (of at least 1,000) is bad.",
        0.01,
        at_least=0,
        below=1,
    )
    class_count: int = setting("Number of classes; only needed for streamed shards.", 0, at_least=0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return height_and_width(self.resolution)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image in front of a network."""
        return (self.channels, *self.size)


@dataclass
class GeneratorConfig:
    """The generator network."""

    target: str = setting(
        "Network: mlp, dcgan, resnet, r3gan, stylegan2, or your own as package.module:Class.",
        is_main=True,
    )
    latent_dim: int = setting("Dimensions of a latent vector.", 128, at_least=1)
    options: dict[str, Any] = setting("Keyword arguments of the network, such as width.", dict)


@dataclass
class CriticConfig:
    """The critic network."""

    target: str = setting(
        "Network: mlp, dcgan, resnet, r3gan, stylegan2, or your own as package.module:Class.",
        is_main=True,
    )
    options: dict[str, Any] = setting("Keyword arguments of the network, such as width.", dict)
