"""The sections of a plan: each field is a row of the printed table, annotated with its remark, and
a key of the JSON file."""

from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, get_type_hints


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int
    ranks: Annotated[int, "one on each GPU"]


@dataclass(frozen=True)
class Batches:
    global_batch_size: Annotated[int, "images per critic step over all ranks"]
    images_per_rank: Annotated[int, "per critic step"]
    images_per_micro_batch: Annotated[int, "in a forward of one rank"]


@dataclass(frozen=True)
class Run:
    total_images: Annotated[int, "shown to the critic"]
    cycles: Annotated[int, "n_critic critic steps and one generator step each"]
    checkpoints: Annotated[int, "written in the whole run"]


@dataclass(frozen=True)
class Epochs:
    samples: Annotated[int, "in the data set"]
    epoch_images: Annotated[int, "lanes of equal length leave out a few, others every time"]
    critic_steps_per_epoch: float
    generator_steps_per_epoch: float
    epochs: Annotated[float, "in the run"]


@dataclass(frozen=True)
class Lanes:
    lanes: int
    images_per_lane: Annotated[float, "per critic step"]
    lanes_per_rank: Annotated[int, "at most; a lane may be shared"]
    lanes_per_node: Annotated[int, "at most"]
    lanes_shared_by_nodes: Annotated[int, "read by more than one node"]


@dataclass(frozen=True)
class Reading:
    """Per epoch."""

    shards: int
    shard_bytes: Annotated[int, "of the whole data set"]
    shards_per_rank: Annotated[float, "touched in an epoch, expected"]
    shards_per_node: Annotated[float, "touched in an epoch, expected"]
    bytes_per_rank: Annotated[int, "of images in an epoch"]
    bytes_per_node: Annotated[int, "of images in an epoch"]


@dataclass(frozen=True)
class Cache:
    """Of a node, for shards that do not lie on its own disks."""

    cache_bytes: Annotated[int, "data.cache_gib"]
    working_set_shards: Annotated[int, "in use at one time on a node, at most"]
    working_set_bytes: int
    fetches_per_shard: Annotated[float, "in an epoch by all nodes together, expected; 1 is enough"]
    fetched_bytes_per_node: Annotated[int, "in an epoch, expected"]


@dataclass(frozen=True)
class HostMemory:
    """Of one rank and the process that reads its data."""

    batches: Annotated[int, "decoded ahead or in use, at most"]
    batches_bytes: int
    order_bytes: Annotated[int | None, "tables of shards, shuffled windows"]
    shard_list_bytes: Annotated[int | None, "names, sizes and checksums, in each process"]
    manifest_bytes: Annotated[int | None, "mapped from its file, once a node, reclaimable"]
    loader_bytes: Annotated[int, "of the process that reads data, besides these; about"]


@dataclass(frozen=True)
class Networks:
    generator_parameters: Annotated[int, "trained"]
    critic_parameters: Annotated[int, "trained"]
    device_bytes: Annotated[int, "weights, gradients, moments, average; without activations"]
    checkpoint_bytes: Annotated[int, "one checkpoint's tensor files"]
    checkpoints_kept_bytes: Annotated[int, "once the run has ended"]


@dataclass(frozen=True)
class Communication:
    """Between the ranks. A ring moves 2 (n - 1) / n of what is reduced through every rank."""

    fakes_bytes: Annotated[int, "reduced: batch norms of the fakes of a cycle's critic steps"]
    fakes_collectives: int
    critic_step_bytes: Annotated[int, "reduced: gradients and statistics of the batch"]
    critic_step_collectives: int
    generator_step_bytes: Annotated[int, "reduced: gradients and statistics of the batch"]
    generator_step_collectives: int
    cycle_bytes: Annotated[int, "reduced in a cycle, with its vote"]
    cycle_collectives: int
    collectives_per_image: float
    rank_traffic_bytes_per_cycle: Annotated[int, "sent by each rank, and as many received"]
    rank_traffic_bytes_per_image: float
    log_row_collectives: Annotated[int, "meters, counts and small images"]
    audit_bytes: Annotated[int, "one reduction before every checkpoint"]


@dataclass(frozen=True)
class Plan:
    """A section is None where it cannot be known; `remarks` are sentences about what to change."""

    cluster: Cluster
    batches: Batches
    run: Run
    epochs: Epochs | None
    lanes: Lanes | None
    reading: Reading | None
    cache: Cache | None
    host_memory: HostMemory
    networks: Networks
    communication: Communication
    remarks: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers by section, bytes as bytes."""
        return asdict(self)

    def table(self) -> str:
        """One page of aligned text."""
        lines: list[str] = []
        for part in fields(self):
            section = getattr(self, part.name)
            if part.name == "remarks" or section is None:
                continue
            lines += ["", part.name.replace("_", " ")]
            for name, hint in get_type_hints(type(section), include_extras=True).items():
                label, value = name.replace("_", " "), _shown(name, getattr(section, name))
                (note,) = getattr(hint, "__metadata__", ("",))
                lines.append(f"  {label:<30} {value:>14}  {note}".rstrip())
        lines += ["", *(f"note: {remark}" for remark in self.remarks)]
        return "\n".join(lines).strip("\n") + "\n"


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "not known"
    if "bytes" in name:
        return readable_bytes(value)
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def readable_bytes(count: float) -> str:
    """With the largest unit that leaves at least 1: 1536 -> 1.50 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
