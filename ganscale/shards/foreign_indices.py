"""What other tools know of shards: WebDataset's index, DALI's .idx, img2dataset's counts.

wids index: JSON, github.com/webdataset/webdataset, wids/wids_index.py. DALI: text, written by
github.com/NVIDIA/DALI, tools/wds2idx.py. img2dataset: NNNNN_stats.json beside NNNNN.tar,
github.com/rom1504/img2dataset, README.
"""

import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from ganscale.data.manifest import Manifest
from ganscale.data.remote import objects
from ganscale.errors import UserError
from ganscale.files import atomic_write
from ganscale.shards.tar_reader import BLOCK_BYTES, Member, header_size

WIDS_KIND = "wids-shard-index-v1"


def read_wids(address: str, retry_seconds: float) -> list[tuple[str, int]]:
    """(path or URL, samples) of each shard of a WebDataset index, a local file or a URL.

    Relative addresses are relative to the index, or to its "base". Raises UserError.
    """
    if objects.is_remote(address):
        text = objects.read_bytes(address, retry_seconds)
    else:
        text = Path(address).read_bytes()
    try:
        content = json.loads(text)
        version = content["wids_version"]
        entries = [(entry["url"], entry["nsamples"]) for entry in content["shardlist"]]
        base = content.get("base")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{address} is no WebDataset index ({WIDS_KIND}): {error!r}") from error
    if version != 1 or content.get("datasets"):
        raise UserError(f"{address}: only a WebDataset index of version 1, of shards, can be read")
    folder = address.rpartition("/")[0] if "/" in address else "."
    if base:
        folder = _resolve(address, folder, base)
    shards = []
    for url, samples in entries:
        if not isinstance(url, str) or type(samples) is not int:
            raise UserError(f"{address}: {url!r} with {samples!r} samples is no shard")
        shards.append((_resolve(address, folder, url), samples))
    return shards


def write_wids(manifest: Manifest, path: Path, samples: list[int]) -> None:
    """Writes a WebDataset index of `manifest`'s shards, with so many `samples` in each.

    Shards beside the index have relative addresses, so that both can be moved together.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_beside = manifest.location == "." and path.parent.resolve() == manifest.root.resolve()
    base = str(manifest.root.resolve()) if manifest.location == "." else manifest.location
    shards: list[dict[str, Any]] = [
        {
            "url": shard.name if is_beside else objects.join(base, shard.name),
            "nsamples": count,
            "filesize": shard.bytes,
        }
        for shard, count in zip(manifest.shards, samples, strict=True)
    ]
    content = {"__kind__": WIDS_KIND, "wids_version": 1, "shardlist": shards}
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _resolve(index: str, folder: str, url: str) -> str:
    """The address of `url`, which an index names, relative to `folder`.

    Raises UserError for a command, and for a file of this machine that a server names.
    """
    is_absolute = objects.is_remote(url) or os.path.isabs(url)  # noqa: PTH117
    resolved = url if is_absolute else f"{folder.rstrip('/')}/{url}"
    needs_url = objects.is_remote(resolved) or objects.is_remote(index)
    if needs_url and not objects.is_object_store(resolved):
        raise UserError(f"{index} names '{url}', which is no URL that an index may name")
    return resolved


def idx_beside(path: Path) -> Path | None:
    """DALI's .idx of the shard at `path`, where wds2idx writes it; None without one."""
    stem = path.name[:1] + path.name[1:].partition(".")[0]
    candidates = (path.with_suffix(".idx"), path.with_name(f"{stem}.idx"))
    return next((idx for idx in candidates if idx.is_file()), None)


class IdxReader:
    """The members of a local shard as its .idx lists them; a `TarReader` that trusts.

    Only the header in front of a member that is asked for is checked. Raises UserError for an .idx
    that cannot be that of this tar.
    """

    def __init__(self, descriptor: int, path: Path, idx: Path):
        self.name = str(path)
        self.bytes = os.fstat(descriptor).st_size
        self._descriptor, self._idx = descriptor, idx
        if idx.stat().st_mtime_ns < path.stat().st_mtime_ns:
            raise self._unfit("it is older than the shard")
        self._members = _idx_members(idx)
        for (name, offset, size), (_, following, _) in pairwise(self._members):
            if offset + size + BLOCK_BYTES > following:
                raise self._unfit(f"member '{name}' reaches into the next")
        for name, offset, size in self._members:
            if offset < BLOCK_BYTES or offset % BLOCK_BYTES or offset + size > self.bytes:
                raise self._unfit(
                    f"member '{name}' is said to lie from byte {offset:,} to {offset + size:,}, "
                    f"of {self.bytes:,}"
                )
        if os.pread(descriptor, 2 * BLOCK_BYTES, self.bytes - 2 * BLOCK_BYTES).strip(b"\0"):
            raise UserError(f"{path}: the tar is cut: it has no end of archive")
        self._member: Member = ("", 0, 0)

    def __iter__(self) -> Iterator[Member]:
        for member in self._members:
            self._member = member
            yield member

    def data(self, limit: int | None = None) -> bytes:
        """The member that iteration has reached, or its first `limit` bytes."""
        name, offset, size = self._member
        wanted = size if limit is None else min(limit, size)
        found = os.pread(self._descriptor, BLOCK_BYTES + wanted, offset - BLOCK_BYTES)
        if len(found) < BLOCK_BYTES + wanted or header_size(found[:BLOCK_BYTES]) != size:
            raise self._unfit(f"no member '{name}' of {size:,} bytes lies at byte {offset:,}")
        return found[BLOCK_BYTES:]

    def _unfit(self, reason: str) -> UserError:
        return UserError(
            f"{self._idx} does not fit its shard: {reason}; make it anew, or index without "
            "--trust-idx"
        )


def _idx_members(idx: Path) -> list[Member]:
    """A line a sample, of `extension offset size name` a member, under `v1.2 SAMPLES`."""
    lines = idx.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    first = re.fullmatch(r"v1\.2 (\d+)", lines[0]) if lines else None
    if first is None or int(first[1]) != len(lines) - 1:
        raise UserError(
            f"{idx} is no index of DALI's wds2idx, version v1.2, or not whole; index without "
            "--trust-idx"
        )
    members = []
    for number, line in enumerate(lines[1:], 2):
        words = line.split(" ")
        if len(words) % 4 or not all(word.isdecimal() for word in words[1::4] + words[2::4]):
            raise UserError(
                f"{idx}, line {number}: not `extension offset size name` a member (a name with a "
                "space cannot be told apart); index without --trust-idx"
            )
        members += [
            (name, int(offset), int(size))
            for offset, size, name in zip(words[1::4], words[2::4], words[3::4], strict=True)
        ]
    return members


def check_img2dataset(path: Path, samples: int) -> None:
    """Raises UserError if the local shard has fewer samples than img2dataset says it wrote."""
    stats = path.with_name(f"{path.stem}_stats.json")
    try:
        written = json.loads(stats.read_bytes()).get("successes")
    except (FileNotFoundError, ValueError, AttributeError):
        return
    if type(written) is int and samples < written:
        raise UserError(
            f"{path} has {samples:,} samples, but img2dataset wrote {written:,} ({stats.name}); "
            "download it anew, or delete that file if samples were taken out on purpose"
        )
