"""Lists of samples to leave out of a manifest: JSON lines of shard, key and reason."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ganscale.errors import UserError
from ganscale.files import write_text


class Exclusion(NamedTuple):
    """A sample to leave out; the key None means the whole shard."""

    shard: str
    key: str | None
    reason: str


def read_exclusions(path: Path) -> list[Exclusion]:
    """The list at `path`. Raises UserError, naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UserError(f"no list of samples to leave out at {path}: {error}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            entry = Exclusion(content["shard"], content["key"], str(content.get("reason", "")))
            if not isinstance(entry.shard, str) or not isinstance(entry.key, str | None):
                raise TypeError(entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path}, line {number}: not {{"shard": NAME, "key": KEY, "reason": TEXT}}, where '
                "the key null means the whole shard"
            ) from error
        entries.append(entry)
    return entries


def write_exclusions(path: Path, entries: Iterable[Exclusion]) -> None:
    """Replaces the list at `path` atomically."""
    write_text(path, "".join(json.dumps(entry._asdict()) + "\n" for entry in entries))
