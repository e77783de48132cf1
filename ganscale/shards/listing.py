"""Which shards a command means: folders, patterns, URLs, lists, or names behind a command."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ganscale.data.remote import objects
from ganscale.errors import UserError
from ganscale.shards.foreign_indices import read_wids

_PIPE = "pipe:"
_WEB = ("http://", "https://")


@dataclass(frozen=True)
class Listing:
    """Shards of one place.

    base: a folder, a URL, or `pipe:COMMAND {}`
    names: sorted; relative to the base
    counts: samples by name, where a WebDataset index states them
    """

    base: str
    names: tuple[str, ...]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Whether the shards are files of this machine."""
        return not self.base.startswith(_PIPE) and not objects.is_remote(self.base)

    def address(self, name: str) -> str:
        """What to open for a shard."""
        if self.is_local:
            return str(Path(self.base, name))
        return objects.join(self.base, name)


def list_shards(
    sources: Sequence[str], names: Sequence[str] = (), retry_seconds: float = 0
) -> Listing:
    """The shards that `sources` mean, with the longest folder that all share as their base.

    sources: folders (their *.tar), files and URLs (with {000..099} and wildcards), and WebDataset
        indices (*.json); or one `pipe:COMMAND {}`, whose shards are `names` (with {000..099})

    Raises UserError where there are none, or they share no place.
    """
    if any(source.startswith(_PIPE) for source in sources):
        return _list_pipe(sources, names)
    if names:
        raise UserError("--names is for the shards of a pipe:COMMAND {}; give their path or URL")
    addresses: list[str] = []
    counts: dict[str, int] = {}
    for source in sources:
        if source.endswith(".json"):
            counts |= dict(read_wids(source, retry_seconds))
            addresses += counts
        else:
            addresses += _expand(source)
    if len(sources) == 1 and Path(sources[0]).is_dir():
        return Listing(sources[0], tuple(sorted(Path(address).name for address in addresses)))
    is_remote = {objects.is_remote(address) for address in addresses}
    if len(is_remote) > 1:
        raise UserError("some of these shards are local, others remote: index one place at a time")
    if is_remote == {False}:
        clean = {address: os.path.abspath(address) for address in addresses}  # noqa: PTH100
    else:
        clean = {address: address for address in addresses}
    queries = {urlsplit(address).query for address in addresses if address.startswith(_WEB)}
    if len(queries) > 1:
        raise UserError("the URLs of these shards have different signatures behind their ?")
    query = queries.pop() if queries else ""
    if query:
        clean = {address: address.partition("?")[0] for address in addresses}
    base = _common_folder(list(clean.values()))
    names_of = {address: clean[address][len(base) :].lstrip("/") for address in addresses}
    if base.startswith(_WEB):
        # A name is what a path on disk would be; joining quotes it again.
        names_of = {address: unquote(name) for address, name in names_of.items()}
        base += f"?{query}" if query else ""
    by_name = {name: address for address, name in names_of.items()}
    if len(by_name) < len(addresses):
        raise UserError(f"{len(addresses) - len(by_name)} of these shards are named twice")
    for name in by_name:
        _refuse_unclean(name)
    return Listing(
        base,
        tuple(sorted(by_name)),
        {name: counts[address] for name, address in by_name.items() if address in counts},
    )


def _expand(source: str) -> list[str]:
    if objects.is_remote(source):
        return objects.expand(source)
    path = Path(source)
    if path.is_dir():
        found = [str(shard) for shard in sorted(path.glob("*.tar"))]
        if not found:
            raise UserError(f"no *.tar in {source}")
        return found
    if path.is_file():
        return [source]
    if not any(mark in source for mark in "{*?["):
        raise UserError(f"no folder, shard or pattern of shards at {source}")
    found = list(objects.expand(source))
    if not found:
        raise UserError(f"no shards fit {source}")
    return found


def _list_pipe(sources: Sequence[str], names: Sequence[str]) -> Listing:
    if len(sources) > 1:
        raise UserError("a pipe:COMMAND {} stands alone, with its shards in --names")
    if not names or "{}" not in sources[0]:
        raise UserError(
            "a pipe needs a place for the shard's name and the names: "
            "'pipe:COMMAND {}' --names 'train-{000..099}.tar'"
        )
    expanded = [name for pattern in names for name in objects.expand_braces(pattern)]
    for name in expanded:
        _refuse_unclean(name)
    if len(set(expanded)) < len(expanded):
        raise UserError("--names has a shard twice")
    return Listing(sources[0], tuple(sorted(expanded)))


def _common_folder(addresses: list[str]) -> str:
    """The longest folder or URL that holds all, without a slash at its end."""
    folders = [address.split("/")[:-1] for address in addresses]
    # All lists lie between the smallest and the largest: what these share, all share.
    pairs = zip(min(folders), max(folders), strict=False)
    shared = [part for part, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    # Of `https://host/a` the first three parts are no folders: without them it is no URL.
    if len(shared) < (3 if objects.is_remote(addresses[0]) else 1):
        raise UserError(f"{addresses[0]} and {addresses[-1]} lie in no common place")
    return "/".join(shared) or "/"


def _refuse_unclean(name: str) -> None:
    if not name or name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"'{name}' is no name for a shard: it is to be relative and without ..")
