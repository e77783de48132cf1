"""Makes one validated run from the schema's defaults, YAML files and `key=value` overrides.

Later values win. A file may list others under `include:` (relative to itself); they are merged
first, and the file's own keys over them. Among the files of a command line, `generator`, `critic`,
`objective` and `optimizer` of a later file replace those of an earlier one as a whole, so that two
objectives never mix.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from ganscale.config_schedules import keep_starts, plain, read_numbers, setting_mistakes
from ganscale.config_yaml import COMMAND_LINE, read_file, read_override, update
from ganscale.errors import UserError
from ganscale.importing import nearest
from ganscale.ready import find_config, ready_configs
from ganscale.schedules import Schedule, ends
from ganscale.schema import Config, OptimizerConfig
from ganscale.secrets import without_secrets
from ganscale.setting import child_type, settings_of

REPLACED_WHOLE = ("generator", "critic", "objective", "optimizer", "augmentation")
OPTIONS_OF = {
    "generator.target": "generator.options",
    "critic.target": "critic.options",
    "objective.loss.name": "objective.loss.options",
    "evaluation.network": "evaluation.options",
    "augmentation.pipeline": "augmentation.strengths",
}
"""Options belong to a network or loss: those of the one before are dropped with its name."""

DEFAULT = "default"

# Settings and sections that may change when a run resumes: they do not affect its curve.
FREE_TO_CHANGE = (
    "run", "log", "samples", "evaluation", "checkpoint", "audit", "objective.panel", "resume",
    "runtime", "profile", "data.path", "data.shards", "data.cache", "data.cache_gib",
    "data.retry_seconds", "data.workers", "data.max_bad_fraction", "training.total_images",
)  # fmt: skip

_INTERPOLATION = re.compile(r"(\\*)\$\{")  # escaped after an odd number of backslashes


@dataclass(frozen=True)
class Resolved:
    """A complete run. origin: the file or `command line` of each dotted key that was given"""

    config: Config
    origin: Mapping[str, str]

    def to_yaml(self) -> str:
        """The run as YAML that loads again."""
        escaped = _map_text(lambda text: _INTERPOLATION.sub(r"\1\1\\${", text), plain(self.config))
        return OmegaConf.to_yaml(OmegaConf.create(escaped))


def resolve(arguments: Sequence[str], *, is_stored: bool = False) -> Resolved:
    """The run described by config files and `key=value` overrides; `include=FILE` is one more file.
    Raises UserError naming the file, the key and the nearest valid key.

    is_stored: takes `${...}` in files as text; also true of a file beside a run's `run.json`
    """
    # A path may contain an equals sign (runs/rate=1e-4), a key never contains a slash.
    overrides = [argument for argument in arguments if "=" in argument.partition("/")[0]]
    paths = [_locate(argument) for argument in arguments if argument not in overrides]
    # The agent of a W&B sweep passes nothing but `key=value`.
    paths += [_locate(text[8:]) for text in overrides if text.startswith("include=")]
    overrides = [text for text in overrides if not text.startswith("include=")]
    if not paths:
        raise UserError("no config given; for example: demo (`ganscale configs` lists them)")

    blank = OmegaConf.structured(Config)
    merged = blank.copy()
    origin: dict[str, str] = {}
    dropped: dict[str, str] = {}
    sources: dict[str, bool] = {}
    for path in paths:
        of_run = is_stored or path.with_name("run.json").exists()
        layers = list(_read(path, (), of_run))
        sources |= {source: of_run for source, _ in layers}
        if of_run:
            layers = [
                (source, _map_text(_without_interpolations, layer)) for source, layer in layers
            ]
        for section in REPLACED_WHOLE:
            if any(section in layer for _, layer in layers):
                merged[section] = blank[section]
                given = [key for key in origin if is_within(key, (section,))]
                dropped |= dict.fromkeys(given, layers[-1][0])
                _forget(origin, section)
        for source, layer in layers:
            merged = _merge(merged, layer, source, origin)
    from_command_line: dict[str, Any] = {}
    for override in overrides:
        if any("\ud800" <= character <= "\udfff" for character in override):
            raise UserError(f"command line: {override!r} is not UTF-8, as a config must be")
        update(from_command_line, read_override(override))
    merged = _merge(merged, from_command_line, COMMAND_LINE, origin)
    if merged.run._get_node("name")._value() in ("", MISSING):
        merged.run.name = paths[0].stem
        origin["run.name"] = f"name of {paths[0]}"
    sources[COMMAND_LINE] = False
    return Resolved(_validate(merged, origin, dropped, sources), origin)


def load_stored(path: Path) -> Config:
    """The config that is stored in a run folder, which may be a stranger's: `${oc.env:NAME}` in it
    is text. Raises UserError naming the file."""
    try:
        return resolve([str(path.absolute())], is_stored=True).config
    except UserError as error:
        named = "" if str(path.absolute()) in str(error) else f"{path}: "
        raise UserError(f"{named}{error}") from None


def curve_changes(stored: Config, requested: Config) -> list[str]:
    """Changed settings that would break a resumed run's curve, as `key: stored -> requested`."""
    before, after = (
        # `clip: null` and `options: {}` change by what the other run has in them.
        {k: v for k, v in _flatten(plain(config, as_text=True)) if v not in (None, {})}
        for config in (stored, requested)
    )
    free = {*FREE_TO_CHANGE, *requested.resume.allow}
    return [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not is_within(key, free)
    ]


def settings_digest(config: Config) -> str:
    """Eight hexadecimal digits, equal on all ranks of a run; machines may have paths of their own
    for the same files."""
    settings = {
        key: repr(value)
        for key, value in _flatten(plain(config))
        if key not in ("run.folder", "data.path", "data.cache")
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def is_within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of `names` or in a section that is."""
    return any(key == name or key.startswith(name + ".") for name in names)


def _locate(name: str, folder: Path = Path()) -> Path:
    """The config file `name` in `folder`, or the ready config of that name."""
    path, ready = folder / name, find_config(name)
    if path.is_file() or (path.exists() and ready is None):
        return path
    if ready is not None:
        return ready
    hint = nearest(path.name, [file.name for file in path.parent.glob("*.y*ml")])
    if not hint and find_config(path.stem):
        hint = f"; there is a ready config named {path.stem}"
    shown = without_secrets(name) if "://" in name else path  # `data.path= https://...`
    raise UserError(f"{shown}: no such config file{hint or nearest(name, ready_configs())}")


def _read(
    path: Path, parents: tuple[Path, ...], is_stored: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (path, settings) of each included file, then of the file itself."""
    if path.resolve() in parents:
        raise UserError(f"{path}: includes itself")
    includes, settings = read_file(path, is_stored=is_stored)
    for included in includes:
        try:
            file = _locate(included, path.parent)
        except UserError as error:
            raise UserError(f"{path} includes {error}") from None
        yield from _read(file, (*parents, path.resolve()), is_stored)
    yield str(path), settings


def _merge(base: Any, layer: dict[str, Any], source: str, origin: dict[str, str]) -> Any:
    """`base` overridden by `layer`; sets the origin of the layer's keys to `source`."""
    before = OmegaConf.to_container(base)
    kept = {f"{key}.from": origin.get(key, DEFAULT) for key in keep_starts(layer, before)}
    before, given = dict(_flatten(before)), dict(_flatten(layer))
    for name, options in OPTIONS_OF.items():
        if before[name] not in (MISSING, given.get(name, before[name])):
            OmegaConf.update(base, options, {}, merge=False)
            _forget(origin, options)
    created = _create(layer, source)
    try:
        merged = OmegaConf.merge(base, created)
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {_type_mistake(error, created)}") from None
    except OverflowError:  # an int that no float can hold
        large = [
            key for key, value in given.items() if isinstance(value, int) and abs(value) > 1e308
        ]
        raise UserError(f"{source}: `{large[0]}` is too large") from None
    for key in given:  # a number in place of a schedule, or the other way round
        _forget(origin, key)
        origin.pop(key.rpartition(".")[0], None)
    origin.update(dict.fromkeys(given, source) | kept)
    return merged


def _create(layer: dict[str, Any], source: str) -> DictConfig:
    for key, value in _flatten(layer):
        try:
            OmegaConf.create({"value": value})
        except GrammarParseError:  # its message quotes the text
            raise UserError(f"{source}: `{key}` has a `${{...}}` that cannot be read") from None
    return OmegaConf.create(layer)


def _forget(origin: dict[str, str], section: str) -> None:
    for key in [key for key in origin if is_within(key, (section,))]:
        del origin[key]


def _type_mistake(error: OmegaConfBaseException, layer: DictConfig) -> str:
    key = str(error.full_key or error.key)
    expected: Any = Config
    for name in re.sub(r"\[\d+\]", "", key).split("."):
        expected = child_type(expected, name) or expected
    if key.endswith("]"):
        expected = get_args(expected)[0]
    wording = "a section of keys" if is_dataclass(expected) else expected.__name__
    value = OmegaConf.select(layer, key, throw_on_resolution_failure=False)
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    hint = ": it cannot have a schedule" if isinstance(value, dict) and "to" in value else ""
    return f"`{key}` must be {wording}, not {without_secrets(value)!r}{hint}"


def _validate(
    merged: Any, origin: Mapping[str, str], dropped: Mapping[str, str], sources: Mapping[str, bool]
) -> Config:
    """dropped: keys that a file has replaced with their section, and that file
    sources: all in their order, and whether they are of a run, with a value for every setting
    """
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            keys = ", ".join(f"`{key}`" for key in missing)
            hints = [
                f"; {file} replaces `{key.partition('.')[0]}` of earlier files as a whole"
                for key, file in dropped.items()
                if key in missing
            ]
            raise UserError(f"the config lacks {keys}{''.join(hints[:1])}")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        key, reason = str(error.full_key), str(error).partition("\n")[0]
        raise UserError(f"{origin.get(key, DEFAULT)}: `{key}`: {reason}") from None
    assert isinstance(config, Config)
    for key, mistake in read_numbers(config):
        raise UserError(f"{_source(key, origin)}: `{key}` {mistake}")
    for key, mistake in chain(
        _not_finite(plain(config), ""),
        _mistakes(config, ""),
        _combination_mistakes(config, origin),
        _meaningless(config, origin, sources),
    ):
        raise UserError(f"{_source(key, origin)}: `{key}` {mistake}")
    return config


def _source(key: str, origin: Mapping[str, str]) -> str:
    """Where a key, or the first within it, was given."""
    key = key.partition("[")[0]
    return next((source for given, source in origin.items() if is_within(given, (key,))), DEFAULT)


def _not_finite(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for each NaN and infinity, however deep in lists and options."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _not_finite(child, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from _not_finite(child, f"{key}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, f"must be finite, not {value}"


def _mistakes(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for each value outside its setting's limits."""
    for name, setting in settings_of(type(section)).items():
        key, value = prefix + name, getattr(section, name)
        if setting is not None:
            yield from setting_mistakes(setting, value, key)
        elif isinstance(value, dict):
            for child_name, child in value.items():
                yield from _mistakes(child, f"{key}.{child_name}.")
        elif value is not None:
            yield from _mistakes(value, key + ".")


def _combination_mistakes(config: Config, origin: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for values that are valid alone but not together."""
    for network in ("critic", "generator"):
        betas = getattr(config.optimizer, network).betas
        if len(betas) != 2 or not all(0 <= end < 1 for beta in betas for end in ends(beta)):
            shown = f"[{', '.join(map(str, betas))}]"
            yield f"optimizer.{network}.betas", f"must be two numbers in [0, 1), not {shown}"
    batch, micro_batches = config.training.global_batch_size, config.training.accumulate
    if batch % micro_batches:
        yield "training.accumulate", f"must divide the global batch of {batch}, not {micro_batches}"
    if config.training.reuse_fakes and micro_batches > 1:
        yield "training.reuse_fakes", "must be false with training.accumulate above 1"
    penalties = config.objective.generator_penalties.values()
    if config.training.reuse_fakes and any(max(ends(each.weight)) > 0 for each in penalties):
        yield "training.reuse_fakes", "must be false with objective.generator_penalties"
    if config.training.reuse_fakes and config.training.generator_real == "fresh":
        yield "training.reuse_fakes", "must be false with training.generator_real=fresh"
    augmentation = config.augmentation
    is_adaptive, probability = augmentation.adaptive is not None, augmentation.probability
    if is_adaptive and isinstance(probability, Schedule):
        yield "augmentation.probability", "must be a number with `augmentation.adaptive`"
    is_given = max(ends(probability)) > 0 or is_adaptive
    if augmentation.pipeline != "none" and not is_given:
        yield "augmentation.probability", "must be above 0 unless `augmentation.adaptive` is given"
    strengths = augmentation.strengths.values()
    if strengths and max(strengths) == 0:
        yield "augmentation.strengths", "must have one above 0, or augmentation.pipeline be none"
    is_unnamed = augmentation.pipeline == "none" and "augmentation.pipeline" not in origin
    if is_unnamed and (is_given or augmentation.strengths):
        yield "augmentation.pipeline", "must be ada or diffaugment with other settings beside it"


def _meaningless(
    config: Config, origin: Mapping[str, str], sources: Mapping[str, bool]
) -> Iterator[tuple[str, str]]:
    """Settings of another algorithm than the optimizer's, unless a later source has chosen it.
    Those of the default's value change nothing."""
    rank = {source: number for number, source in enumerate(sources)}
    others = {
        "adam": ("alpha", "momentum"),
        "rmsprop": ("betas",),
        "sgd": ("betas", "alpha", "eps"),
    }
    for network in ("critic", "generator"):
        key, optimizer = f"optimizer.{network}", getattr(config.optimizer, network)
        usual = OptimizerConfig(learning_rate=0.0)
        for name in others[optimizer.name]:
            source, chosen = _source(f"{key}.{name}", origin), origin.get(f"{key}.name", DEFAULT)
            is_later = rank.get(source, -1) >= rank.get(chosen, -1)
            is_usual = getattr(optimizer, name) == getattr(usual, name)
            if source != DEFAULT and not sources.get(source) and is_later and not is_usual:
                yield f"{key}.{name}", f"means nothing to {optimizer.name}: leave it out"


def _map_text(change: Callable[[str], str], value: Any) -> Any:
    """`value` with `change` applied to every string in its dictionaries and lists, not to keys."""
    if isinstance(value, dict):
        return {key: _map_text(change, child) for key, child in value.items()}
    if isinstance(value, list):
        return [_map_text(change, child) for child in value]
    return change(value) if isinstance(value, str) else value


def _without_interpolations(text: str) -> str:
    """`text` with every `${` escaped that is not."""
    return _INTERPOLATION.sub(
        lambda match: match[0] if len(match[1]) % 2 else rf"{2 * match[1]}\${{", text
    )


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, node
