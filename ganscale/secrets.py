"""Removes passwords and signatures from settings and messages before others can read them."""

import re
from typing import Any, TypeVar

T = TypeVar("T")

_WEB_USER = re.compile(r"(?i)(https?://)[^/\s]*@")
_STORE_USER = re.compile(r"(?<=://)[^/\s:@]*:[^/\s]*@")  # without a colon it may be a container
_WEB_QUERY = re.compile(r"(?i)(https?://[^?\n]*)\?[^\n]*")
_COMMAND = re.compile(r"(?is)\b(pipe:(?:\s*[\w./~+-]+(?=\s|$))?).*")


def without_secrets(value: T) -> T:
    """`value` without possible secrets in any string within its dicts, lists and tuples.

    Removes the `user:password@` of URLs, the query of a web address with the rest of its line, and
    everything after the first word of a `pipe:` command.
    """
    return _without(value)


def _without(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return {_without(key): _without(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_without, value))
    return value


def _text(text: str) -> str:
    text = _COMMAND.sub(lambda match: match[1] if match[0] == match[1] else f"{match[1]} ...", text)
    if "://" in text:
        text = _STORE_USER.sub("", _WEB_USER.sub(r"\1", text))
        text = _WEB_QUERY.sub(r"\1", text)
    return text
