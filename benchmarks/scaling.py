"""What more ranks bring: 1 -> 2 real ones here, and a model of 1,024 GPUs.

    python -m benchmarks.scaling [--quick] [--json FILE]

`measured/...`: a real run of one rank and a real run of two (gloo, DDP as in training, one thread
each) take turns, the same images a rank, so twice the global batch on two. Wanted are two cores
that nobody else uses.

- `efficiency`: images a second of two ranks over twice those of one, in percent
- `communication`: the share of two ranks' cycle that is gone when they do not communicate, that is
  without DDP and with batch norms of their own: averaging, waiting for each other, and the sums of
  the global batch norm. What else efficiency lacks is lost to the cores' common memory.

`model/...`: no measurement. Ring all-reduces of the gradients, in DDP's buckets, over links of
stated speed, hidden behind the backward pass as far as that lasts, but for the last bucket; and the
small all-reduces of the global batch norm, which nothing hides, at the latency of a tree. Bytes and
counts are those of `ganscale plan`; the time of a step without communication is its floating-point
operations (`benchmarks.limit`) over a stated rate: a step that this machine measured would be so
slow that any network hid behind it. The links' speeds and latencies and the rate are assumptions,
named in each row's note.
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

from benchmarks.limit import done
from benchmarks.ours import CONFIGS, Ours, config_of, random_images
from benchmarks.ranks import run_ranks
from benchmarks.report import Row, arguments, report
from benchmarks.timing import spread
from ganscale.config import resolve
from ganscale.networks import normalization
from ganscale.objectives.objective import build_objective
from ganscale.plan.networks import cycle_exchanges, planned_networks
from ganscale.runtime import Runtime
from ganscale.schema import Config

WORLDS = (1, 2)


def run_rank(folder: Path) -> None:
    """One rank of one world; `folder` is that world's, in the one that both share."""
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
    processor = 0.0
    for turn in range(task["rounds"] + 1):
        _wait_for(folder.parent / "turn.txt", f"{ranks} {turn}", task["seconds"])
        for name, run in contestants.items():
            runtime.barrier()
            started, of_processor = time.perf_counter(), time.process_time()
            run()
            if name == "with" and turn > 0:
                processor += time.process_time() - of_processor
            runtime.barrier()
            if turn > 0:  # the first is for warming up
                seconds[name].append(time.perf_counter() - started)
        if runtime.is_main:
            index = WORLDS.index(ranks) + 1
            following = (WORLDS[index], turn) if index < len(WORLDS) else (WORLDS[0], turn + 1)
            _say(folder.parent / "turn.txt", f"{following[0]} {following[1]}")
    if runtime.is_main:
        (folder / "seconds.json").write_text(json.dumps({**seconds, "processor": processor}))
    runtime.barrier()
    runtime.close()


def _contestant(task: dict, batch: int, runtime: Runtime, communicates: bool) -> Callable[[], None]:
    """Some cycles of this rank's share, with or without what passes between ranks."""
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
        ranks = normalization.get_world_size
        normalization.get_world_size = lambda: 1
        try:
            run()
        finally:
            normalization.get_world_size = ranks

    return run if communicates else run_alone


def _wait_for(path: Path, turn: str, seconds: float) -> None:
    """Until `path` says `turn`. Raises RuntimeError after `seconds`, or when the others failed."""
    deadline = time.monotonic() + seconds
    while (said := path.read_text()) != turn:
        if said == "failed" or time.monotonic() > deadline:
            raise RuntimeError(f"the other world did not hand over: it is at {said}")
        time.sleep(0.002)


def _say(path: Path, turn: str) -> None:
    new = path.with_name("turn.new")
    new.write_text(turn)
    new.replace(path)


def measure(
    objective: str, network: str, images_per_rank: int, cycles: int, rounds: int, seconds: float
) -> list[Row]:
    """Raises RuntimeError if a rank fails, or if it takes longer than `seconds`."""
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
        _say(folder / "turn.txt", f"{WORLDS[0]} 0")
        failures: list[RuntimeError] = []

        def run(ranks: int) -> None:
            own = folder / f"ranks{ranks}"
            own.mkdir()
            try:
                run_ranks("benchmarks.scaling:run_rank", own, ranks, seconds)
            except RuntimeError as failure:
                failures.append(failure)
                _say(folder / "turn.txt", "failed")

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
        f"{images_per_rank} images a rank; a cycle takes {times[0]:.0f} ms on one, {times[1]:.0f} "
        f"ms on two, {times[2]:.0f} ms on two that do not communicate; a rank of two needs "
        f"{100 * (two['processor'] / one['processor'] - 1):.0f} % more of its processor"
    )
    cores = f"{os.cpu_count()} cores, gloo"
    return [
        Row(f"{name}/efficiency", "1 rank", *spread(efficiency), "% of 2 x", f"{note}; {cores}"),
        Row(f"{name}/communication", "2 ranks", *spread(share), "% of a cycle", cores),
    ]


@dataclass(frozen=True)
class Links:
    """Assumed: bytes a second and GPU, and seconds until a collective begins to flow."""

    within_node: float = 450e9  # NVLink of the H100 generation, one direction
    between_nodes: float = 50e9  # one 400 Gbit/s adapter for each GPU
    latency_within: float = 10e-6
    latency_hop: float = 5e-6  # more for each doubling of the nodes
    gpus_per_node: int = 8


def all_reduce_seconds(count: float, ranks: int, links: Links) -> float:
    """A ring's: each rank sends and receives 2 (n - 1) / n of the bytes, over the slowest link."""
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
    """A step whose backward pass, two thirds of `compute`, hides the averaging of all buckets but
    the last."""
    if ranks == 1:
        return compute
    bucket = all_reduce_seconds(gradient_bytes / buckets, ranks, links)
    exposed = bucket + max(0.0, (buckets - 1) * bucket - compute * 2 / 3)
    return compute + exposed


def model(name: str, settings: list[str], images_per_rank: int, rate: float) -> list[Row]:
    """Efficiency of 8 to 1,024 ranks by the formulas above; `rate`: operations a second and GPU."""
    links = Links()
    rows = []
    for ranks in (8, 64, 256, 1024):
        batch = images_per_rank * ranks
        config = resolve([*settings, f"training.global_batch_size={batch}"]).config
        networks = planned_networks(config, 0)
        objective = build_objective(config.objective)
        fakes, critic, generator = cycle_exchanges(config, objective, *networks, ranks)
        computed = done(config, *networks, _meta_images(config, images_per_rank))
        n_critic = config.objective.n_critic
        # As if all steps took the same time.
        cycle = sum(computed) / rate
        parts = [cycle / (n_critic + 1)] * 2
        norms = sum(isinstance(m, normalization.GlobalBatchNorm) for m in networks[0].modules())
        small = fakes.collectives + 2 * norms
        total = small * latency_seconds(ranks, links)
        for times, part, exchange, few in zip(
            (n_critic, 1), parts, (critic, generator), (0, 2 * norms), strict=True
        ):
            buckets = exchange.collectives - few
            total += times * step_seconds(part, exchange.reduced_bytes, buckets, ranks, links)
        sent = n_critic * critic.reduced_bytes + generator.reduced_bytes + fakes.reduced_bytes
        note = (
            f"no measurement: {images_per_rank} images a GPU at {rate / 1e12:.0f} TFLOP/s, "
            f"{1000 * cycle:.1f} ms a cycle; {sent / 2**20:.0f} MiB and "
            f"{small} small sums all-reduced in it; rings over "
            f"{links.within_node / 1e9:.0f} GB/s within 8, {links.between_nodes / 1e9:.0f} GB/s "
            f"a GPU beyond, {1e6 * latency_seconds(ranks, links):.0f} us a collective"
        )
        rows.append(
            Row(f"model/{name}/{ranks}", "1 GPU", 100 * cycle / total, unit="% of n x", note=note)
        )
    return rows


def _meta_images(config: Config, batch: int) -> torch.Tensor:
    size = config.data.resolution
    return torch.empty(batch, config.data.channels, size, size, device="meta")


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
