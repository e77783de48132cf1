"""Makes one validated run from the schema's defaults, YAML files and `key=value` overrides.

Later values win. A file may list others under `include:` (relative to itself); they are merged
first, and the file's own keys over them. Among the files of a command line, `generator`, `critic`,
`objective` and `optimizer` of a later file replace those of an earlier one as a whole, so that two
objectives never mix.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_origin

from omegaconf import MISSING, DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ganscale.errors import UserError
from ganscale.schema import Config
from ganscale.setting import child_type, settings_of, types_of

REPLACED_WHOLE = ("generator", "critic", "objective", "optimizer")
COMMAND_LINE = "command line"
DEFAULT = "default"

# Settings and sections that may change when a run resumes: they do not affect its curve.
FREE_TO_CHANGE = (
    "run", "log", "samples", "checkpoint", "audit", "objective.panel", "resume", "runtime",
    "profile", "data.path", "data.shards", "data.cache", "data.cache_gib", "data.retry_seconds",
    "data.workers", "data.max_bad_fraction", "training.total_images",
)  # fmt: skip

_IMAGE_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmM])")


@dataclass(frozen=True)
class Resolved:
    """A complete run. origin: the file or `command line` of each dotted key that was given"""

    config: Config
    origin: Mapping[str, str]

    def to_yaml(self) -> str:
        """The run as YAML that loads again."""
        return OmegaConf.to_yaml(OmegaConf.structured(self.config))


def resolve(arguments: Sequence[str]) -> Resolved:
    """The run described by config files and `key=value` overrides; `include=FILE` is one more file.
    Raises UserError naming the file, the key and the nearest valid key."""
    # A path may contain an equals sign (runs/rate=1e-4), a key never contains a slash.
    overrides = [argument for argument in arguments if "=" in argument.partition("/")[0]]
    paths = [Path(argument) for argument in arguments if argument not in overrides]
    # The agent of a W&B sweep passes nothing but `key=value`.
    paths += [Path(text[8:]) for text in overrides if text.startswith("include=")]
    overrides = [text for text in overrides if not text.startswith("include=")]
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
    if merged.run._get_node("name")._value() in ("", MISSING):
        merged.run.name = paths[0].stem
        origin["run.name"] = f"name of {paths[0]}"
    return Resolved(_validate(merged, origin), origin)


def load_stored(path: Path) -> Config:
    """The config that is stored in a run folder. Raises UserError naming the file."""
    try:
        return resolve([str(path.absolute())]).config
    except UserError as error:
        named = "" if str(path.absolute()) in str(error) else f"{path}: "
        raise UserError(f"{named}{error}") from None


def curve_changes(stored: Config, requested: Config) -> list[str]:
    """Changed settings that would break a resumed run's curve, as `key: stored -> requested`."""
    before, after = (
        dict(_flatten(OmegaConf.to_container(OmegaConf.structured(config))))
        for config in (stored, requested)
    )
    free = {*FREE_TO_CHANGE}
    if requested.training.schedule != "constant":
        free.discard("training.total_images")  # the learning rates depend on it
    free |= {*requested.resume.allow}
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not is_within(key, free)
    ]


def is_within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of `names` or in a section that is."""
    return any(key == name or key.startswith(name + ".") for name in names)


def _read(path: Path, parents: tuple[Path, ...]) -> Iterator[tuple[str, DictConfig]]:
    """Yields (path, keys) of each included file, then of the file itself."""
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
    """`base` overridden by `layer`; sets the origin of the layer's keys to `source`."""
    try:
        keys = list(_leaf_keys(layer, Config, ""))
        merged = OmegaConf.merge(base, layer)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {_type_mistake(error, layer)}") from None
    origin.update(dict.fromkeys(keys, source))
    return merged


def _leaf_keys(node: DictConfig, section: Any, prefix: str) -> Iterator[str]:
    """Yields the dotted keys of the leaves of `node`, of the type `section`, and replaces counts
    such as `50k`. Raises UserError for unknown keys and for values where a section belongs."""
    for key in list(node):
        dotted = f"{prefix}{key}"
        expected = child_type(section, str(key))
        if is_dataclass(section) and expected is None:
            raise UserError(f"unknown key `{dotted}`{_nearest(str(key), section, prefix)}")
        if not isinstance(key, str):
            raise UserError(f"a key of `{prefix[:-1]}` must be a word, not {key!r}")
        child: Any = node._get_node(key)  # node[key] would resolve interpolations
        is_section = isinstance(child, DictConfig) and not child._is_none()
        if is_dataclass(expected) or get_origin(expected) is dict:
            if is_section:
                yield from _leaf_keys(child, expected, dotted + ".")
            elif is_dataclass(expected) and child._is_none():  # `clip: null`
                yield dotted
            else:
                raise UserError(f"`{dotted}` must be a section of keys, not {_as_written(child)}")
        elif is_section and len(child) and get_origin(section) is dict:
            yield from _leaf_keys(child, section, dotted + ".")
        else:
            if expected is int and (count := _IMAGE_COUNT.fullmatch(str(child._value()))):
                scale = {"k": 10**3, "m": 10**6}[count[2].lower()]
                node[key] = round(float(count[1]) * scale)
            yield dotted


def _nearest(key: str, section: Any, prefix: str) -> str:
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


def _type_mistake(error: OmegaConfBaseException, layer: DictConfig) -> str:
    key = str(error.full_key or error.key)
    expected: Any = Config
    for name in re.sub(r"\[\d+\]", "", key).split("."):
        expected = child_type(expected, name) or expected
    if key.endswith("]"):
        expected = get_args(expected)[0]
    wording = "a section of keys" if is_dataclass(expected) else expected.__name__
    value = OmegaConf.select(layer, key, throw_on_resolution_failure=False)
    return f"`{key}` must be {wording}, not {_as_written(value)}"


def _as_written(value: Any) -> str:
    """A value as the user wrote it, for messages."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    return repr(value._value() if isinstance(value, Node) else value)


def _validate(merged: Any, origin: Mapping[str, str]) -> Config:
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"the config lacks {', '.join(f'`{key}`' for key in missing)}")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UserError(" ".join(str(error).split())) from None
    assert isinstance(config, Config)
    for key, mistake in chain(_mistakes(config, ""), _combination_mistakes(config)):
        raise UserError(f"{origin.get(key, DEFAULT)}: `{key}` {mistake}")
    return config


def _mistakes(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for each value outside its setting's limits."""
    for name, setting in settings_of(type(section)).items():
        key, value = prefix + name, getattr(section, name)
        if setting is not None:
            if mistake := setting.mistake(value):
                yield key, mistake
        elif isinstance(value, dict):
            for child_name, child in value.items():
                yield from _mistakes(child, f"{key}.{child_name}.")
        elif value is not None:
            yield from _mistakes(value, key + ".")


def _combination_mistakes(config: Config) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for values that are valid alone but not together."""
    for network in ("critic", "generator"):
        betas = getattr(config.optimizer, network).betas
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            yield f"optimizer.{network}.betas", f"must be two numbers in [0, 1), not {betas}"
    batch, micro_batches = config.training.global_batch_size, config.training.accumulate
    if batch % micro_batches:
        yield "training.accumulate", f"must divide the global batch of {batch}, not {micro_batches}"
    if config.training.reuse_fakes and micro_batches > 1:
        yield "training.reuse_fakes", "must be false with training.accumulate above 1"


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, node
