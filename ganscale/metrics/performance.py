"""How fast a run goes and where its time goes: the `perf/` of a row, which differs by machine."""

import resource
import sys
import time
from typing import NamedTuple

import torch

from ganscale.metrics.profiling import HOST_SECTIONS, stopwatch
from ganscale.objectives.objective import build_objective
from ganscale.runtime import Runtime, all_gather_batch
from ganscale.schema import Config
from ganscale.training.flops import count_cycle_flops
from ganscale.training.state import TrainingState

_DEVICE_PARTS = ("fake_images", "critic", "penalty", "generator", "ema", "communication")
_HOST_PARTS = tuple(sorted(name.replace(" ", "_") for name in HOST_SECTIONS))

# Dense TFLOP/s of one GPU as its maker states them: (bfloat16, float32). The latter with the
# tensor cores' TF32, which is what torch's convolutions take in float32.
_PEAKS = {
    "B200": (2250.0, 1125.0),
    "H200": (989.0, 494.0),
    "GH200": (989.0, 494.0),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 417.0),
    "H100": (989.0, 494.0),
    "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "A10": (125.0, 62.5),
    "L4": (121.0, 60.0),
}


class Interval(NamedTuple):
    """From one row to the next."""

    images: int
    seconds: float
    waited_seconds: float  # by this rank, for data


class PerformanceMeter:
    """Makes the `perf/` of every row; on every rank, for it gathers."""

    def __init__(self, config: Config, runtime: Runtime, state: TrainingState) -> None:
        self._config = config
        self._runtime = runtime
        self._state = state
        self._cycle_flops: float | None = None
        if runtime.is_main:
            objective = build_objective(config.objective)
            networks = state.generator, state.critic
            self._cycle_flops = count_cycle_flops(config, objective, *networks, state.num_classes)
        self._peak_tflops = config.log.peak_tflops
        if not self._peak_tflops and runtime.device.type == "cuda":
            name = torch.cuda.get_device_name(runtime.device)
            self._peak_tflops = known_peak(name, config.training.precision)
        self._since = (time.perf_counter(), state.images_seen)
        stopwatch.read_host()

    def interval(self, waited_seconds: float) -> Interval:
        """Since the last call."""
        now, (then, images_then) = time.perf_counter(), self._since
        self._since = now, self._state.images_seen
        return Interval(self._state.images_seen - images_then, now - then, waited_seconds)

    def row(self, interval: Interval) -> dict[str, float]:
        """Waits for the device."""
        n_critic, ranks = self._config.objective.n_critic, self._runtime.world_size
        cycle_images = n_critic * self._config.training.global_batch_size
        cycles = interval.images / cycle_images
        of_device, of_host = self._device_seconds(), stopwatch.read_host()
        of_host = {name.replace(" ", "_"): s / cycles for name, s in of_host.items()}
        own = sum(of_device[part] for part in _DEVICE_PARTS if part != "communication")
        own += interval.waited_seconds / cycles
        figures = {
            "own_seconds": own,
            "waited_share": interval.waited_seconds / interval.seconds,
            "device_gib": self._device_gib(),
            "host_gib": _host_gib(),
            **{f"{part}_ms": 1000 * of_device[part] for part in _DEVICE_PARTS},
            **{f"{part}_ms": 1000 * of_host.get(part, 0.0) for part in _HOST_PARTS},
        }
        of_ranks = self._of_ranks(figures)
        rates = [cycle_images / ranks / max(seconds, 1e-9) for seconds in of_ranks["own_seconds"]]
        row = {
            "perf/images_per_second": interval.images / interval.seconds,
            "perf/cycle_ms": 1000 * interval.seconds / cycles,
            "perf/data_wait_share": sum(of_ranks["waited_share"]) / ranks,
            "perf/data_wait_share_max": max(of_ranks["waited_share"]),
            "perf/rank_images_per_second_min": min(rates),
            "perf/rank_images_per_second_mean": sum(rates) / ranks,
            "perf/rank_images_per_second_max": max(rates),
            "perf/slowest_rank": float(rates.index(min(rates))),
            "perf/host_memory_gib": max(of_ranks["host_gib"]),
            **{f"perf/{p}_ms": sum(of_ranks[f"{p}_ms"]) / ranks for p in _DEVICE_PARTS},
            # Pictures and files are rank 0's; the others wait for it elsewhere.
            **{f"perf/{p}_ms": max(of_ranks[f"{p}_ms"]) for p in _HOST_PARTS},
        }
        if self._runtime.device.type == "cuda":
            row["perf/device_memory_gib"] = max(of_ranks["device_gib"])
        if self._cycle_flops is not None:
            row["perf/tflops"] = self._cycle_flops * cycles / interval.seconds / 1e12
            if self._peak_tflops:
                row["perf/peak_share"] = row["perf/tflops"] / (ranks * self._peak_tflops)
        return row

    def _device_seconds(self) -> dict[str, float]:
        """Of the logged cycle, its last critic step standing for all of them."""
        seconds, n_critic = stopwatch.read_device(), self._config.objective.n_critic
        critic, generator = self._state.critic_updater, self._state.generator_updater
        waited = {each.name: each.seconds_of_averaging() for each in (critic, generator)}

        def update(updater: str) -> float:
            parts = (seconds.get(f"{updater} {p}", 0.0) for p in ("forward", "backward", "update"))
            return sum(parts) - waited[updater]

        penalty = seconds.get("penalty", 0.0)
        together, in_step = (seconds.get(each, 0.0) for each in ("fakes together", "fake images"))
        return {
            "fake_images": together + in_step if together else n_critic * in_step,
            "critic": n_critic * (update("critic") - penalty),
            "penalty": n_critic * penalty,
            "generator": update("generator"),
            "ema": seconds.get("ema", 0.0),
            "communication": n_critic * waited["critic"] + waited["generator"],
        }

    def _of_ranks(self, figures: dict[str, float]) -> dict[str, list[float]]:
        """Each figure of every rank, in rank order; one collective."""
        own = torch.tensor([[*figures.values()]], dtype=torch.float64, device=self._runtime.device)
        columns = all_gather_batch(own).T.tolist()
        return dict(zip(figures, columns, strict=True))

    def _device_gib(self) -> float:
        """The most that was allocated at once since the last row."""
        if self._runtime.device.type != "cuda":
            return 0.0
        most = torch.cuda.max_memory_allocated(self._runtime.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self._runtime.device)
        return most


def _host_gib() -> float:
    """The most that this process has had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def known_peak(device_name: str, precision: str) -> float:
    """Of one GPU by its full name, in TFLOP/s; 0 where it is not known."""
    words = set(device_name.replace("-", " ").split())
    for known, (bfloat16, float32) in _PEAKS.items():
        if words.issuperset(known.split()):
            return {"bfloat16": bfloat16, "float32": float32}.get(precision, 0.0)
    return 0.0
