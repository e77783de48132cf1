"""Makes the manifest of many shards, reading only those that are new or have changed."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ganscale.data.manifest import BESIDE, Manifest
from ganscale.data.remote import objects
from ganscale.errors import UnavailableError, UserError
from ganscale.shards.class_labels import USUAL_MEMBERS, MemberChoice
from ganscale.shards.exclusions import Exclusion, write_exclusions
from ganscale.shards.index_cache import IndexCache, save_shard, stamp_of, text_digest
from ganscale.shards.interop import IdxReader, check_img2dataset, idx_beside
from ganscale.shards.listing import Listing, list_shards, open_shard
from ganscale.shards.parallel import explain_full_disk, run_all
from ganscale.shards.shard_index import ShardIndex, read_index
from ganscale.shards.tar_reader import TarReader

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
    json_keys: what JSON of the first sample has, where no class was found
    """

    manifest: Manifest | None
    listing: Listing
    read: int
    kept: int
    excluded_samples: int
    excluded_shards: int
    restored_samples: int = 0
    json_keys: tuple[str, ...] = ()


class _Task(NamedTuple):
    name: str
    address: str
    output: Path
    excluded_keys: frozenset[str]
    choice: MemberChoice
    expected_samples: int | None
    idx: Path | None

    @property
    def is_local(self) -> bool:
        return not objects.is_remote(self.address)

    @property
    def options(self) -> str:
        """A digest of the options that change the rows of the shard."""
        options = [sorted(self.excluded_keys), self.idx is not None, self.choice]
        return text_digest(json.dumps(options))


class _Failure(NamedTuple):
    """Why a shard has no index.

    bad: (key, reason) of its bad samples; empty if the shard as a whole is bad
    is_unavailable: a network or disk failed, so the shard may be good
    """

    problem: str
    bad: tuple[tuple[str, str], ...] = ()
    is_unavailable: bool = False


def build_manifest(folder: Path | str, workers: int = 1) -> Manifest:
    """Indexes all *.tar of `folder` and writes their manifest there. Raises as `index_shards`."""
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
    choice: MemberChoice = USUAL_MEMBERS,
    trust_idx: bool = False,
    part: tuple[int, int] | None = None,
) -> IndexResult:
    """Indexes the shards given by `sources` and `names` (see `listing.list_shards`).

    The manifest is written to `output`, by default the folder of local shards, with the class names
    of a `classes.json` in that folder; where labels are names, that file has or gets their numbers.
    Unchanged shards of an earlier call (see `index_cache`) are
    not read, unless `again` is set. Neither they nor the number of `workers` change the result.

    exclusions: samples and shards to leave out of the manifest
    choice: which members are images and labels
    trust_idx: take offsets from DALI's .idx beside a local shard; the shard is then not read whole
        and has no checksum
    part: (i, n): only index the i-th of n parts, counted from 0, and write no manifest; a last call
        without `part` combines all parts in `output`

    Raises UserError for shards that are missing, bad, or do not go together (after reading all of
    them, with a list of bad samples in BAD_NAME), and UnavailableError.
    """
    listing = list_shards(sources, names)
    if output is None and not listing.is_local:
        raise UserError(
            f"the shards of {objects.shown(listing.base)} are not on this machine: choose a folder "
            "for the manifest with --output FOLDER"
        )
    output = output or Path(listing.base)
    tasks = _plan(listing, output, exclusions, choice, trust_idx)
    excluded_shards = len(listing.names) - len(tasks)
    if part is not None:
        tasks = tasks[part[0] :: part[1]]
    cache = IndexCache(output)
    todo = tasks if again else _outdated(tasks, cache, listing.is_local)
    kept = len(tasks) - len(todo)
    with explain_full_disk(output):
        output.mkdir(parents=True, exist_ok=True)
        if failures := _index_all(todo, len(tasks), workers):
            # Parts run at the same time, so only the last call writes the list of bad samples.
            list_path = output / BAD_NAME if part is None else None
            raise _failure_error(failures, len(tasks), exclusions, list_path)
        if part is not None:
            return IndexResult(None, listing, len(todo), kept, 0, excluded_shards)
        included = [task.name for task in tasks]
        excluded_before = sum(map(cache.excluded, included))
        json_keys = cache.json_keys(included[0]) if included else ()
        excluded = cache.write_manifest(_location(listing, output), included)
    restored = max(0, excluded_before - excluded)
    manifest = Manifest.load(output)
    return IndexResult(
        manifest, listing, len(todo), kept, excluded, excluded_shards, restored, json_keys
    )


def _plan(
    listing: Listing,
    output: Path,
    exclusions: Sequence[Exclusion],
    choice: MemberChoice,
    trust_idx: bool,
) -> list[_Task]:
    """A task for each shard that is not excluded."""
    excluded_keys: dict[str, set] = defaultdict(set)
    for shard, key, _ in exclusions:
        excluded_keys[shard].add(key)
    tasks = []
    for name in listing.names:
        keys = frozenset(excluded_keys[name])
        if None not in keys:
            address = listing.address(name)
            idx = idx_beside(Path(address)) if trust_idx and listing.is_local else None
            samples = listing.sample_counts.get(name)
            tasks.append(_Task(name, address, output, keys, choice, samples, idx))
    return tasks


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
        flags = threads.map(is_current, tasks)
        return [task for task, is_done in zip(tasks, flags, strict=True) if not is_done]


def _index_all(todo: list[_Task], total: int, workers: int) -> list[tuple[str, _Failure]]:
    """Reads all shards; returns the names of those that failed, sorted, with the reason."""
    failures = []
    # disable=None: only on a terminal
    with tqdm(total=total, initial=total - len(todo), unit=" shards", disable=None) as progress:
        for task, failure in run_all(_index_one, todo, workers):
            progress.update()
            if failure is not None:
                failures.append((task.name, failure))
    return sorted(failures)


def _failure_error(
    failures: list[tuple[str, _Failure]],
    total: int,
    exclusions: Sequence[Exclusion],
    list_path: Path | None,
) -> UserError | UnavailableError:
    """The error for all failures; what can be left out is added to a list at `list_path`."""
    message = "; ".join(failure.problem for _, failure in failures[:_MAX_NAMED])
    if len(failures) > 1:
        message = f"{len(failures)} of {total:,} shards are bad: {message}"
    if len(failures) > _MAX_NAMED:
        message += f"; and {len(failures) - _MAX_NAMED} more"
    bad = []
    for shard, failure in failures:
        bad += [Exclusion(shard, key, reason) for key, reason in sorted(failure.bad)]
        if not failure.bad and not failure.is_unavailable:
            bad.append(Exclusion(shard, None, failure.problem))
    if bad and list_path is not None:
        write_exclusions(list_path, [*exclusions, *bad])
        message += f" (to index the rest: --leave-out {list_path})"
    is_unavailable = all(failure.is_unavailable for _, failure in failures)
    return UnavailableError(message) if is_unavailable else UserError(message)


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
    with open_shard(task.address) as file:
        if task.idx is None:
            reader = TarReader(file, objects.shown(task.address), with_sha256=True)
        else:
            reader = IdxReader(file.fileno(), Path(task.address), task.idx)
        return read_index(reader, task.name, task.excluded_keys, task.choice)
