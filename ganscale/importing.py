"""Finds objects by name: one of ours, or the user's as `package.module:Name`."""

import difflib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ganscale.errors import GanscaleError, UserCodeError, UserError, is_out_of_memory

T = TypeVar("T")

_STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
_OURS = Path(__file__).parent


def find(
    target: str, known: Mapping[str, T], kind: str, makes: type, requirement: str = ""
) -> T | Callable[..., Any]:
    """The object called `target` in `known`, or the class or function at that import path that
    makes a `makes`; `kind` and, for a protocol, `requirement` are for messages.

    Raises UserError, with the nearest name, if it does not exist, its import fails, or it is not
    declared to make a `makes`: a config may be a stranger's, so nothing else is ever called.
    """
    if target in known:
        return known[target]
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise UserError(
            f"unknown {kind} {target!r}{nearest(target, known)}; choose from "
            f"{', '.join(known)}, or your own as package.module:Name"
        )
    module = _import(module_name)
    value = getattr(module, name, None)
    if value is None:
        public = [other for other in vars(module) if not other.startswith("_")]
        raise UserError(f"module {module_name} has no {name}{nearest(name, public)}")
    if not _is_declared_to_make(makes, value):
        name = makes.__name__
        requirement = requirement or (
            f"a subclass of {name}, or a function annotated to return one (`-> {name}`)"
        )
        raise UserError(f"{target} is not a {kind}: it must be {requirement}")
    return value


def check_options(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    what: str,
    run_options: Mapping[str, Any] = {},
) -> None:
    """Raises UserError for one of `options` that `function` does not have, with the nearest name,
    or that is one of `run_options`."""
    names, accepts_any = _parameters(function)
    valid = [name for name in names if name not in run_options]
    for option in options:
        if option in run_options:
            raise UserError(f"{option} of {what} follows from the run and is not an option")
        if option not in valid and not accepts_any:
            hint = f"; choose from {', '.join(valid)}" if valid else "; it has no options"
            raise UserError(f"{what} has no option {option!r}{nearest(option, valid)}{hint}")


def call(
    function: Callable[..., T],
    options: Mapping[str, Any],
    what: str,
    run_options: Mapping[str, Any] = {},
) -> T:
    """Calls `function` with all of `options`, and those of `run_options` that it accepts. Raises
    UserError for an option that it does not have, with the nearest name, or cannot use."""
    check_options(function, options, what, run_options)
    names, accepts_any = _parameters(function)
    accepted = {key: value for key, value in run_options.items() if accepts_any or key in names}
    try:
        return function(**accepted, **options)
    except GanscaleError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserCodeError(f"{what} cannot be built: {describe(error)}") from error


def _parameters(function: Callable[..., Any]) -> tuple[list[str], bool]:
    """The names of its parameters, and whether it takes any others."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint at the one of `words` that is spelled most like `word`, or ""."""
    matches = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _is_declared_to_make(makes: type, value: Any) -> bool:
    """Whether `value` is a subclass of `makes` or a function annotated to return one."""
    if inspect.isfunction(value):
        function = inspect.unwrap(value)
        value = function.__annotations__.get("return")
        if isinstance(value, str):  # from __future__ import annotations
            first, *rest = value.split(".")
            value = function.__globals__.get(first)
            for name in rest:
                value = getattr(value, name, None)
    return isinstance(value, type) and issubclass(value, makes)


def describe(error: Exception) -> str:
    """`TypeError: message (nets.py:12)`: the error's type, the first line of its message and the
    innermost line of the user's own code that it went through, if any."""
    message = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    place = users_line(traceback.extract_tb(error.__traceback__))
    return message if place is None else f"{message} ({place})"


def users_line(frames: Iterable[traceback.FrameSummary]) -> str | None:
    """`file:line` of the last of `frames` that is in the user's own code; if there is none, of the
    last in an installed package other than torch."""
    own, installed = [], []
    for frame in frames:
        path = Path(frame.filename)
        is_installed = "site-packages" in path.parts
        is_standard = path.is_relative_to(_STANDARD_LIBRARY) and not is_installed
        if path.is_absolute() and not is_standard and not path.is_relative_to(_OURS):
            if not is_installed:
                own.append(f"{path}:{frame.lineno}")
            elif "torch" not in path.parts:
                installed.append(f"{path}:{frame.lineno}")
    return next(iter([*own[-1:], *installed[-1:]]), None)


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
                f"no module {missing} in the current folder {os.getcwd()} or among the installed "
                f"packages (for {name})"
            ) from error
        raise UserError(f"module {name} needs {missing}, which is not installed") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = users_line(frames) or f"{frames[-1].filename}:{frames[-1].lineno}"
        message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserCodeError(f"module {name} fails on import: {message} ({place})") from error
