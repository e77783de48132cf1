"""A setting's sentence, unit and limits, kept in the metadata of its dataclass field."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from operator import ge, gt, le, lt
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING


@dataclass(frozen=True)
class Setting:
    """choices: each valid value with its meaning, which is empty where the value is obvious
    is_main: whether a plain value in place of the section means this setting"""

    sentence: str
    unit: str = ""
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: Mapping[Any, str] = field(default_factory=dict)
    is_main: bool = False

    def mistake(self, value: Any) -> str | None:
        """What is wrong with `value` (`must be at least 1, not 0`); None for a valid one."""
        if self.choices and value not in self.choices:
            close = difflib.get_close_matches(str(value), map(str, self.choices), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            return f"must be one of {', '.join(map(str, self.choices))}, not {value}{hint}"
        for limit, bound, holds in self.limits():
            if not holds(value, bound):
                return f"must be {limit}, not {value}"
        return None

    def limits(self) -> Iterator[tuple[str, float, Callable[[Any, Any], bool]]]:
        """(text such as `at least 1`, bound, comparison of a valid value with the bound)."""
        for name, holds in (("at_least", ge), ("above", gt), ("below", lt), ("at_most", le)):
            if (bound := getattr(self, name)) is not None:
                yield f"{name.replace('_', ' ')} {bound}", bound, holds


def setting(
    sentence: str,
    default: Any = MISSING,
    *,
    choices: Mapping[Any, str] | Sequence[str] = (),
    **details: Any,
) -> Any:
    """A field of a config dataclass, with `details` as in `Setting`. Without a default, the user
    has to give it; `default` may be a function that makes a list or dictionary."""
    if not isinstance(choices, Mapping):
        choices = dict.fromkeys(choices, "")
    metadata = {"setting": Setting(sentence, choices=choices, **details)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(sentence: str, **meanings: str) -> Any:
    """A setting with a few valid values and their meanings; the first is the default."""
    return setting(sentence, next(iter(meanings)), choices=meanings)


@cache
def settings_of(schema: type) -> dict[str, Setting | None]:
    """The fields of a config dataclass by key; None for a section."""
    return {key_of(each.name): each.metadata.get("setting") for each in fields(schema)}


@cache
def main_setting(schema: type) -> str | None:
    """The name of the setting that a plain value in place of the section means, if there is one."""
    return next((name for name, each in settings_of(schema).items() if each and each.is_main), None)


@cache
def types_of(schema: Any) -> dict[str, Any]:
    """The types of the keys of a config dataclass or of a number's schedule, without `| None`."""
    number = scheduled_type(schema)
    if number is not None:
        parts = types_of(get_args(schema)[2])
        return {key: number if part is float else part for key, part in parts.items()}
    hints = get_type_hints(schema, include_extras=True)
    return {key_of(name): _without_none(hint) for name, hint in hints.items()}


def key_of(name: str) -> str:
    """The key of a field in files: `from` cannot be a name in Python, so the field is `from_`."""
    return name.removesuffix("_")


def child_type(parent: Any, key: str) -> Any:
    """The type of `key` in a section or `dict[str, ...]`; None if unknown."""
    if get_origin(parent) is dict:
        return _without_none(get_args(parent)[1])
    return types_of(parent).get(key) if has_keys(parent) else None


def has_keys(hint: Any) -> bool:
    """Whether the type is one of a section whose keys are known, or has a schedule's keys."""
    return is_dataclass(hint) or scheduled_type(hint) is not None


def scheduled_type(hint: Any) -> type | None:
    """The type of a number that may be a schedule (see ganscale.schedules); None for others."""
    is_scheduled = get_origin(hint) is Annotated and is_dataclass(get_args(hint)[-1])
    return get_args(hint)[1] if is_scheduled else None


def _without_none(hint: Any) -> Any:
    if isinstance(hint, UnionType):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint
