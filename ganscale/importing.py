"""Things by name: one of ours, or the user's own as `package.module:Name`."""

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

from ganscale.errors import UserError

T = TypeVar("T")


def find(target: str, known: Mapping[str, T], kind: str) -> T | Callable[..., Any]:
    """What `target` names among `known`, or by import path; `kind` is the word for messages.

    Raises UserError, with the nearest name, for what is not there or fails on import.
    """
    if target in known:
        return known[target]
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise UserError(
            f"there is no {kind} called {target!r}{nearest(target, known)}; there are "
            f"{', '.join(known)}, and your own as package.module:Name"
        )
    module = _import(module_name)
    found = getattr(module, name, None)
    if found is None:
        public = [other for other in vars(module) if not other.startswith("_")]
        raise UserError(f"module {module_name} has no {name}{nearest(name, public)}")
    if not callable(found):
        raise UserError(f"{target} is a {type(found).__name__}, not a {kind}")
    return found


def call(
    function: Callable[..., T],
    options: Mapping[str, Any],
    what: str,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> T:
    """Calls `function` with all of `options`, and with what it accepts of `given`.

    Raises UserError for an option that it does not have, naming the nearest, or does not take.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    valid = [name for name in names if name not in given]
    for option in options:
        if option in given:
            raise UserError(f"{option} of {what} follows from the run and is not an option")
        if option not in valid and not takes_any:
            listed = f"; there are {', '.join(valid)}" if valid else "; it has none"
            raise UserError(f"{what} has no option {option!r}{nearest(option, valid)}{listed}")
    accepted = {name: value for name, value in given.items() if takes_any or name in names}
    try:
        return function(**accepted, **options)
    except TypeError as error:
        raise UserError(f"{what} cannot be built: {_sentence(error)}") from error


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint at the one of `words` that is spelled most like `word`, or nothing."""
    matches = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _sentence(error: Exception) -> str:
    """The first line of an error's message, with its type."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


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
