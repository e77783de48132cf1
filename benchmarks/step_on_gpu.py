"""Images per second of a training cycle on a GPU, against rivals in the same precision.

    python -m benchmarks.step_on_gpu [--seconds N] [--json FILE] [--only SUBSTRING]

A cycle is `n_critic` critic steps and a generator step on a batch of images on the device. Ours has
the random numbers that a loader's process makes ahead; rivals draw theirs on the device. All train
copies of the same networks with the same loss, penalty, optimizer and batch, without TF32. Rivals
have contiguous memory format, as their users have. A row is an objective, networks and settings:

- `f32`
- `bf16`: autocast for everything, penalties included; the same for rivals
- `bf16_penalty_f32`: penalties in float32, as by default; the same for the plain loop
- `..._reuse_fakes`: the generator's step takes the fakes of the critic's, as PyTorch-GAN and
  Lightning do with one critic step; these two are compared in these rows only
- `..._cuda_graphs`: our steps are replayed as CUDA graphs; at 32 and 64 pixels, where launches take
  the time

The ratio is the time of the fastest rival over ours, the median of interleaved rounds; low and high
are its quartiles. The share of the peak is that of the cycle's useful operations at the speed of a
large matrix product in the same precision (see `benchmarks.limit`). A turn is as many cycles as
take 50 ms. Rows are written after every case. A case for which no time is left, that fails or that
needs more memory than there is, is "not measured"; if one failed, the exit code is 1.

On a CPU, the same runs with tiny networks, to see that it works; but not with CUDA graphs.
"""

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import nan

import torch
from torch import Tensor

from benchmarks.limit import matrix_product, useful_operations
from benchmarks.ours import Ours, config_of, cycles_per_turn, kind_of, next_cycles, random_images
from benchmarks.report import Row, argument_parser, table, write
from benchmarks.rivals.libraries import Mimicry
from benchmarks.rivals.lightning import LightningLoop
from benchmarks.rivals.loops import PlainLoop, PyTorchGAN, Task
from benchmarks.step import AGAINST_ALL, BFLOAT16, BFLOAT16_THROUGHOUT, Contestant
from benchmarks.timing import interleaved, speedup, step_clock
from ganscale.runtime import Runtime, is_out_of_memory
from ganscale.schema import Config
from ganscale.training.captured_steps import WARM_UP

OBJECTIVES = ("wgan_gp", "non_saturating", "r1", "r3gan")
RESOLUTIONS = {"cuda": (32, 64, 128, 256), "cpu": (32,)}
_BATCH = {"cuda": 64, "cpu": 4}
_CPU_SETTINGS = ("generator.options.width=4", "critic.options.width=4")
_CASE_SECONDS, _ROUNDS = 8.0, 15
_REUSE = "training.reuse_fakes=true"
_GRAPHS, _GRAPHS_UP_TO = "training.cuda_graphs=true", 64  # pixels


@dataclass(frozen=True)
class StepRow(Row):
    """percent_of_peak: of a matrix product's; rivals: the ratio of each that is comparable"""

    images_per_second: float | None = None
    percent_of_peak: float | None = None
    rivals: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """Settings of ours, the precision of its rivals, and the dtypes of penalties and the rest."""

    name: str
    settings: tuple[str, ...]
    precision: str
    dtypes: tuple[torch.dtype, torch.dtype]

    @property
    def reuses_fakes(self) -> bool:
        return _REUSE in self.settings

    @property
    def has_graphs(self) -> bool:
        return _GRAPHS in self.settings


@dataclass(frozen=True)
class Case:
    objective: str
    network: str
    device: torch.device

    @property
    def name(self) -> str:
        return f"{self.objective}/{self.network}"

    def config(self, *settings: str) -> Config:
        tiny = _CPU_SETTINGS if self.device.type == "cpu" else ()
        batch = _BATCH[self.device.type]
        return config_of(self.objective, self.network, batch, *tiny, *settings)

    def variants(self) -> list[Variant]:
        objective, single, half = self.config().objective, torch.float32, torch.bfloat16
        throughout = BFLOAT16_THROUGHOUT if objective.penalties else (BFLOAT16,)
        plain = Variant("f32", (), "f32", (single, single))
        autocast = Variant("bf16", throughout, "bf16", (half, half))
        mixed = Variant("bf16_penalty_f32", (BFLOAT16,), "bf16_penalty_f32", (single, half))
        found = [plain, autocast, *([mixed] if objective.penalties else [])]
        if objective.n_critic == 1:  # with more, rivals reuse none or few of them
            found += [
                replace(each, name=f"{each.name}_reuse_fakes", settings=(*each.settings, _REUSE))
                for each in (plain, autocast)
            ]
        if int(kind_of(self.network)[1]) <= _GRAPHS_UP_TO:
            found += [
                replace(each, name=f"{each.name}_cuda_graphs", settings=(*each.settings, _GRAPHS))
                for each in (plain, autocast)
            ]
        return found


def cases(device: torch.device) -> list[Case]:
    """The most wanted first."""
    resolutions = RESOLUTIONS[device.type]
    networks = [f"{kind}{size}" for kind in ("dcgan", "resnet") for size in resolutions]
    return [Case(objective, network, device) for network in networks for objective in OBJECTIVES]


class Rivals:
    """Those of a case, by precision and name; `missing` says why others are not there."""

    def __init__(self, case: Case, networks: Ours) -> None:
        self.missing: dict[str, str] = {}
        self.found: dict[str, dict[str, Contestant]] = {"f32": {}, "bf16": {}}
        makers: list[Callable[[Task], Contestant]] = [PlainLoop, PyTorchGAN, LightningLoop]
        makers += [Mimicry] if case.objective in AGAINST_ALL else []
        tasks = {"f32": case.config(), "bf16": case.config(BFLOAT16)}
        for precision, config in tasks.items():
            for make in makers:
                name = make.name  # type: ignore[attr-defined]
                task = replace(networks.task(), config=config)
                try:
                    contestant = make(task)
                    contestant()
                except Exception as reason:  # whatever a library raises on this machine
                    if is_out_of_memory(reason):
                        raise
                    self.missing[name] = " ".join(str(reason).split())[:200]
                else:
                    self.found[precision][name] = contestant
        if tasks["f32"].objective.penalties:
            task = replace(networks.task(), config=tasks["bf16"])
            plain = PlainLoop(task, penalty_in_float32=True)
            self.found["bf16_penalty_f32"] = {PlainLoop.name: plain}

    def comparable(self, variant: Variant) -> list[str]:
        """Those that sample as the variant does, or more cheaply where it is as cheap."""
        rivals = self.found[variant.precision]
        return [name for name in rivals if variant.reuses_fakes or not rivals[name].reuses_fakes]

    def contestants(self) -> dict[str, Contestant]:
        return {
            f"{p} {name}": each for p, named in self.found.items() for name, each in named.items()
        }

    def close(self) -> None:
        for contestant in self.contestants().values():
            contestant.close()


class OwnVariants:
    """Ours of a case by variant; `missing` says why others are not there, and `failures` counts
    those that should be."""

    def __init__(self, case: Case, runtime: Runtime, images: Tensor) -> None:
        self.found: dict[str, Ours] = {}
        self.missing: dict[str, str] = {}
        self.failures = 0
        for variant in case.variants():
            if variant.has_graphs and runtime.device.type != "cuda":
                self.missing[variant.name] = f"not measured: no CUDA graphs on {runtime.device}"
                continue
            try:
                own = Ours(case.config(*variant.settings), runtime, images)
                for _ in range(WARM_UP + 1 if variant.has_graphs else 0):
                    own()
            except Exception as error:
                if not variant.has_graphs:
                    raise
                self.missing[variant.name] = _reason(error)
                self.failures += not is_out_of_memory(error)
            else:
                self.found[variant.name] = own


def measure(
    case: Case, runtime: Runtime, peaks: dict[torch.dtype, float], limit_seconds: float
) -> tuple[list[Row], int]:
    """A row for each variant, and how many of those with CUDA graphs failed; `peaks` are in
    operations per second."""
    torch.manual_seed(0)
    images = random_images(case.config(), runtime.device)
    ours = OwnVariants(case, runtime, images)
    task = ours.found["f32"].task()
    rivals = Rivals(case, ours.found["f32"])
    contestants: dict[str, Callable[[], object]] = {**ours.found, **rivals.contestants()}
    try:
        cycles = cycles_per_turn(contestants[f"f32 {PlainLoop.name}"])
        seconds = interleaved(
            contestants,
            _ROUNDS,
            clock=step_clock,
            prepare=lambda contestant: next_cycles(contestant, cycles),
            limit_seconds=limit_seconds,
        )
    finally:
        rivals.close()
    needed = useful_operations(task.config, task.generator, task.critic, task.images)
    missing = [f"{name} not measured: {why}" for name, why in rivals.missing.items()]
    rows: list[Row] = []
    for variant in case.variants():
        row_name = f"step/{case.name}/{variant.name}"
        if variant.name in ours.missing:
            rows.append(Row(row_name, "", nan, note=ours.missing[variant.name]))
            continue
        own = [each / cycles for each in seconds[variant.name]]
        ratios: dict[str, tuple[float, float, float]] = {}
        for name in rivals.comparable(variant):
            theirs = [each / cycles for each in seconds[f"{variant.precision} {name}"]]
            ratios[name] = speedup(theirs, own)
        fastest = min(ratios, key=lambda name: ratios[name][0])
        penalty, rest = variant.dtypes
        least = needed.penalty / peaks[penalty] + needed.rest / peaks[rest]
        median = statistics.median(own)
        shown = f"ours {1000 * median:.2f} ms per cycle of batch {len(images)}"
        rows.append(
            StepRow(
                row_name,
                fastest,
                *ratios[fastest],
                "x faster",
                ", ".join([shown, *missing]),
                images_per_second=task.config.objective.n_critic * len(images) / median,
                percent_of_peak=100 * least / median,
                rivals={name: ratio for name, (ratio, _, _) in ratios.items()},
            )
        )
    return rows, ours.failures


def _reason(error: Exception) -> str:
    """Why there is no measurement, after printing the rest."""
    traceback.print_exception(error)
    return f"not measured: {'out of memory' if is_out_of_memory(error) else repr(error)}"


def _product_peaks(device: torch.device) -> dict[torch.dtype, float]:
    """Operations per second of a large matrix product."""
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        product, operations = matrix_product(dtype, device)
        times = interleaved({"": product}, 15, clock=step_clock)[""]
        peaks[dtype] = operations / statistics.median(times)
    return peaks


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only such rows")
    parser.add_argument("--seconds", type=float, default=400.0, help="when to end (default: 400)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runtime, deadline = Runtime.start(), time.monotonic() + options.seconds
    peaks = _product_peaks(runtime.device)
    chosen = [case for case in cases(runtime.device) if options.only in f"step/{case.name}"]
    rows = [
        Row(f"step/peak/{dtype}", "", peak / 1e12, unit="TFLOP/s of a matrix product")
        for dtype, peak in peaks.items()
    ]
    failures = 0
    for done, case in enumerate(chosen):
        left = (deadline - time.monotonic()) / (len(chosen) - done)
        reason = "not measured: no time was left" if left <= 0 else ""
        if not reason:
            try:
                # Building the contestants and warming them up takes about as long as measuring.
                found, failed = measure(case, runtime, peaks, min(_CASE_SECONDS, left) / 2)
            except Exception as error:  # the other cases are worth their time
                reason = _reason(error)
                failures += not is_out_of_memory(error)
            else:
                rows += found
                failures += failed
        if reason:
            rows.append(Row(f"step/{case.name}/*", "", nan, note=reason))
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        write(rows, options.json)
    print(table(rows))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
