"""Finds the shards that are given as folders, patterns, URLs, lists, or names for a command."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from ganscale.data.missing_manifest import how_to_make_a_data_set
from ganscale.data.remote import objects
from ganscale.data.remote.connections import WEB
from ganscale.errors import UserError
from ganscale.shards.interop import read_wids

RETRY_SECONDS = 300.0
"""How long a failing network is retried."""


@dataclass(frozen=True)
class Listing:
    """Shards with a common base.

    base: a folder, a URL, or `pipe:COMMAND {}`
    names: sorted; relative to the base
    sample_counts: samples by name, where a WebDataset index states them
    """

    base: str
    names: tuple[str, ...]
    sample_counts: dict[str, int] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        return not objects.is_remote(self.base)

    def address(self, name: str) -> str:
        return objects.join(self.base, name)


def list_shards(sources: Sequence[str], names: Sequence[str] = ()) -> Listing:
    """The shards given by `sources`; their base is the longest folder that all share.

    sources: folders (their *.tar), files and URLs (with {000..099} and wildcards), and WebDataset
        indices (*.json); or one `pipe:COMMAND {}`, whose shards are `names` (with {000..099})

    Raises UserError if there are none, or they have no common base.
    """
    if any(source.startswith(objects.PIPE) for source in sources):
        return _list_pipe(sources, names)
    if names:
        raise UserError("--names is only for a pipe:COMMAND {}; give the shards as paths or URLs")
    addresses: list[str] = []
    counts: dict[str, int] = {}
    for source in sources:
        if source.endswith(".json"):
            with open_shard(source) as file:
                listed = dict(read_wids(source, file.read()))
            counts |= listed
            addresses += listed
        else:
            addresses += _expand(source)
    if len(sources) == 1 and Path(sources[0]).is_dir():
        return Listing(sources[0], tuple(sorted(Path(address).name for address in addresses)))
    if len({objects.is_remote(address) for address in addresses}) > 1:
        raise UserError("some of these shards are local, others remote: index them separately")
    queries = {urlsplit(address).query for address in addresses if address.startswith(WEB)}
    if len(queries) > 1:
        raise UserError("the URLs of these shards have different queries after the ?")
    paths = [_path(address) for address in addresses]
    base = _common_folder(paths)
    relative = [path[len(base) :].lstrip("/") for path in paths]
    if base.startswith(WEB):
        # Names are unquoted, as on disk; `objects.join` quotes them again.
        relative = [unquote(name) for name in relative]
        base += "".join(f"?{query}" for query in queries if query)
    sample_counts = {
        name: counts[address]
        for name, address in zip(relative, addresses, strict=True)
        if address in counts
    }
    return Listing(base, _checked(relative), sample_counts)


def _path(address: str) -> str:
    """An address without its query, or an absolute path."""
    if address.startswith(WEB):
        return address.partition("?")[0]
    return address if objects.is_remote(address) else os.path.abspath(address)  # noqa: PTH100


def open_shard(address: str) -> AbstractContextManager[BinaryIO]:
    """A sequential reader of the shard at a path, URL or command. Raises as `open_stream`."""
    if objects.is_remote(address):
        return objects.open_stream(address, RETRY_SECONDS)
    return Path(address).open("rb")


def _expand(source: str) -> list[str]:
    if objects.is_remote(source):
        return objects.expand(source)
    path = Path(source)
    with suppress(PermissionError):  # for a folder above it, which cannot be listed either
        if path.is_dir():
            objects.check_can_list(source)
            shards = [str(shard) for shard in sorted(path.glob("*.tar"))]
            if not shards:
                raise UserError(f"no *.tar in {source}; {how_to_make_a_data_set(source, path)}")
            return shards
        if path.is_file():
            return [source]
    if not any(mark in source for mark in "{*?["):
        raise UserError(f"{source} is neither a folder, nor a shard, nor a pattern of shards")
    return objects.expand(source)


def _list_pipe(sources: Sequence[str], names: Sequence[str]) -> Listing:
    if len(sources) > 1:
        raise UserError("a pipe:COMMAND {} must be the only source, with its shards in --names")
    if not names or "{}" not in sources[0]:
        raise UserError(
            "a pipe needs {} in place of the shard's name, and the names: "
            "'pipe:COMMAND {}' --names 'train-{000..099}.tar'"
        )
    expanded = [name for pattern in names for name in objects.expand_braces(pattern)]
    return Listing(sources[0], _checked(expanded))


def _common_folder(addresses: list[str]) -> str:
    """The longest folder or URL that holds all, without a slash at its end."""
    folders = [address.split("/")[:-1] for address in addresses]
    shared = os.path.commonprefix(folders)  # noqa: RUF071 (compares folders, not characters)
    # The first three parts of `https://host/a` are not folders: without them it is not a URL.
    if len(shared) < (3 if objects.is_remote(addresses[0]) else 1):
        raise UserError(f"{addresses[0]} and {addresses[-1]} have no folder in common")
    return "/".join(shared) or "/"


def _checked(names: list[str]) -> tuple[str, ...]:
    """The names, sorted. Raises UserError for duplicates and for names outside the base."""
    for name in names:
        if {"", ".", ".."} & {*name.split("/")}:
            raise UserError(
                f"'{name}' is not a valid shard name: use relative names without //, . and .."
            )
    if len(set(names)) < len(names):
        raise UserError(f"{len(names) - len(set(names))} of these shards are given twice")
    return tuple(sorted(names))
