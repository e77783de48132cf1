"""Explains settings: a run as YAML with comments, and the reference page of the whole schema.

`python -m ganscale.settings_reference > docs/settings.md` updates the page.
"""

import json
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from inspect import getdoc
from typing import Any, get_args, get_origin

import yaml
from omegaconf import MISSING

from ganscale.config import DEFAULT, FREE_TO_CHANGE, Resolved, is_within
from ganscale.resolution import Resolution
from ganscale.schedules import Schedule
from ganscale.schema import Config
from ganscale.setting import Setting, child_type, key_of, scheduled_type, settings_of, types_of

_INTRODUCTION = """\
# Settings

Every setting as `key = default`, with its type, unit and limits. *Required* settings have no
default. *Free* settings may change when a run continues. Changing another one would break the
run's curve, so it is refused unless `resume.allow` names it. A *float or schedule* is a number that
may change over the run: see [schedules](#schedules). A plain value in place of a section means its
*main* setting: `critic=resnet` is `critic.target=resnet`. Whole numbers may be written as `50k`,
`2M` or `1e6`.

`ganscale config CONFIG --explain` prints the values of a run with these explanations.
`ganscale config --explain` prints this page.
"""


def annotated_yaml(resolved: Resolved, *, explain: bool = False) -> str:
    """The run as YAML that loads again, with the origin of each value as a comment after it, and
    some values of each schedule.

    explain: also put the sentence, unit and limits of each setting in front of it
    """
    text = resolved.to_yaml()
    lines = text.split("\n")
    comments: defaultdict[int, list[str]] = defaultdict(list)  # by the line that they precede

    def annotate(node: yaml.MappingNode, section: Any, prefix: str, values: Any) -> None:
        for key, value in node.value:
            dotted, start = prefix + key.value, key.start_mark
            part = values[key.value] if isinstance(values, dict) else vars(values).get(key.value)
            if explain:
                comments[start.line] = _comment(section, key.value, start.column)
            if isinstance(part, Schedule):
                lines[start.line] += f"  # {_course(part)}"
            if isinstance(value, yaml.MappingNode) and value.value:
                annotate(value, child_type(section, key.value), dotted + ".", part)
                continue
            is_block = isinstance(value, yaml.SequenceNode) and not value.flow_style
            end = start.line if is_block else value.end_mark.line
            lines[end] += f"  # {resolved.origin.get(dotted, DEFAULT)}"
            for i, item in enumerate(part if isinstance(part, list) else []):
                if isinstance(item, Schedule):
                    lines[value.value[i].start_mark.line] += f"  # {_course(item)}"

    annotate(yaml.compose(text, yaml.SafeLoader), Config, "", resolved.config)
    return "\n".join(line for i, code in enumerate(lines) for line in (*comments[i], code))


def _course(schedule: Schedule) -> str:
    """`0.0002 at 0 images, 0.0001 at 5,000,000, 0 from 10,000,000 on`"""
    *before, end = schedule.milestones()
    at = [f"{schedule.at(images):.6g} at {images:,}" for images in before]
    return f"{', '.join(at)}, {schedule.at(end):.6g} from {end:,} images on"


def _comment(section: Any, key: str, column: int) -> list[str]:
    """Lines that explain a key of a run; none for a key that the user named."""
    if not is_dataclass(section):
        return []
    setting, indent = settings_of(section)[key], " " * column + "# "  # type: ignore[arg-type]
    if setting is None:
        return [*[""] * (column == 0), *_wrap(_doc(child_type(section, key)), indent)]
    details = f" ({', '.join(_details(setting))})" if _details(setting) else ""
    return [*_wrap(setting.sentence + details, indent), *_meanings(setting, indent + "  ")]


def reference() -> str:
    """Every setting of the schema, as Markdown."""
    schedules = ["## Schedules\n", *_wrap(_doc(Schedule)), "", *_section_reference(Schedule, "")]
    return "\n".join([_INTRODUCTION, *_section_reference(Config, ""), *schedules])


def _section_reference(section: type, prefix: str) -> Iterator[str]:
    """Lines about a section's settings, then about the sections in it."""
    keys_by_type: defaultdict[Any, list[str]] = defaultdict(list)
    for field in fields(section):
        name = key_of(field.name)
        setting, expected = settings_of(section)[name], types_of(section)[name]
        if setting is None:
            keys_by_type[expected].append(prefix + name)
            continue
        default = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
        is_required = default == MISSING
        value = default if isinstance(default, str) and default else json.dumps(default)
        title = name if is_required else f"{name} = {value}"
        details = [_type_name(expected), *["required"] * is_required, *_details(setting)]
        details += ["main"] * setting.is_main
        details += ["free"] * is_within(prefix + name, FREE_TO_CHANGE)
        yield from _wrap(f"`{title}` ({', '.join(details)}): {setting.sentence}", "- ")
        yield from _meanings(setting, "  - ", quote="`")
    if any(settings_of(section).values()):
        yield ""
    for expected, keys in keys_by_type.items():
        if get_origin(expected) is dict:
            keys = [f"{key}.NAME" for key in keys]
        yield f"## {' and '.join(keys)}\n"
        yield from (*_wrap(_doc(expected)), "")
        yield from _section_reference(_section_type(expected), keys[0] + ".")


def _type_name(expected: Any) -> str:
    if number := scheduled_type(expected):
        return f"{number.__name__} or schedule"
    if get_origin(expected) is list and scheduled_type(get_args(expected)[0]):
        return f"list of {_type_name(get_args(expected)[0])}"
    if expected == Resolution:
        return "int or [int, int]"
    return expected.__name__


def _details(setting: Setting) -> list[str]:
    """Unit, limits and choices; choices with meanings have lines of their own (`_meanings`)."""
    details = [setting.unit] if setting.unit else []
    details += [limit for limit, _, _ in setting.limits()]
    if setting.choices and not any(setting.choices.values()):
        details.append(f"one of {', '.join(setting.choices)}")
    return details


def _meanings(setting: Setting, indent: str, quote: str = "") -> Iterator[str]:
    for choice, meaning in setting.choices.items():
        if meaning:
            yield from _wrap(f"{quote}{choice}{quote}: {meaning}", indent)


def _section_type(section: Any) -> Any:
    """The dataclass of a section, also of one whose keys the user names."""
    return get_args(section)[1] if get_origin(section) is dict else section


def _doc(section: Any) -> str:
    return getdoc(_section_type(section)) or ""


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        100,
        initial_indent=indent,
        subsequent_indent=indent.replace("-", " "),
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    print(reference(), end="")
