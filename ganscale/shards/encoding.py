"""How images are stored in shards: as they are, or decoded and encoded again."""

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from ganscale.data.images.decoding import MAX_PIXELS, DecodeError, decode, image_extension
from ganscale.data.images.orientation import orientation, turned_upright
from ganscale.data.images.sixteen_bits import has_few_bits
from ganscale.errors import UserError
from ganscale.resolution import Resolution, as_resolution, height_and_width
from ganscale.shards.shard_index import is_image
from ganscale.shards.sources import Source

_FORMATS = ("png", "webp", "jpeg", "npy", "keep")
_CONVERTED = ("AVIF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "TGA", "TIFF")
"""Pillow's names of formats that training does not read."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


class Encoded(NamedTuple):
    """The extension and bytes to store; notes: what else happened to the image, to be counted."""

    extension: str
    data: bytes
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    resolution: that images are cropped and resized to; None: as in the source
    channels: 1 or 3
    image_format: one of _FORMATS; keep stores files as they are, with their own channels; those of
        other formats as PNG
    quality: 1 to 100 for jpeg and webp; None: 95 for jpeg, lossless for webp
    """

    resolution: Resolution | None
    channels: int
    image_format: str
    quality: int | None

    def __post_init__(self) -> None:
        if self.image_format not in _FORMATS:
            raise UserError(
                f"unknown format '{self.image_format}': choose from {', '.join(_FORMATS)}"
            )
        if self.quality is not None and self.image_format not in ("jpeg", "webp"):
            raise UserError(f"only jpeg and webp have a quality, not {self.image_format}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"the quality must be from 1 to 100, not {self.quality}")

    @classmethod
    def choose(
        cls,
        source: Source,
        resolution: Resolution | None,
        channels: int | None,
        image_format: str | None,
        quality: int | None,
    ) -> "Encoding":
        """The encoding of the images of `source`, where None is the default of `write_shards`."""
        is_unchanged = resolution is None and channels is None
        if image_format is None:
            image_format = "keep" if is_unchanged and source.kind != "bundled" else "png"
        if image_format == "keep" and not is_unchanged:
            raise UserError(
                "the format keep stores files as they are: drop resolution and channels"
            )
        if channels is None:
            channels = 1 if (source.kind, source.path) == ("bundled", "mnist") else 3
        if resolution is not None:  # as a journal has it, too
            resolution = as_resolution(*height_and_width(resolution))
        return cls(resolution, channels, image_format, quality)

    def encode(self, data: bytes) -> Encoded:
        """What to store of an image file. Raises DecodeError."""
        notes: list[str] = []
        if not is_image(data):
            kind, is_whole, data = _as_png(data)
            if self.image_format == "keep":
                notes.append(f"{kind} files are stored as PNG")
            if not is_whole:
                notes.append(f"{kind} files have several frames or pages; only the first is stored")
        pixels = decode(data, self.resolution, self.channels)
        if has_few_bits(data, pixels):
            notes.append("16-bit images with values below 4,096 are nearly black; scale them first")
        return Encoded(*self._encode(data, pixels), tuple(notes))

    def _encode(self, data: bytes, pixels: np.ndarray) -> tuple[str, bytes]:
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


def _as_png(data: bytes) -> tuple[str, bool, bytes]:
    """The format of another file, whether it is a single image, and its pixels without loss as a
    PNG. Raises DecodeError."""
    try:
        image = Image.open(io.BytesIO(data), formats=_CONVERTED)
    except Exception as error:
        raise DecodeError("cannot be decoded: unknown image format", "no image") from error
    if image.width * image.height > MAX_PIXELS:
        raise DecodeError(f"has {image.height}x{image.width} pixels, too many", "too large")
    kind = str(image.format)
    try:
        is_whole = getattr(image, "n_frames", 1) == 1
        image.load()
        image = turned_upright(image, orientation(image))
        if image.mode.startswith(("I", "F")):
            image = _sixteen_bits(image)
        elif image.mode not in _PNG_MODES:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        stream = io.BytesIO()
        image.save(stream, "PNG")
    except DecodeError:
        raise
    except Exception as error:  # as in decoding: of damaged files Pillow raises almost anything
        raise DecodeError(f"cannot be decoded: {error}") from error
    return kind, is_whole, stream.getvalue()


def _sixteen_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        kind = "floats" if values.dtype.kind == "f" else "32-bit integers"
        raise DecodeError(f"has {kind} as pixels, whose range is unknown; convert it to 8 bits")
    return Image.fromarray(values.astype(np.uint16))
