"""What settings and messages may hold that nobody else should read: passwords and signatures."""

import re
from typing import Any, TypeVar

T = TypeVar("T")

_WEB_USER = re.compile(r"(?i)(https?://)[^/\s]*@")
_STORE_USER = re.compile(r"(?<=://)[^/\s:@]*:[^/\s]*@")  # one without a colon may be a container
_WEB_QUERY = re.compile(r"(?i)(https?://[^?\n]*)\?[^\n]*")
_COMMAND = re.compile(r"(?is)\b(pipe:(?:\s*[\w./~+-]+(?=\s|$))?).*")


def without_secrets(value: T) -> T:
    """`value` without what may be secret in any text within its dicts, lists and tuples.

    Taken out are the `user:password@` of URLs, the query of a web address with the rest of its
    line, and all of a `pipe:` command but its first word.
    """
    return _without(value)


def _without(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return {_without(name): _without(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_without, value))
    return value


def _text(text: str) -> str:
    text = _COMMAND.sub(lambda match: match[1] if match[0] == match[1] else f"{match[1]} ...", text)
    if "://" in text:
        text = _STORE_USER.sub("", _WEB_USER.sub(r"\1", text))
        text = _WEB_QUERY.sub(r"\1", text)
    return text
