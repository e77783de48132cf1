"""Which members of a sample are its image and its class, and how a class is written."""

import json

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "npy")
LABEL_EXTENSIONS = ("cls", "json", "txt")


def parse_label(text: bytes | None, extension: str) -> int | None:
    """The integer in `text`; of a JSON object, that of its "label" or "class". None without one."""
    if text is None:
        return None
    try:
        if extension != "json":
            return int(text.decode("ascii"))
        value = json.loads(text)
    except (ValueError, RecursionError):  # brackets in brackets, a thousand deep
        return None
    if not isinstance(value, dict):
        return None
    label = value.get("label", value.get("class"))
    return label if type(label) is int else None
