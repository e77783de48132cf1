"""The manifest of many shards: each is read by `indexing`, unless that was done before."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ganscale.data.manifest import Manifest, Shard
from ganscale.data.remote import objects
from ganscale.errors import UnavailableError, UserError
from ganscale.shards.exclusions import Exclusion, Exclusions, write_list
from ganscale.shards.foreign_indices import IdxReader, check_img2dataset, idx_beside
from ganscale.shards.index_cache import IndexCache, options_digest, save_shard, stamp_of
from ganscale.shards.listing import Listing, list_shards
from ganscale.shards.manifest_writer import write_manifest
from ganscale.shards.parallel import run_all, saying_when_full
from ganscale.shards.shard_index import ShardIndex, describe_bad, index_members, read_index

BAD_NAME = "bad.jsonl"
"""The list of what was bad, beside the manifest; `read_list` reads it."""

DEFAULT_RETRY_SECONDS = 300.0

_NAMED_BAD = 5
_STAMPING_THREADS = 32


class Report(NamedTuple):
    """What `index_shards` did.

    manifest: None when a part of the shards was indexed
    listing: the shards it was asked for
    read, kept: shards that were read now, and earlier
    left_out: samples, and the shards that were left out as a whole
    in_again: samples that the index before this one had left out
    """

    manifest: Manifest | None
    listing: Listing
    read: int
    kept: int
    left_out: int
    left_out_shards: int
    in_again: int = 0


class _Task(NamedTuple):
    name: str
    address: str
    is_local: bool
    output: Path
    left_out: frozenset[str]
    stated_samples: int | None
    trusts_idx: bool
    retry_seconds: float


class _Outcome(NamedTuple):
    problem: str
    bad: tuple[tuple[str, str], ...]
    may_pass: bool = False  # a network's trouble, not the shard's


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
    left_out: Exclusions | None = None,
    trusts_idx: bool = False,
    part: tuple[int, int] | None = None,
    retry_seconds: float = DEFAULT_RETRY_SECONDS,
) -> Report:
    """Indexes the shards that `sources` and `names` mean (see `listing.list_shards`).

    The manifest is written to `output`, by default the folder of local shards. Class names are
    taken from a list in its `classes.json`, if there is one. Shards that were indexed before and
    have not changed (see `finished`) are not read, unless `again`; the result is the same, whatever
    was kept, and with any number of `workers`.

    left_out: samples and shards that are not to be in the manifest
    trusts_idx: take offsets from DALI's .idx beside a local shard, which is then not read, and has
        no checksum
    part: (i, n): only index the i-th of n parts, counted from 0, and write no manifest; a last call
        without it finds all parts in the output
    retry_seconds: a failing network is tried again so long

    Raises UserError for shards that are missing, bad, or do not go together (after all were looked
    at, with a list of what is bad in BAD_NAME), and UnavailableError.
    """
    listing = list_shards(sources, names, retry_seconds)
    output = _output(listing, output)
    left_out = left_out or Exclusions()
    left_out_shards = left_out.shards() & set(listing.names)
    kept_names = [name for name in listing.names if name not in left_out_shards]
    if part is not None:
        kept_names = kept_names[part[0] :: part[1]]
    keys = left_out.keys()
    tasks = [
        _Task(
            name,
            listing.address(name),
            listing.is_local,
            output,
            keys.get(name, frozenset()),
            listing.counts.get(name),
            trusts_idx,
            retry_seconds,
        )
        for name in kept_names
    ]
    finished = IndexCache(output)
    left_out_before = sum(map(finished.left_out, kept_names))
    todo = tasks if again else _unfinished(tasks, finished, listing.is_local)
    with saying_when_full(output):
        output.mkdir(parents=True, exist_ok=True)
        _read_all(todo, len(tasks), workers, output, left_out, is_part=part is not None)
        if part is not None:
            return Report(None, listing, len(todo), len(tasks) - len(todo), 0, len(left_out_shards))
        location = "." if _is_beside(listing, output) else _location(listing)
        left_out_samples = write_manifest(output, location, kept_names, finished)
    manifest = Manifest.load(output)
    return Report(
        manifest,
        listing,
        len(todo),
        len(tasks) - len(todo),
        left_out_samples,
        len(left_out_shards),
        max(0, left_out_before - left_out_samples),
    )


def _output(listing: Listing, output: Path | None) -> Path:
    if output is not None:
        return output
    if not listing.is_local:
        raise UserError(
            f"the shards of {objects.shown(listing.base)} are not on this machine: say where "
            "the manifest is to go with --output FOLDER"
        )
    return Path(listing.base)


def _is_beside(listing: Listing, output: Path) -> bool:
    return listing.is_local and Path(listing.base).resolve() == output.resolve()


def _location(listing: Listing) -> str:
    """What the manifest says: never a command, which nobody should run for having read it, and
    no password or signature."""
    if listing.base.startswith(objects.PIPE):
        return "."
    if listing.is_local:
        return os.path.abspath(listing.base)  # noqa: PTH100
    return objects.shown(listing.base)


def _unfinished(tasks: list[_Task], finished: IndexCache, is_local: bool) -> list[_Task]:
    """The tasks whose shard is new or has changed."""

    def is_finished(task: _Task) -> bool:
        try:
            return finished.find(task.name, stamp_of(task.address), _options(task))
        except UserError:
            return False  # a missing shard: reading it says so

    with ThreadPoolExecutor(1 if is_local else _STAMPING_THREADS) as threads:
        flags = list(threads.map(is_finished, tasks))
    return [task for task, is_done in zip(tasks, flags, strict=True) if not is_done]


def _read_all(
    todo: list[_Task], total: int, workers: int, output: Path, left_out: Exclusions, is_part: bool
) -> None:
    problems: dict[str, str] = {}
    unavailable = 0
    bad: list[Exclusion] = []
    # None: on a terminal only.
    with tqdm(total=total, initial=total - len(todo), unit=" shards", disable=None) as progress:
        for task, outcome in run_all(_index_one, todo, workers):
            progress.update()
            bad += [Exclusion(task.name, key, reason) for key, reason in outcome.bad]
            if outcome.problem:
                problems[task.name] = outcome.problem
                unavailable += outcome.may_pass
                if not outcome.bad and not outcome.may_pass:
                    bad.append(Exclusion(task.name, None, outcome.problem))
    if not problems:
        return
    named = [problems[name] for name in sorted(problems)]
    message = "; ".join(named[:_NAMED_BAD])
    if len(named) > 1:
        message = f"{len(named)} of {total:,} shards are bad: {message}"
    if len(named) > _NAMED_BAD:
        message += f"; and {len(named) - _NAMED_BAD} more"
    if (
        not is_part and bad
    ):  # parts run at the same time, and the last call looks at bad shards again
        bad.sort(key=lambda sample: (sample.shard, sample.key or ""))
        write_list(output / BAD_NAME, [*left_out.samples, *bad])
        message += f" (to index the rest: --leave-out {output / BAD_NAME})"
    raise UnavailableError(message) if unavailable == len(problems) else UserError(message)


def _index_one(task: _Task) -> _Outcome:
    """Reads one shard and keeps its index; what is wrong with it is in the outcome."""
    try:
        stamp = stamp_of(task.address)
        index = _read(task)
        if task.is_local and stamp_of(task.address) != stamp:
            raise UserError(f"{task.address} was changed while it was read")
        samples = len(index.rows) + index.left_out + len(index.bad)
        if task.stated_samples is not None and samples != task.stated_samples:
            raise UserError(
                f"{objects.shown(task.address)} has {samples:,} samples, but "
                f"{task.stated_samples:,} in the WebDataset index that lists it"
            )
        if task.is_local:
            check_img2dataset(Path(task.address), samples)
    except UserError as error:
        return _Outcome(str(error), ())
    except UnavailableError as error:
        return _Outcome(str(error), (), may_pass=True)
    except OSError as error:
        return _Outcome(f"{task.address} cannot be read: {error.strerror or error}", ())
    if index.bad:
        return _Outcome(describe_bad(objects.shown(task.address), index.bad), index.bad)
    save_shard(task.output, index, stamp, _options(task))
    return _Outcome("", ())


def _options(task: _Task) -> str:
    return options_digest(task.left_out, _idx(task) is not None)


def _idx(task: _Task) -> Path | None:
    return idx_beside(Path(task.address)) if task.trusts_idx and task.is_local else None


def _read(task: _Task) -> ShardIndex:
    path = Path(task.address)
    idx = _idx(task)
    if idx is not None:
        with path.open("rb") as file:
            reader = IdxReader(file.fileno(), path, idx)
            index = index_members(reader, task.left_out, looks_at_sizes=False)
        return replace(index, shard=Shard(task.name, reader.bytes, "", len(index.rows)))
    if not task.is_local:
        with objects.open_stream(task.address, task.retry_seconds) as file:
            return read_index(file, task.name, objects.shown(task.address), task.left_out)
    with path.open("rb") as file:
        return read_index(file, task.name, task.address, task.left_out)
