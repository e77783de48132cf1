"""Which members of a sample are its image and its class, and how a class is written."""

import json

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "npy")
LABEL_EXTENSIONS = ("cls", "json", "txt")


def parse_label(text: bytes | None, extension: str) -> int | None:
    """The integer in `text`, or under "label" or "class" in a JSON object; None without one."""
    if text is None:
        return None
    try:
        if extension != "json":
            return int(text.decode("ascii"))
        value = json.loads(text)
    except (ValueError, RecursionError):  # brackets in brackets, a thousand deep
        return None
    label = value.get("label", value.get("class")) if isinstance(value, dict) else None
    return label if type(label) is int else None
