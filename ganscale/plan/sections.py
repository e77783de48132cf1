"""The sections of a plan. Each field is a row of the printed table, annotated with its note, and a
key of the JSON file."""

from dataclasses import dataclass
from typing import Annotated, get_type_hints


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int
    ranks: Annotated[int, "one per GPU"]


@dataclass(frozen=True)
class Batches:
    global_batch_size: Annotated[int, "images per critic step over all ranks"]
    images_per_rank: Annotated[int, "per critic step"]
    images_per_micro_batch: Annotated[int, "in one forward of a rank"]


@dataclass(frozen=True)
class Run:
    total_images: Annotated[int, "shown to the critic"]
    cycles: Annotated[int, "of n_critic critic steps and one generator step"]
    checkpoints: Annotated[int, "written in the whole run"]


@dataclass(frozen=True)
class Epochs:
    samples: Annotated[int, "in the data set"]
    epoch_images: Annotated[int, "equal lanes leave out a few samples, different ones each time"]
    critic_steps_per_epoch: float
    generator_steps_per_epoch: float
    epochs: Annotated[float, "in the run"]


@dataclass(frozen=True)
class Lanes:
    lanes: int
    images_per_lane: Annotated[float, "per critic step"]
    lanes_per_rank: Annotated[int, "at most; ranks may share a lane"]
    lanes_per_node: Annotated[int, "at most"]
    lanes_shared_by_nodes: Annotated[int, "read by more than one node"]


@dataclass(frozen=True)
class Reading:
    shards: int
    shard_bytes: Annotated[int, "of the whole data set"]
    shards_per_rank: Annotated[float, "read from per epoch, expected"]
    shards_per_node: Annotated[float, "read from per epoch, expected"]
    bytes_per_rank: Annotated[int, "of images per epoch"]
    bytes_per_node: Annotated[int, "of images per epoch"]


@dataclass(frozen=True)
class Cache:
    """Of each node, for remote shards."""

    cache_bytes: Annotated[int, "data.cache_gib"]
    working_set_shards: Annotated[int, "in use on a node at the same time, at most"]
    working_set_bytes: int
    fetches_per_shard: Annotated[float, "per epoch by all nodes together, expected; 1 is the least"]
    fetched_bytes_per_node: Annotated[int, "per epoch, expected"]


@dataclass(frozen=True)
class HostMemory:
    """Of one rank and its loader process."""

    batches: Annotated[int, "decoded or in use at the same time, at most"]
    batches_bytes: int
    order_bytes: Annotated[int | None, "tables of shards and shuffled windows"]
    shard_list_bytes: Annotated[int | None, "names, sizes and checksums, in each process"]
    manifest_bytes: Annotated[int | None, "memory-mapped, once per node, reclaimable"]
    loader_bytes: Annotated[int, "of the loader process in addition, about"]


@dataclass(frozen=True)
class Networks:
    generator_parameters: Annotated[int, "trainable"]
    critic_parameters: Annotated[int, "trainable"]
    device_bytes: Annotated[int, "weights, gradients, optimizer states, EMA; without activations"]
    checkpoint_bytes: Annotated[int, "tensor files of one checkpoint"]
    checkpoints_kept_bytes: Annotated[int, "at the end of the run"]


@dataclass(frozen=True)
class DeviceMemory:
    """Of one rank."""

    peak_bytes: Annotated[int, "of a cycle's tensors, with activations and second derivatives"]
    bytes_per_image: Annotated[int, "for further images of a rank"]
    peak_bytes_with_accumulate: Annotated[dict[int, int], "for the same batch"]
    images_per_rank_on: Annotated[dict[str, int], "at most, if 10 % of it and 1 GB stay free"]


@dataclass(frozen=True)
class Computation:
    """Of all ranks together."""

    flops_per_image: Annotated[float, "products and convolutions of a cycle, with penalties"]
    flops: Annotated[float, "of the whole run"]
    days_if_a_gpu_reaches: Annotated[dict[str, float], "without evaluations; see --gpu-tflops"]


@dataclass(frozen=True)
class Communication:
    """Between n ranks. In a ring, each sends 2 (n - 1) / n of the bytes that are all-reduced."""

    fakes_bytes: Annotated[int, "all-reduced: batch norms of the critic steps' fakes"]
    fakes_collectives: int
    critic_step_bytes: Annotated[int, "all-reduced: gradients and batch statistics"]
    critic_step_collectives: int
    generator_step_bytes: Annotated[int, "all-reduced: gradients and batch statistics"]
    generator_step_collectives: int
    cycle_bytes: Annotated[int, "all-reduced, with the ranks' vote on stopping"]
    cycle_collectives: int
    collectives_per_image: float
    rank_traffic_bytes_per_cycle: Annotated[int, "sent by each rank, which receives as much"]
    rank_traffic_bytes_per_image: float
    log_row_collectives: Annotated[int, "for a row of metrics: meters, counts and small images"]
    audit_bytes: Annotated[int, "in one all-reduce before each checkpoint"]


@dataclass(frozen=True)
class Plan:
    """A section is None if it is not known or does not apply. `remarks` are sentences about what to
    change."""

    cluster: Cluster
    batches: Batches
    run: Run
    epochs: Epochs | None
    lanes: Lanes | None
    reading: Reading | None
    cache: Cache | None
    host_memory: HostMemory
    networks: Networks
    device_memory: DeviceMemory | None
    computation: Computation | None
    communication: Communication | None
    remarks: tuple[str, ...]

    def table(self) -> str:
        """The numbers and notes as aligned text."""
        lines: list[str] = []
        for title, section in vars(self).items():
            if title == "remarks" or section is None:
                continue
            lines += ["", title.replace("_", " ")]
            for name, hint in get_type_hints(type(section), include_extras=True).items():
                (note,) = getattr(hint, "__metadata__", ("",))
                label, value = name.replace("_", " "), getattr(section, name)
                rows = {label: value}
                if isinstance(value, dict):
                    rows = {f"{label} {key}": each for key, each in value.items()}
                for label, each in rows.items():
                    lines.append(f"  {label:<30} {_readable(name, each):>14}  {note}".rstrip())
        lines += ["", *(f"note: {remark}" for remark in self.remarks)]
        return "\n".join(lines).strip("\n") + "\n"


def _readable(name: str, value: float | None) -> str:
    if value is None:
        return "unknown"
    if "bytes" in name:
        return readable_bytes(value)
    if "flops" in name:
        return f"{value:.3g}"
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def readable_bytes(count: float) -> str:
    """1536 -> `1.50 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
