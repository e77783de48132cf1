"""What a training cycle costs compared with the loops that people use.

    python -m benchmarks.step [--quick] [--json FILE] [--only SUBSTRING]

One cycle is `n_critic` critic steps and a generator step on images in memory: no data, no logging.
The rivals train copies of the same networks with the same loss, penalty, optimizer and batch:

- `plain loop`, `usual loop`, `PyTorch-GAN`, `Accelerate loop`: benchmarks/rivals/loops.py
- `PyTorch Lightning`: its documentation's GAN, in a real Trainer (benchmarks/rivals/lightning.py)
- `torchgan`, `torch-mimicry`: their own training steps (benchmarks/rivals/libraries.py)

There is a row for each objective (of configs/objective), networks with their resolution, and
settings of ours:

- `f32`
- `bf16_penalty_f32`, or `bf16` without a penalty: the penalty in float32, as by default
- `bf16`: the penalty in bfloat16 too (training.penalty_precision=autocast)
- `bf16_lazy4`: also a penalty in every 4th critic step only, unlike the rivals
- `f32_reuse_fakes`, `bf16_reuse_fakes`: the generator step takes the fakes of the last critic step,
  as Lightning and PyTorch-GAN do, which is a different sampling

Rivals compute as their users run them: in float32 and contiguous memory format. A row compares ours
with the fastest rival of the same sampling; those that use all fakes for both steps only count in
the reuse_fakes rows. Its note has all rivals, and for rows in bfloat16 also the comparison under
the same autocast, including the penalty. The ratio is the rival's time over ours, the median of
interleaved rounds; low and high are its quartiles. All rows of an objective and its networks come
from the same rounds. Times are processor times of one thread (on a GPU: wall-clock times).

Install rivals with `make rivals`. One that cannot be imported is "not measured".
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.ours import CONFIGS, Ours, config_of, lazy_cycles, random_images
from benchmarks.report import Row, report
from benchmarks.rivals.libraries import Mimicry, NotMeasured, TorchGAN
from benchmarks.rivals.lightning import LightningLoop
from benchmarks.rivals.loops import AccelerateLoop, PlainLoop, PyTorchGAN, Task, UsualLoop
from benchmarks.timing import interleaved, speedup, step_clock
from ganscale.runtime import Runtime

NETWORKS = ("dcgan32", "resnet32", "dcgan64", "resnet64")
# With the objective that a paper made them for; StyleGAN2's also without its lazy penalties.
OWN_NETWORKS = [("r3gan", "r3gan32"), ("r1", "stylegan2-32"), ("non_saturating", "stylegan2-32")]
BFLOAT16 = "training.precision=bfloat16"
BFLOAT16_THROUGHOUT = (BFLOAT16, "training.penalty_precision=autocast")
AGAINST_ALL = ("wgan_gp", "non_saturating")
QUICK = (
    "wgan_gp/dcgan32/f32",
    "wgan_gp/resnet32/f32",
    "wgan_gp/resnet32/bf16_penalty_f32",
    "non_saturating/resnet32/f32",
)


class Contestant(Protocol):
    @property
    def reuses_fakes(self) -> bool: ...
    def __call__(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Variant:
    """Settings of ours, on top of objective and networks."""

    name: str
    settings: tuple[str, ...]
    note: str = ""
    cycles: int = 1  # in a turn of ours, for one of a rival

    @property
    def is_bfloat16(self) -> bool:
        return self.name.startswith("bf16")

    @property
    def reuses_fakes(self) -> bool:
        return self.name.endswith("reuse_fakes")


@dataclass(frozen=True)
class Case:
    objective: str
    network: str
    variants: tuple[Variant, ...]

    @property
    def name(self) -> str:
        return f"{self.objective}/{self.network}"

    @property
    def cycles(self) -> int:
        """In a turn."""
        return lazy_cycles(config_of(self.objective, self.network, 16))


def variants_of(objective: str) -> list[Variant]:
    """The precisions, and for the two main objectives also changes of the algorithm."""
    has_penalty = bool(config_of(objective, "dcgan32", 16).objective.penalties)
    variants = [Variant("f32", ())]
    if not has_penalty:
        variants.append(Variant("bf16", (BFLOAT16,)))
    else:
        variants += [Variant("bf16_penalty_f32", (BFLOAT16,)), Variant("bf16", BFLOAT16_THROUGHOUT)]
    if objective == "wgan_gp":
        note = "different algorithm: a penalty in one of 4 steps"
        lazy = (*BFLOAT16_THROUGHOUT, "objective.penalties.wgan_gp.interval=4")
        variants.append(Variant("bf16_lazy4", lazy, note, 4))
    if objective == "non_saturating":
        reuses, note = "training.reuse_fakes=true", "different sampling: fakes serve both steps"
        variants.append(Variant("f32_reuse_fakes", (reuses,), note))
        variants.append(Variant("bf16_reuse_fakes", (BFLOAT16, reuses), note))
    return variants


def cases() -> list[Case]:
    """The two main objectives on all networks, the others at 32 pixels and on their own."""
    main = [(objective, network) for objective in AGAINST_ALL for network in NETWORKS]
    names = sorted(path.stem for path in (CONFIGS / "objective").glob("*.yaml"))
    others = [(o, n) for o in names if o not in AGAINST_ALL for n in NETWORKS if n.endswith("32")]
    return [Case(*pair, tuple(variants_of(pair[0]))) for pair in main + others + OWN_NETWORKS]


def rivals_of(objective: str) -> dict[str, Callable[[Task], Contestant]]:
    plain: list[Callable[[Task], Contestant]] = [PlainLoop, UsualLoop]
    others = [PyTorchGAN, AccelerateLoop, LightningLoop, TorchGAN, Mimicry]
    rivals = plain + (others if objective in AGAINST_ALL else [])
    return {rival.name: rival for rival in rivals}  # type: ignore[attr-defined]


def measure(
    case: Case, runtime: Runtime, batch: int, rounds: int, warm_up: int = 2
) -> Iterator[Row]:
    """The case's rows, and one for each rival that cannot be run."""
    torch.manual_seed(0)
    config = config_of(case.objective, case.network, batch)
    images = random_images(config, runtime.device)
    networks = Ours(config, runtime, images)  # rivals get copies of them

    float32: dict[str, Contestant] = {}
    for name, rival in rivals_of(case.objective).items():
        try:
            float32[name] = rival(networks.task())
        except (NotMeasured, ImportError) as reason:
            yield Row(f"{case.name}/*", name, math.nan, note=f"not measured: {reason}")
    autocast: dict[str, Contestant] = {}
    if any(variant.is_bfloat16 for variant in case.variants):
        in_bfloat16 = config_of(case.objective, case.network, batch, BFLOAT16)
        for name in float32:
            task = replace(networks.task(), config=in_bfloat16)
            autocast[name] = rivals_of(case.objective)[name](task)
        if config.objective.penalties:
            task = replace(networks.task(), config=in_bfloat16)
            plain = PlainLoop(task, penalty_in_float32=True)
            autocast["plain loop with a float32 penalty"] = plain

    contestants: dict[str, Callable[[], object]] = {}
    for variant in case.variants:
        settings = config_of(case.objective, case.network, batch, *variant.settings)
        own = Ours(settings, runtime, images)
        contestants[variant.name] = _turn(own, variant.cycles * case.cycles)
    for precision, rivals in ("float32", float32), ("autocast", autocast):
        contestants |= {f"{precision} {n}": _turn(r, case.cycles) for n, r in rivals.items()}
    seconds = interleaved(contestants, rounds, warm_up, step_clock)
    for contestant in [*float32.values(), *autocast.values()]:
        contestant.close()

    for variant in case.variants:
        ours = [turn / variant.cycles for turn in seconds[variant.name]]
        milliseconds = 1000 * statistics.median(ours) / case.cycles
        speedups = {name: speedup(seconds[f"float32 {name}"], ours) for name in float32}
        comparable = [n for n in float32 if variant.reuses_fakes or not float32[n].reuses_fakes]
        fastest = min(comparable, key=lambda name: speedups[name][0])
        notes = [variant.note] if variant.note else []
        notes.append(f"ours {milliseconds:.0f} ms per cycle of batch {batch}")
        notes += [f"{name} {ratio:.2f}" for name, (ratio, _, _) in speedups.items()]
        if variant.is_bfloat16:
            same = [f"{n} {speedup(seconds[f'autocast {n}'], ours)[0]:.2f}" for n in autocast]
            notes.append(f"under the same autocast: {', '.join(same)}")
        name = f"{case.name}/{variant.name}"
        yield Row(name, fastest, *speedups[fastest], "x faster", ", ".join(notes))


def _turn(contestant: Callable[[], None], cycles: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(cycles):
            contestant()

    return run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="only rows whose name contains it"
    )
    return parser.parse_args()


def chosen_cases(quick: bool, only: str) -> list[Case]:
    """The cases and variants whose row names contain `only`."""
    selected = []
    for case in cases():
        names = {variant: f"{case.name}/{variant.name}" for variant in case.variants}
        chosen = [variant for variant, name in names.items() if only in name]
        if quick and not only:
            chosen = [variant for variant in chosen if names[variant] in QUICK]
        if chosen:
            selected.append(replace(case, variants=tuple(chosen)))
    return selected


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for case in chosen_cases(options.quick, options.only):
        batch = 64 if case.network.endswith("32") else 16
        size = (16, 3, 1) if options.quick else (batch, 9, 2)
        rows += measure(case, Runtime.start(), *size)
    report(rows, options.json)


if __name__ == "__main__":
    main()
