"""Turns an image file into the bytes that a shard stores."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ganscale.data.images.decoding import decode, image_extension
from ganscale.errors import UserError

IMAGE_FORMATS = ("png", "webp", "jpeg", "npy", "keep")


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    resolution: height and width in pixels, after a centre crop; None: as in the source
    channels: 1 or 3
    image_format: one of IMAGE_FORMATS; keep stores files as they are, with their own channels
    quality: 1 to 100 for jpeg and webp; None: 95 for jpeg, lossless for webp
    """

    resolution: int | None
    channels: int
    image_format: str
    quality: int | None

    def __post_init__(self) -> None:
        if self.image_format not in IMAGE_FORMATS:
            raise UserError(
                f"unknown format '{self.image_format}': choose from {', '.join(IMAGE_FORMATS)}"
            )
        if self.quality is not None and self.image_format not in ("jpeg", "webp"):
            raise UserError(f"only jpeg and webp have a quality, not {self.image_format}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"the quality must be from 1 to 100, not {self.quality}")

    def encode(self, data: bytes) -> tuple[str, bytes]:
        """(extension, bytes to store) of an image file. Raises DecodeError."""
        pixels = decode(data, self.resolution, self.channels)
        if self.image_format == "keep":
            return image_extension(data), data
        stream = io.BytesIO()
        if self.image_format == "npy":
            np.save(stream, pixels)
            return "npy", stream.getvalue()
        image = Image.fromarray(pixels.squeeze(2) if self.channels == 1 else pixels)
        if self.image_format == "jpeg":
            # Full-resolution colour: a generator would learn to imitate the blur of 4:2:0.
            image.save(stream, "JPEG", quality=self.quality or 95, subsampling=0)
            return "jpg", stream.getvalue()
        webp = {"lossless": self.quality is None, "quality": self.quality or 80}
        image.save(stream, self.image_format, **(webp if self.image_format == "webp" else {}))
        return self.image_format, stream.getvalue()
