"""Whether the shards of a manifest are still what was indexed, and all their images decode."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ganscale.data.images.decoding import DecodeError, decode
from ganscale.data.manifest import Manifest
from ganscale.data.remote import objects
from ganscale.errors import UnavailableError, UserError
from ganscale.shards.parallel import run_all
from ganscale.shards.tar_reader import Reader, TarReader


class Findings(NamedTuple):
    """What is wrong with a shard.

    samples: how many it has in the manifest
    problem: why none can be trusted, "" if they can: the shard is missing, cut, or another
    bad: (key, reason) of the images that cannot be decoded
    """

    shard: str
    samples: int
    problem: str
    bad: tuple[tuple[str, str], ...]


class _Task(NamedTuple):
    manifest: Path
    fingerprint: str
    position: int
    address: str
    retry_seconds: float


def verify_shards(
    manifest: Manifest, base: str = "", workers: int = 1, retry_seconds: float = 300.0
) -> Iterator[Findings]:
    """Reads every shard once, whole, and decodes every image; one finding a shard, as they end.

    base: where the shards lie (folder, URL or `pipe:COMMAND {}`), if not where the manifest says
    workers: processes, each with a shard at a time
    """
    base = base or shard_base(manifest)
    tasks = [
        _Task(
            manifest.root,
            manifest.fingerprint,
            position,
            objects.join(base, shard.name),
            retry_seconds,
        )
        for position, shard in enumerate(manifest.shards)
    ]
    for _, findings in run_all(_verify_shard, tasks, workers):
        yield findings


def shard_base(manifest: Manifest) -> str:
    """The folder or URL that the manifest's shards lie in."""
    if objects.is_remote(manifest.location):
        return manifest.location
    return str(manifest.root / manifest.location)


@lru_cache(maxsize=1)
def _manifest(root: Path, fingerprint: str) -> Manifest:
    """Loaded once a process, not once a shard."""
    manifest = Manifest.load(root)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"the manifest in {root} was made anew meanwhile; start again")
    return manifest


def _verify_shard(task: _Task) -> Findings:
    shard = _manifest(task.manifest, task.fingerprint).shards[task.position]
    try:
        if task.address.startswith("pipe:") or objects.is_remote(task.address):
            with objects.open_stream(task.address, task.retry_seconds) as file:
                problem, bad = _verify(file, task)
        else:
            with Path(task.address).open("rb") as file:
                problem, bad = _verify(file, task)
    except FileNotFoundError:
        problem, bad = "is missing", ()
    except (OSError, UserError, UnavailableError) as error:
        problem, bad = f"cannot be read: {error}", ()
    return Findings(shard.name, shard.samples, problem, bad)


def _verify(file: Reader, task: _Task) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The shard's problem, or its bad images."""
    manifest = _manifest(task.manifest, task.fingerprint)
    shard = manifest.shards[task.position]
    first, last = manifest.first_sample[task.position : task.position + 2]
    rows = manifest.samples[first:last]
    expected = dict(zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True))
    bad: list[tuple[str, str]] = []
    digest = hashlib.sha256()
    reader = TarReader(file, "the tar", digest)
    changed = "has changed since it was indexed"
    try:
        for name, offset, size in reader:
            if expected.get(offset) != size:
                continue
            del expected[offset]
            try:
                decode(reader.data(), None, 3)
            except DecodeError as error:
                stem, dot, rest = name.rpartition("/")
                bad.append((stem + dot + rest.partition(".")[0], str(error)))
    except UserError as error:
        return f"{changed}: {error}", ()
    if reader.bytes != shard.bytes:
        return f"{changed}: it has {reader.bytes:,} bytes, not {shard.bytes:,}", ()
    if shard.sha256 and digest.hexdigest() != shard.sha256:
        return f"{changed}: its SHA-256 is {digest.hexdigest()}, not {shard.sha256}", ()
    if expected:
        return f"has no image at byte {min(expected):,}, where the manifest says one is", ()
    return "", tuple(bad)
