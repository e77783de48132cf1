"""Removes passwords and signatures from settings and messages before others can read them."""

import re
from typing import Any

_WEB_USER = re.compile(r"(?i)(https?://)[^/\s]*@")
_STORE_USER = re.compile(r"(?<=://)[^/\s:@]*:[^/\s]*@")  # without a colon it may be a container
_WEB_QUERY = re.compile(r"(?i)(https?://[^?\n]*)\?[^\n]*")
_COMMAND = re.compile(r"(?is)\b(pipe:(?:\s*[\w./~+-]+(?=\s|$))?).*")


def without_secrets(value: Any) -> Any:
    """`value` without possible secrets in any string within its dicts, lists and tuples.

    Removes the `user:password@` of URLs, the query of a web address with the rest of its line, and
    everything after the first word of a `pipe:` command.
    """
    if isinstance(value, dict):
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_secrets, value))
    if not isinstance(value, str):
        return value
    text = _COMMAND.sub(
        lambda match: match[1] if match[0] == match[1] else f"{match[1]} ...", value
    )
    if "://" in text:
        text = _STORE_USER.sub("", _WEB_USER.sub(r"\1", text))
        text = _WEB_QUERY.sub(r"\1", text)
    return text
