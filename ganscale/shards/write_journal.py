"""The journal of `ganscale shards write`, with which an interrupted command continues."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ganscale.errors import UserError
from ganscale.files import write_text

JOURNAL_NAME = "writing.jsonl"


class WrittenShard(NamedTuple):
    """A complete shard.

    bytes: 0 for a shard without any good image, which has no file
    bad_images: (name, reason) of the images that were left out
    """

    shard: str
    bytes: int
    bad_images: list[tuple[str, str]]


class WriteJournal:
    """The settings of a command, then a line for each complete shard in the folder `root`.

    Continues the journal of an earlier run with the same `settings`. Raises UserError if the folder
    holds other shards. Attributes: `shards`, the complete ones by name; `bad_count`, the number of
    their bad images.
    """

    def __init__(self, root: Path, settings: dict[str, Any]):
        self.shards: dict[str, WrittenShard] = {}
        self.bad_count = 0
        self._path = root / JOURNAL_NAME
        if not self._path.exists():
            if any(root.glob("*.tar")):
                raise UserError(f"{root} already contains shards; write into another folder")
            write_text(self._path, json.dumps(settings) + "\n")
            return
        first, *lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        earlier = json.loads(first)
        changed = [name for name in settings if settings[name] != earlier.get(name)]
        if changed:
            raise UserError(
                f"{root} contains the shards of another `ganscale shards write`, with a different "
                f"{', '.join(changed)}; write into another folder, or delete it first"
            )
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # the machine stopped while writing it; the shard is written again
            write_text(self._path, "".join([first, *lines]))
        latest: dict[str, WrittenShard] = {}
        for line in lines:
            name, size, bad_images = json.loads(line)
            latest[name] = WrittenShard(name, size, [(image, why) for image, why in bad_images])
        for shard in latest.values():
            path = root / shard.shard
            if shard.bytes == 0 or (path.exists() and path.stat().st_size == shard.bytes):
                self._remember(shard)

    def add(self, shard: WrittenShard) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(shard) + "\n")
        self._remember(shard)

    @property
    def bad_images(self) -> list[tuple[str, str]]:
        """(name, reason) of all bad images, sorted."""
        return sorted(image for shard in self.shards.values() for image in shard.bad_images)

    def _remember(self, shard: WrittenShard) -> None:
        self.shards[shard.shard] = shard
        self.bad_count += len(shard.bad_images)
