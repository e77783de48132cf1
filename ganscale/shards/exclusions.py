"""Lists of samples that a manifest is to leave out: JSON lines of shard, key and reason."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ganscale.errors import UserError
from ganscale.files import atomic_write


class Exclusion(NamedTuple):
    """A sample that cannot be used; the key None means the whole shard."""

    shard: str
    key: str | None
    reason: str


@dataclass(frozen=True)
class Exclusions:
    """What a list names: whole shards, and keys by shard."""

    samples: tuple[Exclusion, ...] = ()

    def shards(self) -> set[str]:
        """The shards that are left out as a whole."""
        return {sample.shard for sample in self.samples if sample.key is None}

    def keys(self) -> dict[str, frozenset[str]]:
        """The keys to leave out, by shard."""
        keys: dict[str, set[str]] = {}
        for sample in self.samples:
            if sample.key is not None:
                keys.setdefault(sample.shard, set()).add(sample.key)
        return {shard: frozenset(names) for shard, names in keys.items()}


def read_list(path: Path) -> Exclusions:
    """The list at `path`. Raises UserError, naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"no list of samples to leave out at {path}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no list of samples to leave out: it is no text") from error
    samples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            sample = Exclusion(entry["shard"], entry["key"], str(entry.get("reason", "")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            sample = None
            cause = error
        else:
            cause = None
        if (
            sample is None
            or not isinstance(sample.shard, str)
            or not isinstance(sample.key, str | None)
        ):
            raise UserError(
                f'{path}, line {number}: not {{"shard": NAME, "key": KEY, "reason": TEXT}}, with '
                "the key null for a whole shard"
            ) from cause
        samples.append(sample)
    return Exclusions(tuple(samples))


def write_list(path: Path, samples: Iterable[Exclusion]) -> None:
    """Writes the list, whole or not at all."""
    with atomic_write(path) as file:
        for sample in samples:
            file.write((json.dumps(sample._asdict()) + "\n").encode())
