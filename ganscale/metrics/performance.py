"""How fast a run goes and where its time goes: the `perf/` metrics, which differ by machine."""

import resource
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch

from ganscale.metrics.profiling import HOST_SECTIONS, stopwatch
from ganscale.runtime import Runtime, all_gather_batch
from ganscale.schema import Config, TrainingConfig

_HOST_SECTIONS = tuple(sorted(name.replace(" ", "_") for name in HOST_SECTIONS))

# Dense TFLOP/s of one GPU as its maker states them, by precision.
_PRECISIONS: tuple[str, ...] = ("bfloat16", "tf32", "float32")
_PEAKS = {
    "B200": (2250.0, 1125.0, 75.0),
    "H200": (989.0, 494.0, 67.0),
    "GH200": (989.0, 494.0, 67.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 417.0, 60.0),
    "H100": (989.0, 494.0, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "A10": (125.0, 62.5, 31.2),
    "L4": (121.0, 60.0, 30.3),
}


class Interval(NamedTuple):
    """From one row to the next."""

    images: int
    seconds: float
    data_wait_seconds: float  # of this rank


class PerformanceMeter:
    """Makes the `perf/` metrics of every row. On every rank: it gathers."""

    def __init__(
        self, config: Config, runtime: Runtime, images_seen: int, cycle_flops: float | None
    ) -> None:
        """cycle_flops: floating point operations of a cycle on all ranks; None if unknown"""
        self._n_critic = config.objective.n_critic
        self._cycle_images = config.objective.n_critic * config.training.global_batch_size
        self._runtime, self._cycle_flops = runtime, cycle_flops
        self._peak_tflops = config.log.peak_tflops
        if not self._peak_tflops and runtime.device.type == "cuda":
            name = torch.cuda.get_device_name(runtime.device)
            self._peak_tflops = known_peak(name, config.training)
        self._last = (time.perf_counter(), images_seen)
        stopwatch.read_host()

    def interval(self, images_seen: int, data_wait_seconds: float) -> Interval:
        """Since the last call."""
        now, (before, images_before) = time.perf_counter(), self._last
        self._last = now, images_seen
        return Interval(images_seen - images_before, now - before, data_wait_seconds)

    def row(self, interval: Interval, averaging_seconds: Mapping[str, float]) -> dict[str, float]:
        """The metrics of an interval that ends with a logged cycle. Waits for the device.

        averaging_seconds: of the cycle's last critic and generator update (see NetworkUpdater)
        """
        ranks, cycles = self._runtime.world_size, interval.images / self._cycle_images
        device = self._device_seconds(averaging_seconds)
        host = {name.replace(" ", "_"): s / cycles for name, s in stopwatch.read_host().items()}
        own_seconds = sum(s for name, s in device.items() if name != "communication")
        own_seconds += interval.data_wait_seconds / cycles
        own = {
            "own_seconds": own_seconds,
            "data_wait_share": interval.data_wait_seconds / interval.seconds,
            "device_gib": _device_gib(self._runtime.device),
            "host_gib": _host_gib(),
            **{f"{name}_ms": 1000 * seconds for name, seconds in device.items()},
            **{f"{name}_ms": 1000 * host.get(name, 0.0) for name in _HOST_SECTIONS},
        }
        local = torch.tensor([[*own.values()]], dtype=torch.float64, device=self._runtime.device)
        by_rank = dict(zip(own, all_gather_batch(local).T.tolist(), strict=True))
        rank_images = self._cycle_images / ranks
        rates = [rank_images / max(seconds, 1e-9) for seconds in by_rank["own_seconds"]]
        row = {
            "perf/images_per_second": interval.images / interval.seconds,
            "perf/cycle_ms": 1000 * interval.seconds / cycles,
            "perf/data_wait_share": sum(by_rank["data_wait_share"]) / ranks,
            "perf/data_wait_share_max": max(by_rank["data_wait_share"]),
            "perf/rank_images_per_second_min": min(rates),
            "perf/rank_images_per_second_mean": sum(rates) / ranks,
            "perf/rank_images_per_second_max": max(rates),
            "perf/slowest_rank": float(rates.index(min(rates))),
            "perf/host_memory_gib": max(by_rank["host_gib"]),
            **{f"perf/{n}_ms": sum(by_rank[f"{n}_ms"]) / ranks for n in device},
            # Rank 0 makes sample grids and files; the others wait for it in other sections.
            **{f"perf/{n}_ms": max(by_rank[f"{n}_ms"]) for n in _HOST_SECTIONS},
        }
        if self._runtime.device.type == "cuda":
            row["perf/device_memory_gib"] = max(by_rank["device_gib"])
        if self._cycle_flops is not None:
            row["perf/tflops"] = self._cycle_flops * cycles / interval.seconds / 1e12
            if self._peak_tflops:
                row["perf/peak_share"] = row["perf/tflops"] / (ranks * self._peak_tflops)
        return row

    def _device_seconds(self, averaging_seconds: Mapping[str, float]) -> dict[str, float]:
        """Of the logged cycle; its last critic step stands for all of them."""
        seconds = stopwatch.read_device()

        def update(network: str) -> float:
            names = (f"{network} {part}" for part in ("forward", "backward", "update"))
            return sum(seconds.get(name, 0.0) for name in names) - averaging_seconds[network]

        penalty = seconds.get("penalty", 0.0)
        averaging = self._n_critic * averaging_seconds["critic"] + averaging_seconds["generator"]
        together, in_step = seconds.get("fakes together", 0.0), seconds.get("fake images", 0.0)
        return {
            "fake_images": together + in_step if together else self._n_critic * in_step,
            "critic": self._n_critic * (update("critic") - penalty),
            "penalty": self._n_critic * penalty,
            "generator": update("generator"),
            "ema": seconds.get("ema", 0.0),
            "communication": averaging,
        }


def _device_gib(device: torch.device) -> float:
    """The peak of allocated memory since the last row."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def _host_gib() -> float:
    """The peak of this process's resident memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def known_peak(device_name: str, training: TrainingConfig) -> float:
    """Of a GPU by its full name at the run's precision, in TFLOP/s; 0 if unknown."""
    is_tf32 = training.tf32 and training.precision == "float32"
    precision = "tf32" if is_tf32 else training.precision
    words = set(device_name.replace("-", " ").split())
    for known, peaks in _PEAKS.items():
        if words.issuperset(known.split()):
            return dict(zip(_PRECISIONS, peaks, strict=True)).get(precision, 0.0)
    return 0.0
