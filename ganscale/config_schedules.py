"""What OmegaConf has no types for: from what files say to `Schedule` objects and resolutions,
checked, and back."""

from collections.abc import Generator, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin

from omegaconf import MISSING

from ganscale.resolution import Resolution, as_resolution
from ganscale.schedules import Schedule
from ganscale.schema import Config
from ganscale.secrets import without_secrets
from ganscale.setting import Setting, child_type, key_of, scheduled_type, settings_of, types_of

Mistake = tuple[str, str]
"""(key, what is wrong)"""


def plain(value: Any, *, as_text: bool = False) -> Any:
    """A config, or a part of it, as dictionaries, lists and scalars.

    as_text: makes a schedule one value, its text
    """
    if isinstance(value, Schedule) and as_text:
        return str(value)
    if is_dataclass(value):
        value = {key_of(field.name): getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {key: plain(child, as_text=as_text) for key, child in value.items()}
    if isinstance(value, list):
        return [plain(child, as_text=as_text) for child in value]
    return value


def keep_starts(
    layer: dict[str, Any], before: Any, section: Any = Config, prefix: str = ""
) -> list[str]:
    """Where a layer gives a number parts of a schedule only, such as its end, the plain number
    `before` becomes the start, in place; returns the keys of these numbers.

    before: what the layer overrides in this section
    """
    kept: list[str] = []
    for name, value in layer.items():
        key, expected = prefix + name, child_type(section, name)
        earlier = before.get(name) if isinstance(before, dict) else None
        if not isinstance(value, dict):
            continue
        if scheduled_type(expected) is None:
            kept += keep_starts(value, earlier, expected, key + ".")
        elif (
            "from" not in value and not isinstance(earlier, dict) and earlier not in (None, MISSING)
        ):
            value["from"] = earlier
            kept.append(key)
    return kept


def read_numbers(config: Config) -> Iterator[Mistake]:
    """Makes numbers, `Schedule` objects and resolutions of the values that OmegaConf left as they
    are, in place; yields what is not one."""
    yield from _read_section(config, "", config.training.total_images)


def _read_section(section: Any, prefix: str, total_images: int) -> Iterator[Mistake]:
    for name, expected in types_of(type(section)).items():
        key, value = prefix + name, getattr(section, name)
        if scheduled_type(expected) is not None:
            setattr(section, name, (yield from _number(value, expected, key, total_images)))
        elif get_origin(expected) is list and scheduled_type(item := get_args(expected)[0]):
            numbers = []
            for i, each in enumerate(value):
                numbers.append((yield from _number(each, item, f"{key}[{i}]", total_images)))
            setattr(section, name, numbers)
        elif expected == Resolution:
            setattr(section, name, (yield from _resolution(value, key)))
        elif is_dataclass(value):
            yield from _read_section(value, key + ".", total_images)
        elif isinstance(value, dict):
            for child_name, child in value.items():
                if is_dataclass(child):
                    yield from _read_section(child, f"{key}.{child_name}.", total_images)


def _number(
    value: Any, expected: Any, key: str, total_images: int
) -> Generator[Mistake, None, float | Schedule]:
    kind = scheduled_type(expected) or float
    if not isinstance(value, dict):
        return (yield from _converted(value, kind, key))
    for end in ("from", "to"):
        if value.get(end, MISSING) == MISSING:
            yield key, f"is a schedule without `{end}`"
    parts = {}
    for name, hint in types_of(expected).items():
        part = value.get(name)
        if part is not None or name in ("from", "to"):
            parts[name] = yield from _converted(part, hint, f"{key}.{name}")
    start, end = parts.pop("from"), parts.pop("to")
    if "over_images" not in parts:
        parts["over_images"] = max(1, total_images - parts.get("warmup_images", 0))
    return Schedule(start, end, **parts)


def _resolution(value: Any, key: str) -> Generator[Mistake, None, Resolution]:
    sides = value if isinstance(value, list) else [value, value]
    are_numbers = len(sides) == 2 and all(is_convertible(side, int) for side in sides)
    if not are_numbers or min(map(int, sides)) < 1:
        yield (
            key,
            "must be a whole number above 0, or two of them as [height, width], not "
            f"{without_secrets(value)!r}",
        )
    return as_resolution(*map(int, sides))


def _converted(value: Any, kind: type, key: str) -> Generator[Mistake, None, Any]:
    if not is_convertible(value, kind):
        yield key, f"must be {kind.__name__}, not {without_secrets(value)!r}"
    return kind(value)


def is_convertible(value: Any, kind: type) -> bool:
    """Whether OmegaConf would convert it; numbers may be text, of an environment variable, say."""
    try:
        kind(value)
    except (TypeError, ValueError, OverflowError):  # int("inf"), or a float of 400 digits
        return False
    return kind is str or type(value) in (kind, int, str)


def setting_mistakes(setting: Setting, value: Any, key: str) -> Iterator[Mistake]:
    """What is wrong with a setting's value. The ends of a schedule, also of one in a list, have to
    keep to the limits of the setting."""
    for i, each in enumerate(value if isinstance(value, list) else []):
        if isinstance(each, Schedule):
            yield from setting_mistakes(setting, each, f"{key}[{i}]")
    if not isinstance(value, Schedule):
        if mistake := setting.mistake(value):
            yield key, mistake
        return
    for name, part in plain(value).items():
        limits = setting if name in ("from", "to") else settings_of(Schedule)[name]
        if limits and (mistake := limits.mistake(part)):
            yield f"{key}.{name}", mistake
