"""The indices of other tools: WebDataset's wids, DALI's .idx, img2dataset's counts.

wids: JSON, see wids/wids_index.py in github.com/webdataset/webdataset. DALI: text, written by
tools/wds2idx.py in github.com/NVIDIA/DALI. img2dataset: NNNNN_stats.json beside NNNNN.tar, see the
README of github.com/rom1504/img2dataset.
"""

import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from ganscale.data.manifest import BESIDE, Manifest
from ganscale.data.remote import objects
from ganscale.errors import UserError
from ganscale.files import write_text
from ganscale.shards.tar_reader import BLOCK_BYTES, Member, header_size

WIDS_KIND = "wids-shard-index-v1"


def read_wids(address: str, text: bytes) -> list[tuple[str, int]]:
    """(path or URL, samples) of each shard of the WebDataset index at a path or URL.

    Relative addresses are relative to the index, or to its "base". Raises UserError.
    """
    try:
        content = json.loads(text)
        version = content["wids_version"]
        entries = [(entry["url"], entry["nsamples"]) for entry in content["shardlist"]]
        base = content.get("base")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{address} is not a WebDataset index ({WIDS_KIND}): {error!r}") from error
    if version != 1 or content.get("datasets"):
        raise UserError(f"{address}: only WebDataset indices of version 1 with shards can be read")
    folder = address.rpartition("/")[0] if "/" in address else "."
    if base:
        folder = _resolve(address, folder, base)
    shards: list[tuple[str, int]] = []
    for url, samples in entries:
        if not isinstance(url, str) or type(samples) is not int:
            raise UserError(f"{address}: {url!r} with {samples!r} samples is not a shard")
        shards.append((_resolve(address, folder, url), samples))
    return shards


def write_wids(manifest: Manifest, path: Path, samples: list[int]) -> None:
    """Writes a WebDataset index of `manifest`'s shards, with the number of `samples` in each.

    Shards in the folder of the index get relative addresses, so that both can be moved together.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    root = manifest.root.resolve()
    base = str(root) if manifest.location == BESIDE else manifest.location
    is_beside = manifest.location == BESIDE and path.parent.resolve() == root
    shards: list[dict[str, Any]] = [
        {
            "url": shard.name if is_beside else objects.join(base, shard.name),
            "nsamples": count,
            "filesize": shard.bytes,
        }
        for shard, count in zip(manifest.shards, samples, strict=True)
    ]
    content = {"__kind__": WIDS_KIND, "wids_version": 1, "shardlist": shards}
    write_text(path, json.dumps(content, indent=2) + "\n")


def _resolve(index: str, folder: str, url: str) -> str:
    """The address of `url` in an index, where `url` may be relative to `folder`.

    Raises UserError for a command, and for a local file in an index from a server.
    """
    is_absolute = objects.is_remote(url) or os.path.isabs(url)  # noqa: PTH117
    resolved = url if is_absolute else f"{folder.rstrip('/')}/{url}"
    needs_url = objects.is_remote(resolved) or objects.is_remote(index)
    if needs_url and not objects.is_object_store(resolved):
        raise UserError(f"{index} lists '{url}', which is not a URL that an index may list")
    return resolved


def idx_beside(path: Path) -> Path | None:
    """The .idx that DALI's wds2idx has written for the shard at `path`; None if there is none."""
    stem = path.name[:1] + path.name[1:].partition(".")[0]
    candidates = (path.with_suffix(".idx"), path.with_name(f"{stem}.idx"))
    return next((idx for idx in candidates if idx.is_file()), None)


class IdxReader:
    """A reader of a local shard's members as its .idx lists them, in place of a `TarReader`.

    Only the headers of members whose data is read are checked. Raises UserError for an .idx that
    cannot belong to this tar.
    """

    sha256 = ""

    def __init__(self, descriptor: int, path: Path, idx: Path):
        self.name = str(path)
        self.bytes = os.fstat(descriptor).st_size
        self._descriptor, self._idx = descriptor, idx
        if idx.stat().st_mtime_ns < path.stat().st_mtime_ns:
            raise self._mismatch("it is older than the shard")
        self._members = _idx_members(idx)
        for (name, offset, size), (_, following, _) in pairwise(self._members):
            if offset + size + BLOCK_BYTES > following:
                raise self._mismatch(f"member '{name}' reaches into the next")
        for name, offset, size in self._members:
            if offset < BLOCK_BYTES or offset % BLOCK_BYTES or offset + size > self.bytes:
                raise self._mismatch(
                    f"it puts member '{name}' at bytes {offset:,} to {offset + size:,} of "
                    f"{self.bytes:,}"
                )
        if os.pread(descriptor, 2 * BLOCK_BYTES, self.bytes - 2 * BLOCK_BYTES).strip(b"\0"):
            raise UserError(f"{path}: the tar is cut: the end of the archive is missing")
        self._member: Member = ("", 0, 0)

    def __iter__(self) -> Iterator[Member]:
        for member in self._members:
            self._member = member
            yield member

    def data(self, limit: int | None = None) -> bytes:
        """The current member's bytes, or the first `limit` of them."""
        name, offset, size = self._member
        count = size if limit is None else min(limit, size)
        data = os.pread(self._descriptor, BLOCK_BYTES + count, offset - BLOCK_BYTES)
        if len(data) < BLOCK_BYTES + count or header_size(data[:BLOCK_BYTES]) != size:
            raise self._mismatch(f"no member '{name}' of {size:,} bytes is at byte {offset:,}")
        return data[BLOCK_BYTES:]

    def _mismatch(self, reason: str) -> UserError:
        return UserError(
            f"{self._idx} does not match its shard: {reason}; create it again, or index without "
            "--trust-idx"
        )


def _idx_members(idx: Path) -> list[Member]:
    """The file has the line `v1.2 SAMPLES`, then a line for each sample, with
    `extension offset size name` for each member."""
    first, *lines = idx.read_text(encoding="utf-8", errors="surrogateescape").splitlines() or [""]
    if first != f"v1.2 {len(lines)}":
        raise UserError(
            f"{idx} is not a complete index of DALI's wds2idx, version v1.2; index without "
            "--trust-idx"
        )
    members = []
    for number, line in enumerate(lines, 2):
        words = line.split(" ")
        if len(words) % 4 or not all(word.isdecimal() for word in words[1::4] + words[2::4]):
            raise UserError(
                f"{idx}, line {number}: not `extension offset size name` for each member (names "
                "must not contain spaces); index without --trust-idx"
            )
        members += [
            (name, int(offset), int(size))
            for offset, size, name in zip(words[1::4], words[2::4], words[3::4], strict=True)
        ]
    return members


def check_img2dataset(path: Path, samples: int) -> None:
    """Raises UserError if the local shard has fewer samples than img2dataset counted."""
    stats = path.with_name(f"{path.stem}_stats.json")
    try:
        written = json.loads(stats.read_bytes()).get("successes")
    except (FileNotFoundError, ValueError, AttributeError):
        return
    if type(written) is int and samples < written:
        raise UserError(
            f"{path} has {samples:,} samples, but img2dataset wrote {written:,} ({stats.name}); "
            "download it again, or delete that file if samples were removed on purpose"
        )
