"""Reads config files and `key=value` overrides as plain values, each in the type of its setting.

Text is kept as written: YAML 1.1 would turn `1.10`, `on`, `007` and `12:30` into other text.
"""

import contextlib
import difflib
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from ganscale.config_schedules import is_convertible, keep_starts
from ganscale.errors import UserError
from ganscale.older_settings import REPLACED, add_older, take_older
from ganscale.resolution import Resolution
from ganscale.schema import Config
from ganscale.secrets import without_secrets
from ganscale.setting import child_type, has_keys, main_setting, scheduled_type, types_of

COMMAND_LINE = "command line"

_TAG = "tag:yaml.org,2002:"
_NULLS = ("", "~", "null", "Null", "NULL")
_NUMBER_TAGS = (f"{_TAG}int", f"{_TAG}float")
_MAX_NODES = 10_000  # aliases can make a short text endless
_WHOLE_NUMBER = re.compile(r"([+-]?\d[\d_]*(?:\.\d*)?(?:[eE][+-]?\d{1,2})?)([kKmM]?)")
_SCALE = {"": 1, "k": 10**3, "m": 10**6}


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars as YAML 1.2 does, and `inf` and `nan` as OmegaConf writes them."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


for kind, pattern, first in (
    ("merge", "<<", ["<"]),
    ("null", "|".join(_NULLS), ["", *"~nN"]),
    ("bool", "true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(?:\d+|\d{1,3}(?:_\d{3})+)|0x[\da-fA-F]+", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?|[-+]?\.?(?:inf|Inf|INF)|\.?(?:nan|NaN|NAN)",
        [*"-+.0123456789iInN"],
    ),
):
    _Loader.add_implicit_resolver(_TAG + kind, re.compile(rf"(?:{pattern})\Z"), first)


def read_file(path: Path, *, is_stored: bool = False) -> tuple[list[str], dict[str, Any]]:
    """(the files that a config file includes, its settings by section). Raises UserError, naming
    the file, if it cannot be read or has keys that the schema does not have.

    is_stored: the file is a run folder's, maybe of an older version
    """
    with _mistakes(f"{path}: "):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be read ({error})") from None
        node = _compose(text) or yaml.MappingNode(_TAG + "map", [])
        if not isinstance(node, yaml.MappingNode):
            raise UserError("must hold `key: value` pairs")
        includes = [item for item in node.value if item[0].value == "include"]
        node.value = [item for item in node.value if item not in includes]
        files = [_plain(value, list[str], "include") for _, value in includes]
        for value in files:
            if not isinstance(value, list) or not all(isinstance(file, str) for file in value):
                raise UserError(f"`include` must be a list of files, not {value!r}")
        older = take_older(node) if is_stored else {}
        settings = _section(node, Config, "")
        add_older(older, settings)
        return [file for value in files for file in value], settings


def read_override(override: str) -> dict[str, Any]:
    """The settings by section of `key.subkey=value`. Raises UserError; for what cannot be read, its
    message does not show the value, which may be a password."""
    key, _, text = override.partition("=")
    with _mistakes(f"{COMMAND_LINE}: "):
        if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
            raise UserError(f"`{key}=...` is not of the form key.subkey=value")
    with _mistakes(f"{COMMAND_LINE}: `{key}` is "):
        expected: Any = Config
        for name in key.split("."):
            expected = child_type(expected, name)
        is_text = expected is str and text[:1] not in ("'", '"')  # as it is, unless quoted again
        value = _scalar(text) if is_text else _compose(text) or _scalar("")
    with _mistakes(f"{COMMAND_LINE}: "):
        return _section(_mapping(key, value), Config, "")


def update(settings: dict[str, Any], later: dict[str, Any], section: Any = Config) -> None:
    """Overrides the nested `settings` of a section with `later` ones, in place."""
    keep_starts(later, settings, section)
    for key, value in later.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            update(settings[key], value, child_type(section, key))
        else:
            settings[key] = value


@contextlib.contextmanager
def _mistakes(where: str) -> Iterator[None]:
    """Adds `where` to the UserError of what it surrounds, and makes one of YAML's errors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}{error}") from None
    except RecursionError:
        raise UserError(f"{where}nested too deeply") from None
    except yaml.MarkedYAMLError as error:  # its own message quotes the text
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{where}not valid YAML ({place}{error.problem})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}not valid YAML ({' '.join(str(error).split())})") from None


def _compose(text: str) -> yaml.Node | None:
    """The YAML in `text`; None if it is empty. Raises UserError for one that is far too large."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in sizes:
            children = node if isinstance(node, tuple) else node.value
            sizes[id(node)] = 1 + sum(map(size, children))
        return sizes[id(node)]

    node = yaml.compose(text, _Loader)
    if node is not None and size(node) > _MAX_NODES:
        raise UserError(f"has more than {_MAX_NODES:,} values, aliases (`*name`) included")
    return node


def _scalar(text: str) -> yaml.ScalarNode:
    return yaml.ScalarNode(_TAG + ("null" if text in _NULLS else "str"), text)


def _mapping(dotted: str, value: yaml.Node) -> yaml.MappingNode:
    """`a.b` and a value -> `{a: {b: value}}`."""
    first, _, rest = dotted.partition(".")
    pair = _scalar(first), _mapping(rest, value) if rest else value
    return yaml.MappingNode(_TAG + "map", [pair])


def _section(node: yaml.MappingNode, section: Any, prefix: str) -> dict[str, Any]:
    """The settings in a section of the type `section`: a dataclass, `dict[str, ...]`, or a number
    that may be a schedule."""
    settings: dict[str, Any] = {}
    for key, value in _pairs(node, prefix):
        expected = child_type(section, key)
        if has_keys(section) and expected is None:
            head, _, rest = key.partition(".")
            expected = child_type(section, head)
            if not rest or expected is None:
                raise UserError(f"unknown key `{prefix}{key}`{_hint(key, section, prefix)}")
            key, value = head, _mapping(rest, value)  # `optimizer: {critic.learning_rate: 1e-4}`
        update(settings, {key: _value(value, expected, prefix + key)}, section)
    return settings


def _pairs(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, yaml.Node]]:
    """The keys and values of a mapping."""
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or (prefix and key.tag in _NUMBER_TAGS):
            written = _plain(key, Any, prefix)
            where = f" of `{prefix[:-1]}`" if prefix else ""
            raise UserError(f"a key{where} must be a word, not {written!r}")
        if key.value in seen:
            raise UserError(f"`{prefix}{key.value}` is given twice")
        seen.add(key.value)
    _Loader("").flatten_mapping(node)  # `<<: *anchor`
    for key, value in node.value:
        yield key.value, value


def _value(node: yaml.Node, expected: Any, key: str) -> Any:
    is_options = get_origin(expected) is dict
    if not has_keys(expected) and not is_options:
        return _plain(node, expected, key)
    if isinstance(node, yaml.MappingNode):
        return _section(node, expected, key + ".")
    if number := scheduled_type(expected):
        value = _plain(node, number, key)
        if not is_convertible(value, number) and "${" not in str(value):
            shown = repr(without_secrets(value))
            raise UserError(f"`{key}` must be {number.__name__} or a schedule, not {shown}")
        return value
    value = _plain(node, Any, key)
    if is_dataclass(expected) and value is None:  # `clip: null`
        return None
    main = main_setting(expected) if is_dataclass(expected) else None
    if main is None or not isinstance(node, yaml.ScalarNode):
        raise UserError(f"`{key}` must be a section of keys, not {without_secrets(value)!r}")
    return {main: _value(node, types_of(expected)[main], f"{key}.{main}")}


def _plain(node: yaml.Node, expected: Any, key: str) -> Any:
    """The value of a node; scalars become what `expected` means, if they can."""
    if expected == Resolution:
        expected = list[int] if isinstance(node, yaml.SequenceNode) else int
    if isinstance(node, yaml.MappingNode):
        pairs = _pairs(node, key + ".")
        values = {name: _plain(child, Any, f"{key}.{name}") for name, child in pairs}
        if get_origin(expected) is list:
            raise UserError(f"`{key}` must be list, not {values!r}")
        return values
    if isinstance(node, yaml.SequenceNode):
        (item,) = get_args(expected) if get_origin(expected) is list else (Any,)
        return [_value(child, item, f"{key}[{i}]") for i, child in enumerate(node.value)]
    text, tag = node.value, node.tag.removeprefix(_TAG)
    if tag not in ("null", "bool", "int", "float", "str"):
        raise UserError(f"`{key}` has the unknown tag {node.tag}")
    if tag == "null":
        return None
    if expected is str:
        return text
    if expected is int and (number := _WHOLE_NUMBER.fullmatch(text)):
        value = Decimal(number[1].replace("_", "")) * _SCALE[number[2].lower()]
        if value == value.to_integral_value():
            return int(value)
    if tag == "bool":
        return text.lower() == "true"
    try:
        if tag == "int":
            return int(text, 16) if text[:2] == "0x" else int(text)
        if tag == "float":
            return float(re.sub(r"\.(?=[a-zA-Z])", "", text))  # `.inf`
    except ValueError:  # `!!int x`
        raise UserError(f"`{key}` must be {tag}, not {text!r}") from None
    return text


def _hint(key: str, section: Any, prefix: str) -> str:
    """How to write an unknown key now, or the nearest valid one."""
    if prefix + key in REPLACED:
        return f": {REPLACED[prefix + key]}"
    siblings = {name: prefix + name for name in types_of(section)}
    everywhere = {dotted.rsplit(".", 1)[-1]: dotted for dotted in _schema_keys(Config, "")}
    for candidates in (siblings, everywhere):
        if close := difflib.get_close_matches(key, candidates, n=1, cutoff=0.6):
            return f"; did you mean `{candidates[close[0]]}`?"
    return f"; valid here: {', '.join(siblings)}"


def _schema_keys(section: type, prefix: str) -> Iterator[str]:
    for name, expected in types_of(section).items():
        yield f"{prefix}{name}"
        if is_dataclass(expected):
            yield from _schema_keys(expected, f"{prefix}{name}.")  # type: ignore[arg-type]
