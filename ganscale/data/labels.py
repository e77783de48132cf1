"""Which members of a sample are its image and its class, and how a class is written."""

import json
import re
from typing import Any

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "npy")
CONVERTED_EXTENSIONS = (
    "jfif", "jpe", "avif", "bmp", "dib", "gif", "heic", "heif", "j2k", "jp2", "jxl", "pbm", "pgm",
    "pnm", "ppm", "tga", "tif", "tiff",
)  # fmt: skip
"""Of images that only `ganscale shards write` reads; some need a decoder that Pillow lacks, and
then count as bad images, not as other files."""

LABEL_EXTENSIONS = ("cls", "json", "txt")
JSON_KEYS = ("label", "class")
"""Where a JSON object has its class, unless another key is given."""


class NotJsonError(ValueError):
    """A .json does not hold JSON."""


_NUMBER = re.compile(r"([+-]?[0-9]+)(\.0*)?")


CLASS_LIMIT = 1 << 31
"""Class numbers are below."""


def parse_label(text: bytes | None, extension: str, json_key: str = "") -> int | str | None:
    """The class in the member `text` of a sample: a number, or else a name; None without one.

    json_key: where a JSON object has it, by default under one of JSON_KEYS

    Raises ValueError, with the end of a sentence about the member, for what is not one class.
    """
    if text is None:
        return None
    if extension != "json":
        try:
            return label_of(text.decode())
        except UnicodeDecodeError:
            raise ValueError(f"is not text: {text[:40]!r}") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # brackets in brackets, a thousand deep
        raise NotJsonError(f"is not JSON: {text[:40]!r}") from None
    if not isinstance(content, dict):
        return None
    keys = (json_key,) if json_key else JSON_KEYS
    return label_of(next((content[key] for key in keys if content.get(key) is not None), None))


def label_of(value: Any) -> int | str | None:
    """The class that a value from JSON means: 3, 3.0, "3" and [3] are the number 3, other text is
    a name, and null or empty text is no class. Raises ValueError as `parse_label` does."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        number = _NUMBER.fullmatch(value := value.strip())
        return int(number[1]) if number else value or None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, int):
        return None if value is None else int(value)
    text = json.dumps(value)
    raise ValueError(f"is {text if len(text) < 60 else f'{text[:50]} ...'}, not one class")
