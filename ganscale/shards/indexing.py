"""Makes the manifest of many shards, reading only those that are new or have changed."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ganscale.data.manifest import BESIDE, Manifest, Shard
from ganscale.data.remote import objects
from ganscale.errors import UnavailableError, UserError
from ganscale.shards.exclusions import Exclusion, write_exclusions
from ganscale.shards.index_cache import IndexCache, options_digest, save_shard, stamp_of
from ganscale.shards.interop import IdxReader, check_img2dataset, idx_beside
from ganscale.shards.listing import DEFAULT_RETRY_SECONDS, Listing, list_shards, open_shard
from ganscale.shards.manifest_writer import write_manifest
from ganscale.shards.parallel import explain_full_disk, run_all
from ganscale.shards.shard_index import ShardIndex, index_members, read_index

BAD_NAME = "bad.jsonl"
"""The list of bad samples beside the manifest, for `read_exclusions`."""

_MAX_NAMED = 5
_STAT_THREADS = 32


class IndexResult(NamedTuple):
    """The result of `index_shards`.

    manifest: None when only a part of the shards was indexed
    listing: the shards that were asked for
    read, kept: how many shards were read, and were unchanged since an earlier call
    excluded_samples, excluded_shards: how many were left out
    restored_samples: samples that an earlier call had left out
    """

    manifest: Manifest | None
    listing: Listing
    read: int
    kept: int
    excluded_samples: int
    excluded_shards: int
    restored_samples: int = 0


class _Task(NamedTuple):
    name: str
    address: str
    is_local: bool
    output: Path
    excluded_keys: frozenset[str]
    expected_samples: int | None
    trust_idx: bool
    retry_seconds: float

    @property
    def idx(self) -> Path | None:
        return idx_beside(Path(self.address)) if self.trust_idx and self.is_local else None

    @property
    def options(self) -> str:
        return options_digest(self.excluded_keys, self.idx is not None)


class _Failure(NamedTuple):
    """Why a shard has no index.

    bad: (key, reason) of its bad samples; empty if the shard as a whole is bad
    is_unavailable: a network or disk failed, so the shard may be good
    """

    problem: str
    bad: tuple[tuple[str, str], ...] = ()
    is_unavailable: bool = False


def build_manifest(folder: Path | str, workers: int = 1) -> Manifest:
    """Indexes all *.tar of `folder` with `workers` processes and writes their manifest there.

    Raises as `index_shards`.
    """
    if not Path(folder).is_dir():
        raise UserError(f"no folder at {folder}")
    manifest = index_shards([str(folder)], workers=workers).manifest
    assert manifest is not None
    return manifest


def index_shards(
    sources: Sequence[str],
    output: Path | None = None,
    *,
    names: Sequence[str] = (),
    workers: int = 1,
    again: bool = False,
    exclusions: Sequence[Exclusion] = (),
    trust_idx: bool = False,
    part: tuple[int, int] | None = None,
    retry_seconds: float = DEFAULT_RETRY_SECONDS,
) -> IndexResult:
    """Indexes the shards given by `sources` and `names` (see `listing.list_shards`).

    The manifest is written to `output`, by default the folder of local shards. Class names are
    taken from `classes.json` in that folder, if it exists. Shards that were indexed before and have
    not changed (see `index_cache`) are not read, unless `again` is set. The result depends neither
    on them nor on the number of `workers`.

    exclusions: samples and shards to leave out of the manifest
    trust_idx: take offsets from DALI's .idx beside a local shard; the shard is then not read whole
        and has no checksum
    part: (i, n): only index the i-th of n parts, counted from 0, and write no manifest; a last call
        without `part` combines all parts in `output`
    retry_seconds: how long a failing network is retried

    Raises UserError for shards that are missing, bad, or do not go together (after reading all of
    them, with a list of bad samples in BAD_NAME), and UnavailableError.
    """
    listing = list_shards(sources, names, retry_seconds)
    output = output or _default_output(listing)
    tasks = _plan(listing, output, exclusions, trust_idx, retry_seconds)
    excluded_shards = len(listing.names) - len(tasks)
    if part is not None:
        tasks = tasks[part[0] :: part[1]]
    cache = IndexCache(output)
    todo = tasks if again else _outdated(tasks, cache, listing.is_local)
    kept = len(tasks) - len(todo)
    with explain_full_disk(output):
        output.mkdir(parents=True, exist_ok=True)
        failures = _index_all(todo, len(tasks), workers)
        if failures:
            # Parts run at the same time, so only the last call writes the list of bad samples.
            list_path = output / BAD_NAME if part is None else None
            raise _failure_error(failures, len(tasks), exclusions, list_path)
        if part is not None:
            return IndexResult(None, listing, len(todo), kept, 0, excluded_shards)
        included = [task.name for task in tasks]
        excluded_before = sum(map(cache.excluded, included))
        excluded = write_manifest(output, _location(listing, output), included, cache)
    restored = max(0, excluded_before - excluded)
    manifest = Manifest.load(output)
    return IndexResult(manifest, listing, len(todo), kept, excluded, excluded_shards, restored)


def _plan(
    listing: Listing,
    output: Path,
    exclusions: Sequence[Exclusion],
    trust_idx: bool,
    retry_seconds: float,
) -> list[_Task]:
    """A task for each shard that is not excluded."""
    excluded_shards = {exclusion.shard for exclusion in exclusions if exclusion.key is None}
    excluded_keys: dict[str, set[str]] = {}
    for shard, key, _ in exclusions:
        if key is not None:
            excluded_keys.setdefault(shard, set()).add(key)
    return [
        _Task(
            name,
            listing.address(name),
            listing.is_local,
            output,
            frozenset(excluded_keys.get(name, ())),
            listing.sample_counts.get(name),
            trust_idx,
            retry_seconds,
        )
        for name in listing.names
        if name not in excluded_shards
    ]


def _default_output(listing: Listing) -> Path:
    if not listing.is_local:
        raise UserError(
            f"the shards of {objects.shown(listing.base)} are not on this machine: choose a folder "
            "for the manifest with --output FOLDER"
        )
    return Path(listing.base)


def _location(listing: Listing, output: Path) -> str:
    """The location in the manifest: without a command, which must not run because someone loaded a
    manifest, and without passwords and signatures."""
    if listing.base.startswith(objects.PIPE):
        return BESIDE
    if not listing.is_local:
        return objects.shown(listing.base)
    is_beside = Path(listing.base).resolve() == output.resolve()
    return BESIDE if is_beside else os.path.abspath(listing.base)  # noqa: PTH100


def _outdated(tasks: list[_Task], cache: IndexCache, is_local: bool) -> list[_Task]:
    """The tasks whose shard is new or has changed."""

    def is_current(task: _Task) -> bool:
        try:
            return cache.has_current(task.name, stamp_of(task.address), task.options)
        except UserError:
            return False  # a missing shard: reading it will report that

    with ThreadPoolExecutor(1 if is_local else _STAT_THREADS) as threads:
        flags = list(threads.map(is_current, tasks))
    return [task for task, is_done in zip(tasks, flags, strict=True) if not is_done]


def _index_all(todo: list[_Task], total: int, workers: int) -> dict[str, _Failure]:
    """Reads all shards and returns the failures by shard."""
    failures = {}
    # disable=None: only on a terminal
    with tqdm(total=total, initial=total - len(todo), unit=" shards", disable=None) as progress:
        for task, failure in run_all(_index_one, todo, workers):
            progress.update()
            if failure is not None:
                failures[task.name] = failure
    return failures


def _failure_error(
    failures: dict[str, _Failure],
    total: int,
    exclusions: Sequence[Exclusion],
    list_path: Path | None,
) -> UserError | UnavailableError:
    """The error for all failures; what can be left out is added to a list at `list_path`."""
    ordered = sorted(failures.items())
    message = "; ".join(failure.problem for _, failure in ordered[:_MAX_NAMED])
    if len(ordered) > 1:
        message = f"{len(ordered)} of {total:,} shards are bad: {message}"
    if len(ordered) > _MAX_NAMED:
        message += f"; and {len(ordered) - _MAX_NAMED} more"
    bad = []
    for shard, failure in ordered:
        bad += [Exclusion(shard, key, reason) for key, reason in sorted(failure.bad)]
        if not failure.bad and not failure.is_unavailable:
            bad.append(Exclusion(shard, None, failure.problem))
    if bad and list_path is not None:
        write_exclusions(list_path, [*exclusions, *bad])
        message += f" (to index the rest: --leave-out {list_path})"
    if all(failure.is_unavailable for failure in failures.values()):
        return UnavailableError(message)
    return UserError(message)


def _index_one(task: _Task) -> _Failure | None:
    """Reads one shard and saves its index, or returns why that failed."""
    try:
        stamp = stamp_of(task.address)
        index = _read(task)
        if task.is_local and stamp_of(task.address) != stamp:
            raise UserError(f"{task.address} changed while it was read")
        samples = len(index.rows) + index.excluded + len(index.bad)
        if task.expected_samples is not None and samples != task.expected_samples:
            raise UserError(
                f"{objects.shown(task.address)} has {samples:,} samples, but the WebDataset index "
                f"lists it with {task.expected_samples:,}"
            )
        if task.is_local:
            check_img2dataset(Path(task.address), samples)
    except UserError as error:
        return _Failure(str(error))
    except UnavailableError as error:
        return _Failure(str(error), is_unavailable=True)
    except OSError as error:
        return _Failure(f"{task.address} cannot be read: {error.strerror or error}")
    if index.bad:
        others = len(index.bad) - 1
        more = f" (and {others} more bad samples)" if others else ""
        return _Failure(f"{objects.shown(task.address)}: {index.bad[0][1]}{more}", index.bad)
    save_shard(task.output, index, stamp, task.options)
    return None


def _read(task: _Task) -> ShardIndex:
    idx = task.idx
    with open_shard(task.address, task.retry_seconds) as file:
        if idx is None:
            return read_index(file, task.name, objects.shown(task.address), task.excluded_keys)
        reader = IdxReader(file.fileno(), Path(task.address), idx)
        index = index_members(reader, task.excluded_keys, with_image_sizes=False)
    return replace(index, shard=Shard(task.name, reader.bytes, "", len(index.rows)))
