"""Removes passwords and signatures from settings and messages before others can read them."""

import json
import re
from typing import Any

import yaml

_WEB_USER = re.compile(r"(?i)(https?://)[^/\s]*@")
_STORE_USER = re.compile(r"(?<=://)[^/\s:@]*:[^/\s]*@")  # without a colon it may be a container
_WEB_QUERY = re.compile(r"(?i)(https?://[^?\n]*)\?[^\n]*")
MASK = "***"
_MASKED = re.compile(r"(?is)://\*\*\*@|https?://.*\?\*\*\*|\bpipe:.*\s\*\*\*(?=\s|$)")
_COMMAND = re.compile(r"(?is)\b(pipe:(?:\s*[\w./~+-]+(?=\s|$))?).*")


def without_secrets(value: Any, mask: str = "") -> Any:
    """`value` without possible secrets in any string within its dicts, lists and tuples.

    Removes the `user:password@` of URLs, the query of a web address with the rest of its line, and
    everything after the first word of a `pipe:` command.

    mask: marks where something is missing; by default only commands end with "..."
    """
    if isinstance(value, dict):
        return {
            without_secrets(key, mask): without_secrets(item, mask) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(item, mask) for item in value)
    if not isinstance(value, str):
        return value
    text = _COMMAND.sub(
        lambda match: match[1] if match[0] == match[1] else f"{match[1]} {mask or '...'}", value
    )
    if "://" in text:
        user, query = (f"{mask}@", f"?{mask}") if mask else ("", "")
        text = _STORE_USER.sub(user, _WEB_USER.sub(rf"\1{user}", text))
        text = _WEB_QUERY.sub(rf"\1{query}", text)
    return text


def is_masked(text: str) -> bool:
    """Whether this is an address or command in which MASK stands for a secret."""
    return _MASKED.search(text) is not None


def yaml_without_secrets(text: str) -> str:
    """YAML as it was written, comments included, but with MASK for secrets in its values."""
    try:
        scalars = [token for token in yaml.scan(text) if isinstance(token, yaml.ScalarToken)]
    except (yaml.YAMLError, ValueError, RecursionError):
        return without_secrets(text, MASK)
    for scalar in reversed(scalars):  # a long one is folded over lines
        if (shown := without_secrets(scalar.value, MASK)) != scalar.value:
            start, end = scalar.start_mark.index, scalar.end_mark.index
            line_end = "\n" if text[start:end].endswith("\n") else ""
            text = text[:start] + json.dumps(shown, ensure_ascii=False) + line_end + text[end:]
    return text
