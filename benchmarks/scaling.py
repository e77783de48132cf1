"""What more ranks gain: from 1 to 2 real ones, and a model of up to 1,024 GPUs.

    python -m benchmarks.scaling [--quick] [--json FILE]

`measured/...`: a real run of one rank and a real run of two (gloo, DDP as in training, one thread
each) take turns with the same images per rank, so two ranks have twice the global batch. It needs
two cores that nobody else uses.

- `efficiency`: images per second of two ranks over twice those of one, in percent
- `communication`: the share of two ranks' cycle that they save without communication, that is,
  without DDP and with local batch norms: averaging gradients, waiting for each other, and the
  all-reduces of the global batch norm. The rest of the lost efficiency is due to shared memory
  bandwidth.

`model/...`: not measured. Gradients take ring all-reduces in DDP's buckets over links of stated
speed; all but the last bucket overlap with the backward pass, as long as it lasts. The small
all-reduces of the global batch norm overlap with nothing and take the latency of a tree. Bytes and
counts are those of `ganscale plan`. A step without communication takes its floating-point
operations (`benchmarks.limit`) over a stated rate; with this machine's rate, steps would be so slow
that any network could keep up. The note of each row states the assumed rate, speeds and latencies.
"""

import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.limit import computed_operations
from benchmarks.ours import CONFIGS, Ours, config_of, random_images
from benchmarks.ranks import run_ranks
from benchmarks.report import Row, arguments, report
from benchmarks.timing import spread
from ganscale.config import resolve
from ganscale.networks import normalization
from ganscale.objectives.objective import build_objective
from ganscale.plan.communication import cycle_exchanges
from ganscale.plan.networks import planned_networks
from ganscale.runtime import Runtime
from ganscale.schema import Config

WORLDS = (1, 2)


def run_rank(folder: Path) -> None:
    """One rank of one world; `folder` belongs to that world, its parent to both."""
    task = json.loads((folder.parent / "task.json").read_text())
    torch.set_num_threads(1)
    runtime = Runtime.start(timeout_seconds=task["seconds"])
    ranks = runtime.world_size
    batch = task["images_per_rank"] * ranks
    contestants = {
        name: _contestant(task, batch, runtime, name == "with") for name in ("with", "without")
    }
    if ranks == 1:
        del contestants["without"]
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    processor_seconds = 0.0
    for turn in range(task["rounds"] + 1):
        _wait_for(folder.parent / "turn.txt", f"{ranks} {turn}", task["seconds"])
        for name, run in contestants.items():
            runtime.barrier()
            started, processor_started = time.perf_counter(), time.process_time()
            run()
            if name == "with" and turn > 0:
                processor_seconds += time.process_time() - processor_started
            runtime.barrier()
            if turn > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
        if runtime.is_main:
            index = WORLDS.index(ranks) + 1
            is_last = index == len(WORLDS)
            following = f"{WORLDS[0]} {turn + 1}" if is_last else f"{WORLDS[index]} {turn}"
            _hand_over(folder.parent / "turn.txt", following)
    if runtime.is_main:
        (folder / "seconds.json").write_text(
            json.dumps({**seconds, "processor": processor_seconds})
        )
    runtime.barrier()
    runtime.close()


def _contestant(task: dict, batch: int, runtime: Runtime, communicates: bool) -> Callable[[], None]:
    """Some cycles of this rank's share, with or without communication."""
    config = config_of(task["objective"], task["network"], batch)
    share = config_of(task["objective"], task["network"], task["images_per_rank"])
    ours = Ours(config, runtime, random_images(share, runtime.device))
    if not communicates:
        for updater in (ours.state.critic_updater, ours.state.generator_updater):
            updater._wrapped = updater._step

    def run() -> None:
        for _ in range(task["cycles"]):
            ours()

    def run_alone() -> None:
        get_world_size = normalization.get_world_size
        normalization.get_world_size = lambda: 1
        try:
            run()
        finally:
            normalization.get_world_size = get_world_size

    return run if communicates else run_alone


def _wait_for(path: Path, turn: str, seconds: float) -> None:
    """Until `path` contains `turn`. Raises RuntimeError after `seconds`, or if the other failed."""
    deadline = time.monotonic() + seconds
    while (current := path.read_text()) != turn:
        if current == "failed" or time.monotonic() > deadline:
            raise RuntimeError(f"the other world did not hand over: it is at {current}")
        time.sleep(0.002)


def _hand_over(path: Path, turn: str) -> None:
    new = path.with_name("turn.new")
    new.write_text(turn)
    new.replace(path)


def measure(
    objective: str, network: str, images_per_rank: int, cycles: int, rounds: int, seconds: float
) -> list[Row]:
    """Raises RuntimeError if a rank fails or takes longer than `seconds`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = {
            "objective": objective,
            "network": network,
            "images_per_rank": images_per_rank,
            "cycles": cycles,
            "rounds": rounds,
            "seconds": seconds,
        }
        (folder / "task.json").write_text(json.dumps(task))
        _hand_over(folder / "turn.txt", f"{WORLDS[0]} 0")
        failures: list[RuntimeError] = []

        def run(ranks: int) -> None:
            world_folder = folder / f"ranks{ranks}"
            world_folder.mkdir()
            try:
                run_ranks("benchmarks.scaling:run_rank", world_folder, ranks, seconds)
            except RuntimeError as failure:
                failures.append(failure)
                _hand_over(folder / "turn.txt", "failed")

        threads = [threading.Thread(target=run, args=(ranks,)) for ranks in WORLDS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        one, two = (
            json.loads((folder / f"ranks{ranks}" / "seconds.json").read_text()) for ranks in WORLDS
        )
    efficiency = [100 * o / t for o, t in zip(one["with"], two["with"], strict=True)]
    share = [100 * (1 - w / t) for w, t in zip(two["without"], two["with"], strict=True)]
    name = f"measured/{objective}/{network}"
    times = [
        statistics.median(t) * 1000 / cycles for t in (one["with"], two["with"], two["without"])
    ]
    note = (
        f"{images_per_rank} images per rank; a cycle takes {times[0]:.0f} ms on one, "
        f"{times[1]:.0f} ms on two, {times[2]:.0f} ms on two without communication; a rank of two "
        f"takes {100 * (two['processor'] / one['processor'] - 1):.0f} % more processor time"
    )
    cores = f"{os.cpu_count()} cores, gloo"
    return [
        Row(f"{name}/efficiency", "1 rank", *spread(efficiency), "% of 2 x", f"{note}; {cores}"),
        Row(f"{name}/communication", "2 ranks", *spread(share), "% of a cycle", cores),
    ]


@dataclass(frozen=True)
class Links:
    """Assumptions: bytes per second and GPU, and seconds of latency per collective."""

    within_node: float = 450e9  # NVLink of the H100 generation, one direction
    between_nodes: float = 50e9  # one 400 Gbit/s adapter for each GPU
    latency_within: float = 10e-6
    latency_hop: float = 5e-6  # added for each doubling of the nodes
    gpus_per_node: int = 8


def all_reduce_seconds(count: float, ranks: int, links: Links) -> float:
    """A ring: each rank sends and receives 2 (n - 1) / n of the bytes over the slowest link."""
    if ranks == 1:
        return 0.0
    speed = links.within_node if ranks <= links.gpus_per_node else links.between_nodes
    return 2 * (ranks - 1) / ranks * count / speed + latency_seconds(ranks, links)


def latency_seconds(ranks: int, links: Links) -> float:
    nodes = max(1, ranks // links.gpus_per_node)
    return links.latency_within + links.latency_hop * math.log2(nodes)


def step_seconds(
    compute: float, gradient_bytes: float, buckets: int, ranks: int, links: Links
) -> float:
    """A step whose backward pass, two thirds of `compute`, overlaps with the all-reduces of all
    buckets but the last."""
    if ranks == 1:
        return compute
    bucket = all_reduce_seconds(gradient_bytes / buckets, ranks, links)
    exposed = bucket + max(0.0, (buckets - 1) * bucket - compute * 2 / 3)
    return compute + exposed


def model(name: str, settings: list[str], images_per_rank: int, rate: float) -> list[Row]:
    """Efficiency of 8 to 1,024 ranks by these formulas; `rate`: operations per second and GPU."""
    links = Links()
    rows = []
    for ranks in (8, 64, 256, 1024):
        batch = images_per_rank * ranks
        config = resolve([*settings, f"training.global_batch_size={batch}"]).config
        networks = planned_networks(config, 0)
        objective = build_objective(config.objective)
        fakes, critic, generator = cycle_exchanges(config, objective, *networks, ranks)
        computed = computed_operations(config, *networks, _meta_images(config, images_per_rank))
        n_critic = config.objective.n_critic
        cycle = sum(computed) / rate
        step = cycle / (n_critic + 1)  # as if all steps took the same time
        norms = sum(isinstance(m, normalization.GlobalBatchNorm) for m in networks[0].modules())
        small = fakes.collectives + 2 * norms
        total = small * latency_seconds(ranks, links)
        for times, exchange, norm_reductions in (n_critic, critic, 0), (1, generator, 2 * norms):
            buckets = exchange.collectives - norm_reductions
            total += times * step_seconds(step, exchange.reduced_bytes, buckets, ranks, links)
        sent = n_critic * critic.reduced_bytes + generator.reduced_bytes + fakes.reduced_bytes
        note = (
            f"not measured: {images_per_rank} images per GPU at {rate / 1e12:.0f} TFLOP/s, "
            f"{1000 * cycle:.1f} ms per cycle, which all-reduces {sent / 2**20:.0f} MiB and "
            f"{small} small sums; rings over {links.within_node / 1e9:.0f} GB/s within 8 GPUs, "
            f"{links.between_nodes / 1e9:.0f} GB/s per GPU beyond, "
            f"{1e6 * latency_seconds(ranks, links):.0f} us per collective"
        )
        rows.append(
            Row(f"model/{name}/{ranks}", "1 GPU", 100 * cycle / total, unit="% of n x", note=note)
        )
    return rows


def _meta_images(config: Config, batch: int) -> torch.Tensor:
    return torch.empty(batch, *config.data.sample_shape, device="meta")


def models() -> list[Row]:
    """The shipped configs, and the ResNet at 128 pixels."""
    resnet = [str(CONFIGS / "resnet32.yaml")]
    dcgan = [str(CONFIGS / "dcgan64.yaml")]
    large = [*resnet, "data.resolution=128"]
    sustained = 200e12  # bfloat16 on an H100: a fifth of its peak
    return [
        *model("wgan_gp_resnet32", resnet, 64, sustained),
        *model("wgan_gp_resnet128", large, 64, sustained),
        *model("bce_dcgan64", dcgan, 128, sustained),
    ]


def main() -> None:
    options = arguments(__doc__)
    if options.quick:
        rows = measure("wgan_gp", "dcgan32", 16, 2, 5, seconds=120)
    else:
        rows = measure("wgan_gp", "dcgan32", 64, 2, 11, seconds=900)
        rows += measure("wgan_gp", "resnet32", 64, 1, 11, seconds=1800)
        rows += measure("non_saturating", "dcgan32", 64, 8, 11, seconds=900)
    report([*rows, *models()], options.json)


if __name__ == "__main__":
    main()
