"""Schema <- YAML files, in order <- key=value overrides -> one validated, typed run.

A file may name others in `include:` (relative to itself); they are merged first, and the file's
own keys over them. Among the files of a command line, a later one's `generator`, `critic`,
`objective` and `optimizer` take the place of an earlier one's as a whole: half of one objective
merged into half of another would be neither.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ganscale.errors import UserError
from ganscale.schema import Config

REPLACED_WHOLE = ("generator", "critic", "objective", "optimizer")
COMMAND_LINE = "command line"
DEFAULT = "default"

# What may change when a run resumes without changing its curve.
FREE_TO_CHANGE = (
    "run", "log", "samples", "checkpoint", "audit", "objective.panel", "resume", "runtime",
    "profile", "data.path", "data.shards", "data.cache", "data.cache_gib", "data.retry_seconds",
    "data.workers", "data.bad_sample_limit", "training.total_images",
)  # fmt: skip

_IMAGE_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmM])")


@dataclass(frozen=True)
class Resolved:
    """A complete run, and for each dotted key where its value came from."""

    config: Config
    origin: Mapping[str, str]

    def to_yaml(self, *, with_origin: bool = False) -> str:
        """The run as YAML that loads again; with a comment per value on request."""
        text = OmegaConf.to_yaml(OmegaConf.structured(self.config))
        return _annotated(text, self.origin) if with_origin else text


def resolve(arguments: Sequence[str]) -> Resolved:
    """The run described by config files and `key=value` overrides.

    Raises UserError naming the file, the key and the nearest valid key.
    """
    # A folder's name may hold an equals sign (runs/rate=1e-4), a key holds no slash.
    overrides = [argument for argument in arguments if "=" in argument.partition("/")[0]]
    paths = [Path(argument) for argument in arguments if argument not in overrides]
    if not paths:
        raise UserError("no config file given; for example: configs/demo.yaml")

    blank = OmegaConf.structured(Config)
    merged = blank.copy()
    origin: dict[str, str] = {}
    for path in paths:
        layers = list(_read(path, ()))
        for section in REPLACED_WHOLE:
            if any(section in layer for _, layer in layers):
                merged[section] = blank[section]
                origin = {k: v for k, v in origin.items() if not k.startswith(section + ".")}
        for source, layer in layers:
            merged = _merge(merged, layer, source, origin)
    if overrides:
        merged = _merge(merged, _parse_overrides(overrides), COMMAND_LINE, origin)
    if OmegaConf.is_missing(merged.run, "name"):
        merged.run.name = paths[0].stem
        origin["run.name"] = f"name of {paths[0]}"
    return Resolved(_validated(merged, origin), origin)


def load_stored(path: Path) -> Config:
    """The config that a run folder keeps."""
    return resolve([str(path.absolute())]).config


def curve_changes(stored: Config, requested: Config) -> list[str]:
    """The settings, as `key: stored -> requested`, that would break a resumed run's curve."""
    before, after = _leaves(stored), _leaves(requested)
    free = {*FREE_TO_CHANGE}
    if requested.training.schedule != "constant":
        free.discard("training.total_images")  # the learning rates depend on it
    free |= {*requested.resume.allow}
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == name or key.startswith(name + ".") for name in free)
    ]


def _read(path: Path, parents: tuple[Path, ...]) -> Iterator[tuple[str, DictConfig]]:
    """The file's includes, then the file itself, each as (source, keys)."""
    if path.resolve() in parents:
        raise UserError(f"{path}: includes itself")
    try:
        node = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except Exception as error:  # YAML's own errors share no public base with OmegaConf's
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(node, DictConfig):
        raise UserError(f"{path}: must hold `key: value` pairs")
    includes = node.pop("include") if "include" in node else ListConfig([])
    if not isinstance(includes, ListConfig):
        raise UserError(f"{path}: `include` must be a list of files, not {includes!r}")
    for included in includes:
        yield from _read(path.parent / str(included), (*parents, path.resolve()))
    yield str(path), node


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        key = override.split("=", 1)[0]
        if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
            raise UserError(f"{COMMAND_LINE}: `{override}` is not of the form key.subkey=value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:  # as in _read
        raise UserError(f"{COMMAND_LINE}: {' '.join(str(error).split())}") from None


def _merge(base: Any, layer: DictConfig, source: str, origin: dict[str, str]) -> Any:
    keys = list(_checked(layer, Config, "", source))
    try:
        merged = OmegaConf.merge(base, layer)
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {_type_mistake(error, layer)}") from None
    origin.update(dict.fromkeys(keys, source))
    return merged


def _checked(node: DictConfig, schema: type, prefix: str, source: str) -> Iterator[str]:
    """Yields the dotted keys of `node`'s leaves; expands `50k`; raises on a key not in `schema`."""
    hints = get_type_hints(schema)
    for key in list(node):
        dotted = f"{prefix}{key}"
        if key not in hints:
            raise UserError(f"{source}: unknown key `{dotted}`{_nearest(str(key), schema, prefix)}")
        hint = _without_none(hints[str(key)])
        value: Any = node._get_node(key)
        if get_origin(hint) is dict:
            yield from _checked_dict(value, get_args(hint)[1], dotted, source)
        elif is_dataclass(hint) and isinstance(value, DictConfig) and not value._is_none():
            yield from _checked(value, hint, dotted + ".", source)  # type: ignore[arg-type]
        elif is_dataclass(hint) and not value._is_none():
            raise UserError(f"{source}: `{dotted}` must be a section of keys, not {_plain(value)}")
        else:
            # The node's own value: to ask for it by key would follow an interpolation.
            if hint is int and (count := _IMAGE_COUNT.fullmatch(str(value._value()))):
                scale = {"k": 10**3, "m": 10**6}[count[2].lower()]
                node[key] = round(float(count[1]) * scale)
            yield dotted


def _checked_dict(value: Any, schema: Any, dotted: str, source: str) -> Iterator[str]:
    """The same for a section whose keys are free (network options, penalties by name)."""
    if not isinstance(value, DictConfig) or value._is_none():
        raise UserError(f"{source}: `{dotted}` must be a section of keys, not {_plain(value)}")
    for name in value:
        child = value._get_node(name)
        if not isinstance(name, str):
            raise UserError(f"{source}: a key of `{dotted}` must be a word, not {name!r}")
        if is_dataclass(schema) and isinstance(child, DictConfig):
            yield from _checked(child, schema, f"{dotted}.{name}.", source)  # type: ignore[arg-type]
        elif isinstance(child, DictConfig) and len(child):
            yield from _checked_dict(child, schema, f"{dotted}.{name}", source)
        else:
            yield f"{dotted}.{name}"


def _nearest(key: str, schema: type, prefix: str) -> str:
    siblings = {field.name: prefix + field.name for field in fields(schema)}
    everywhere = {dotted.rsplit(".", 1)[-1]: dotted for dotted in _schema_keys(Config, "")}
    for candidates in (siblings, everywhere):
        if close := difflib.get_close_matches(key, candidates, n=1, cutoff=0.6):
            return f"; did you mean `{candidates[close[0]]}`?"
    return f"; valid here: {', '.join(siblings)}"


def _schema_keys(schema: type, prefix: str) -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        hint = _without_none(hint)
        yield f"{prefix}{name}"
        if is_dataclass(hint):
            yield from _schema_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


def _without_none(hint: Any) -> Any:
    if isinstance(hint, UnionType):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint


def _hint_of(dotted: str) -> Any:
    hint: Any = Config
    for part in dotted.split("."):
        hint = _without_none(hint)
        if get_origin(hint) is dict:
            hint = get_args(hint)[1]
        elif is_dataclass(hint):
            hint = get_type_hints(hint).get(part)
    return _without_none(hint)


def _type_mistake(error: OmegaConfBaseException, layer: DictConfig) -> str:
    key = str(error.full_key or error.key)
    hint = _hint_of(re.sub(r"\[\d+\]", "", key))
    if key.endswith("]"):
        hint = get_args(hint)[0]
    expected = "a section" if is_dataclass(hint) else getattr(hint, "__name__", str(hint))
    value = OmegaConf.select(layer, key, throw_on_resolution_failure=False)
    return f"`{key}` must be {expected}, not {_plain(value)}"


def _plain(value: Any) -> str:
    """A value as the user wrote it, for messages."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    return repr(value._value() if isinstance(value, Node) else value)


def _validated(merged: Any, origin: Mapping[str, str]) -> Config:
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"the config lacks {', '.join(f'`{key}`' for key in missing)}")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UserError(" ".join(str(error).split())) from None
    assert isinstance(config, Config)
    for complaint_key, complaint in _complaints(config, ""):
        source = origin.get(complaint_key, DEFAULT)
        raise UserError(f"{source}: `{complaint_key}` {complaint}")
    return config


def _complaints(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for each value outside the limits that the schema states."""
    for field in fields(section):
        key, value, limits = prefix + field.name, getattr(section, field.name), field.metadata
        children = value.items() if isinstance(value, dict) else ()
        for name, child in children:
            if is_dataclass(child):
                yield from _complaints(child, f"{key}.{name}.")
        if is_dataclass(value):
            yield from _complaints(value, key + ".")
        if isinstance(value, float) and math.isinf(value):
            yield key, f"must be finite, not {value}"
        if "choices" in limits and value not in limits["choices"]:
            close = difflib.get_close_matches(str(value), limits["choices"], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield key, f"must be one of {', '.join(limits['choices'])}, not {value}{hint}"
        if "at_least" in limits and not value >= limits["at_least"]:
            yield key, f"must be at least {limits['at_least']}, not {value}"
        if "above" in limits and not value > limits["above"]:
            yield key, f"must be above {limits['above']}, not {value}"
        if "below" in limits and not value < limits["below"]:
            yield key, f"must be below {limits['below']}, not {value}"
    if not prefix:
        yield from _cross_complaints(section)


def _cross_complaints(config: Config) -> Iterator[tuple[str, str]]:
    """Values that are fine alone and wrong together."""
    if config.data.channels not in (1, 3):
        yield "data.channels", f"must be 1 (grey) or 3 (RGB), not {config.data.channels}"
    for network in ("critic", "generator"):
        betas = getattr(config.optimizer, network).betas
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            yield f"optimizer.{network}.betas", f"must be two numbers in [0, 1), not {betas}"
    batch, parts = config.training.global_batch_size, config.training.accumulate
    if batch % parts:
        yield "training.accumulate", f"must divide the global batch of {batch}, not {parts}"
    if config.training.reuse_fakes and parts > 1:
        yield "training.reuse_fakes", "must be false with training.accumulate above 1"


def _leaves(config: Config) -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.structured(config))
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = node

    walk(container, "")
    return flat


def _annotated(text: str, origin: Mapping[str, str]) -> str:
    """`text` with each value's origin as a comment where the value ends."""
    lines = text.split("\n")

    def walk(section: yaml.MappingNode, prefix: str) -> None:
        for key, value in section.value:
            dotted = prefix + key.value
            if isinstance(value, yaml.MappingNode) and value.value:
                walk(value, dotted + ".")
                continue
            is_block = isinstance(value, yaml.SequenceNode) and not value.flow_style
            line = key.start_mark.line if is_block else value.end_mark.line
            lines[line] += f"  # {origin.get(dotted, DEFAULT)}"

    walk(yaml.compose(text, yaml.SafeLoader), "")
    return "\n".join(lines)
