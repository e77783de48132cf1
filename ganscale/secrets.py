"""Removes passwords and signatures from settings and messages before others can read them."""

import json
import re
from typing import Any

import yaml

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


def yaml_without_secrets(text: str) -> str:
    """YAML as it was written, comments included, but without secrets in its values."""
    try:
        scalars = [token for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken)]
    except (yaml.YAMLError, ValueError, RecursionError):
        return without_secrets(text)
    for scalar in reversed(scalars):  # a long one is folded over lines
        if (shown := without_secrets(scalar.value)) != scalar.value:
            start, end = scalar.start_mark.index, scalar.end_mark.index
            line_end = "\n" if text[start:end].endswith("\n") else ""
            text = text[:start] + json.dumps(shown, ensure_ascii=False) + line_end + text[end:]
    return text
