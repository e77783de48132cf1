"""Checks that shards still match their manifest, and that all their images can be decoded."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ganscale.data.images.decoding import DecodeError, decode
from ganscale.data.manifest import Manifest
from ganscale.data.remote import objects
from ganscale.errors import UnavailableError, UserError
from ganscale.shards.listing import open_shard
from ganscale.shards.parallel import run_all
from ganscale.shards.tar_reader import Reader, TarReader


class VerifyResult(NamedTuple):
    """The result for one shard.

    samples: how many it has in the manifest
    problem: why the shard as a whole is bad (missing, cut or changed), else ""
    bad: (key, reason) of the images that cannot be decoded
    """

    shard: str
    samples: int
    problem: str = ""
    bad: tuple[tuple[str, str], ...] = ()


class _Task(NamedTuple):
    manifest: Path
    fingerprint: str
    position: int
    address: str


def verify_shards(manifest: Manifest, base: str = "", workers: int = 1) -> list[VerifyResult]:
    """Reads every shard once and decodes every image; returns the results sorted by shard.

    base: the folder, URL or `pipe:COMMAND {}` of the shards, if not that of the manifest
    workers: processes, each with one shard at a time
    """
    tasks = []
    for position, shard in enumerate(manifest.shards):
        address = objects.join(base, shard.name) if base else manifest.address(position)
        tasks.append(_Task(manifest.root, manifest.fingerprint, position, address))
    results = []
    # disable=None: only on a terminal
    with tqdm(total=len(manifest.samples), unit=" images", disable=None) as progress:
        for _, result in run_all(_verify_shard, tasks, workers):
            progress.update(result.samples)
            results.append(result)
    return sorted(results)


@lru_cache(maxsize=1)  # loaded once per process, not once per shard
def _load_manifest(root: Path, fingerprint: str) -> Manifest:
    manifest = Manifest.load(root)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"the manifest in {root} was replaced meanwhile; start again")
    return manifest


def _verify_shard(task: _Task) -> VerifyResult:
    manifest = _load_manifest(task.manifest, task.fingerprint)
    shard = manifest.shards[task.position]
    bad: tuple[tuple[str, str], ...] = ()
    try:
        with open_shard(task.address) as file:
            problem, bad = _verify(file, manifest, task.position)
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, UserError, UnavailableError) as error:
        problem = f"cannot be read: {error}"
    return VerifyResult(shard.name, shard.samples, problem, bad)


def _verify(
    file: Reader, manifest: Manifest, position: int
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The shard's problem, or its bad images."""
    shard = manifest.shards[position]
    first, last = manifest.first_sample[position : position + 2]
    rows = manifest.samples[first:last]
    expected = dict(zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True))
    bad: list[tuple[str, str]] = []
    reader = TarReader(file, "the tar", with_sha256=True)
    changed = "has changed since it was indexed"
    try:
        for name, offset, size in reader:
            if expected.get(offset) != size:
                continue
            del expected[offset]
            try:
                decode(reader.data(), None, 3)
            except DecodeError as error:
                folder, slash, base = name.rpartition("/")
                bad.append((folder + slash + base.partition(".")[0], str(error)))
    except UserError as error:
        return f"{changed}: {error}", ()
    if reader.bytes != shard.bytes:
        return f"{changed}: it has {reader.bytes:,} bytes, not {shard.bytes:,}", ()
    if shard.sha256 not in ("", reader.sha256):
        return f"{changed}: its SHA-256 is {reader.sha256}, not {shard.sha256}", ()
    if expected:
        return f"has no image at byte {min(expected):,}, where the manifest lists one", ()
    return "", tuple(bad)
