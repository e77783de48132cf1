"""How the command line is read, for all commands."""

import argparse
import math
from collections.abc import Sequence
from typing import Any

from ganscale.importing import nearest
from ganscale.resolution import Resolution, as_resolution


class CommandParser(argparse.ArgumentParser):
    """Takes settings before and after options, and rejects an unknown option with the usage of its
    own command and the nearest option."""

    def __init__(self, **settings: Any) -> None:
        # An abbreviation would change its meaning with the next option.
        super().__init__(**{"allow_abbrev": False, **settings})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = None if action.choices is None else [*map(str, action.choices)]
        if choices is not None and str(value) not in choices:
            hint = nearest(str(value), choices) or f" (choose from {', '.join(choices)})"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint}")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        parsed, rest = super().parse_known_args(args, namespace)
        has_settings = "settings" in parsed
        for argument in rest:
            if argument.startswith("-") or not has_settings:
                option = argument.partition("=")[0]
                hint = nearest(option, self._option_string_actions)
                if has_settings and not hint:
                    hint = " (settings have no dashes: key=value)"
                kind = "option" if option.startswith("-") else "argument"
                self.error(f"unknown {kind} {option}{hint}")
            parsed.settings.append(argument)
        return parsed, []


TRUNCATION = "truncation psi of StyleGAN: 1 (default) changes nothing, 0 gives the mean image"
ALLOW_CHANGED_CODE = "use the weights although the network's code has changed since"


def natural_int(text: str) -> int:
    """The integer in `text`. Raises ArgumentTypeError if it is below 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def finite_float(text: str) -> float:
    """The number in `text`. Raises ArgumentTypeError for NaN and infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{value} is not finite")
    return value


def positive_float(text: str) -> float:
    """The number in `text`. Raises ArgumentTypeError unless it is finite and above 0."""
    value = finite_float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def resolution(text: str) -> Resolution:
    """The size in `text`: 64, or 64x128, the height first. Raises ArgumentTypeError if a side is
    below 1 or there are more than two."""
    sides = [positive_int(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size, such as 64 or 64x128")
    return as_resolution(sides[0], sides[-1])


def positive_int(text: str) -> int:
    """The integer in `text`. Raises ArgumentTypeError if it is below 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
