"""Networks from a config: one of ours by name, or the user's own by import path.

Every generator is called as `Target(latent_dim=..., sample_shape=..., num_classes=..., **options)`,
every critic as `Target(sample_shape=..., num_classes=..., **options)`, where `num_classes=0` means
unconditional. A network of the user's own gets those of the first three that it accepts.
"""

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from ganscale.errors import UserError
from ganscale.networks.dcgan import DCGANCritic, DCGANGenerator
from ganscale.networks.mlp import MLPCritic, MLPGenerator
from ganscale.networks.resnet import ResNetCritic, ResNetGenerator

GENERATORS = {"mlp": MLPGenerator, "dcgan": DCGANGenerator, "resnet": ResNetGenerator}
CRITICS = {"mlp": MLPCritic, "dcgan": DCGANCritic, "resnet": ResNetCritic}


def build_generator(
    target: str,
    options: Mapping[str, Any],
    *,
    latent_dim: int,
    sample_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    """The generator that `target` names ("resnet" or "package.module:Name"), freshly initialized.

    Raises UserError for a target that cannot be found or imported, and for options that it refuses.
    """
    constructor = _find(target, GENERATORS)
    given = {"latent_dim": latent_dim, "sample_shape": sample_shape, "num_classes": num_classes}
    return _construct(constructor, f"generator {target}", given, options)


def build_critic(
    target: str,
    options: Mapping[str, Any],
    *,
    sample_shape: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    """The critic that `target` names ("resnet" or "package.module:Name"), freshly initialized.

    Raises UserError for a target that cannot be found or imported, and for options that it refuses.
    """
    constructor = _find(target, CRITICS)
    given = {"sample_shape": sample_shape, "num_classes": num_classes}
    return _construct(constructor, f"critic {target}", given, options)


def parameter_count(module: nn.Module) -> int:
    """The number of trainable scalars, shared parameters once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _find(target: str, ours: Mapping[str, type[nn.Module]]) -> Callable[..., Any]:
    if target in ours:
        return ours[target]
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise UserError(
            f"there is no network called {target!r}{_nearest(target, ours)}; there are "
            f"{', '.join(ours)}, and your own as package.module:Name"
        )
    module = _import(module_name)
    constructor = getattr(module, name, None)
    if constructor is None:
        public = [other for other in vars(module) if not other.startswith("_")]
        raise UserError(f"module {module_name} has no {name}{_nearest(name, public)}")
    if not callable(constructor):
        raise UserError(f"{target} is a {type(constructor).__name__}, not a class of networks")
    return constructor


def _import(name: str) -> ModuleType:
    # `python -m` looks in the current folder first; `accelerate launch script.py` does not.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise UserError(
                f"there is no module {missing} in the current folder {os.getcwd()} or among the "
                f"installed packages (for {name})"
            ) from error
        raise UserError(f"module {name} needs {missing}, which is not installed") from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"module {name} fails on import: {_sentence(error)} ({place.filename}:{place.lineno})"
        ) from error


def _construct(
    constructor: Callable[..., Any],
    network: str,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
) -> nn.Module:
    """Calls `constructor` with what it accepts of `given` and with all of `options`."""
    signature = inspect.signature(constructor)
    names = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    valid = [name for name in names if name not in given]
    for option in options:
        if option in given:
            raise UserError(f"{option} of {network} follows from the run and is not an option")
        if option not in valid and not takes_any:
            known = f"; there are {', '.join(valid)}" if valid else "; it has none"
            raise UserError(f"{network} has no option {option!r}{_nearest(option, valid)}{known}")
    accepted = {name: value for name, value in given.items() if takes_any or name in names}
    try:
        module = constructor(**accepted, **options)
    except TypeError as error:
        raise UserError(f"{network} cannot be built: {_sentence(error)}") from error
    if not isinstance(module, nn.Module):
        raise UserError(f"{network} is a {type(module).__name__}, not a torch.nn.Module")
    return module


def _nearest(word: str, words: Iterable[str]) -> str:
    """A hint at the one of `words` that is spelled most like `word`, or nothing."""
    matches = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _sentence(error: Exception) -> str:
    """The first line of an error's message, with its type."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
