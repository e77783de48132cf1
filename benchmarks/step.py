"""What a training cycle costs against the loops that people use.

    python -m benchmarks.step [--quick] [--json FILE] [--only SUBSTRING]

One cycle is `n_critic` critic steps and a generator step on images that lie ready: no data, no
logging. The rivals train copies of the same networks with loss, penalty, optimizer and batch alike:

- `plain loop`, `usual loop`, `PyTorch-GAN`, `Accelerate loop`: benchmarks/rivals/loops.py
- `PyTorch Lightning`: its documentation's GAN, in a real Trainer (benchmarks/rivals/lightning.py)
- `torchgan`, `torch-mimicry`: their own training steps (benchmarks/rivals/libraries.py)

A row stands for an objective (of configs/objective), networks with their resolution, and precision:

- `f32`
- `bf16_penalty_f32`, or `bf16` without a penalty: ours with the penalty in float32, as by default;
  rivals under autocast as they are used, so with theirs in bfloat16
- `bf16`: our penalty in bfloat16, too (training.penalty_precision=autocast)
- `bf16_lazy4`: our penalty at every 4th critic step: another algorithm than the rivals'
- `f32_reuse_fakes`, `bf16_reuse_fakes`: our generator's step takes the fakes of the critic's last
  one, as Lightning's and PyTorch-GAN's do: another sampling

Rows hold ours against the fastest rival; the note has all of them. The ratio is the rival's time
over ours, the median of rounds in which all took their turn; low and high are its quartiles. Times
are of the processor, one thread (on a GPU: of the wall clock).

Rivals: make rivals. One that cannot be imported is "not measured".
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.ours import CONFIGS, Ours, config_of, random_images
from benchmarks.report import Row, report
from benchmarks.rivals.libraries import Mimicry, NotMeasured, TorchGAN
from benchmarks.rivals.lightning import LightningLoop
from benchmarks.rivals.loops import AccelerateLoop, PlainLoop, PyTorchGAN, Task, UsualLoop
from benchmarks.timing import interleaved, speedup, step_clock
from ganscale.runtime import Runtime

NETWORKS = ("dcgan32", "resnet32", "dcgan64", "resnet64")
AGAINST_ALL = ("wgan_gp", "non_saturating")
QUICK = (
    "wgan_gp/dcgan32/f32",
    "wgan_gp/resnet32/f32",
    "wgan_gp/resnet32/bf16_penalty_f32",
    "non_saturating/resnet32/f32",
)


class Contestant(Protocol):
    def __call__(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Variant:
    """What we are run with, beside objective and networks.

    like_for_like: whether the rivals compute the same
    """

    name: str
    settings: tuple[str, ...]
    note: str = ""
    cycles: int = 1  # to a turn of ours, so that turns are alike

    @property
    def is_bfloat16(self) -> bool:
        return self.name.startswith("bf16")


@dataclass(frozen=True)
class Case:
    objective: str
    network: str
    variant: Variant

    @property
    def name(self) -> str:
        return f"{self.objective}/{self.network}/{self.variant.name}"


def variants(objective: str) -> list[Variant]:
    """The precisions, and for the two main objectives what changes the algorithm, too."""
    has_penalty = bool(config_of(objective, "dcgan32", 16).objective.penalties)
    bfloat16 = "training.precision=bfloat16"
    found = [Variant("f32", ())]
    if not has_penalty:
        found.append(Variant("bf16", (bfloat16,)))
    else:
        found += [
            Variant("bf16_penalty_f32", (bfloat16,)),
            Variant("bf16", (bfloat16, "training.penalty_precision=autocast")),
        ]
    if objective == "wgan_gp":
        lazy = (bfloat16, "objective.penalties.wgan_gp.interval=4")
        found.append(Variant("bf16_lazy4", lazy, "another algorithm: a penalty in 4 steps", 4))
    if objective == "non_saturating":
        reuses, note = "training.reuse_fakes=true", "another sampling: fakes serve both steps"
        found.append(Variant("f32_reuse_fakes", (reuses,), note))
        found.append(Variant("bf16_reuse_fakes", (bfloat16, reuses), note))
    return found


def cases() -> list[Case]:
    """The two main objectives on all networks, the others at 32 pixels."""
    main = [(objective, network) for objective in AGAINST_ALL for network in NETWORKS]
    names = sorted(path.stem for path in (CONFIGS / "objective").glob("*.yaml"))
    others = [(o, n) for o in names if o not in AGAINST_ALL for n in NETWORKS if n.endswith("32")]
    return [Case(*pair, variant) for pair in main + others for variant in variants(pair[0])]


def rivals_of(case: Case) -> dict[str, Callable[[Task], Contestant]]:
    plain: list[Callable[[Task], Contestant]] = [PlainLoop, UsualLoop]
    all_others = [PyTorchGAN, AccelerateLoop, LightningLoop, TorchGAN, Mimicry]
    chosen = plain + (all_others if case.objective in AGAINST_ALL else [])
    return {rival.name: rival for rival in chosen}  # type: ignore[attr-defined]


def measure(
    case: Case, runtime: Runtime, batch: int, rounds: int, warm_up: int = 2
) -> Iterator[Row]:
    """The case's row, and one for each rival that could not be run."""
    torch.manual_seed(0)
    config = config_of(case.objective, case.network, batch, *case.variant.settings)
    images = random_images(config, runtime.device)
    ours = Ours(config, runtime, images)
    contestants: dict[str, Contestant] = {}
    for name, rival in rivals_of(case).items():
        try:
            contestants[name] = rival(ours.task())
        except (NotMeasured, ImportError) as reason:
            yield Row(case.name, name, nan, note=f"not measured: {reason}")
    # For the note: not the way people run them, but what they would be without autocast's error.
    exact: dict[str, Contestant] = {}
    if case.variant.is_bfloat16:
        full = config_of(case.objective, case.network, batch)
        exact["float32 plain loop"] = PlainLoop(replace(ours.task(), config=full))
        if config.objective.penalties:
            exact["plain loop with float32 penalty"] = PlainLoop(
                ours.task(), penalty_in_float32=True
            )

    def our_turn() -> None:
        for _ in range(case.variant.cycles):
            ours()

    everybody = {"ours": our_turn, **contestants, **exact}
    seconds = interleaved(everybody, rounds, warm_up, step_clock)
    for contestant in [*contestants.values(), *exact.values()]:
        contestant.close()
    own = [turn / case.variant.cycles for turn in seconds["ours"]]
    found = {name: speedup(seconds[name], own) for name in everybody if name != "ours"}
    fastest = min(contestants, key=lambda name: found[name][0])
    said = [case.variant.note] if case.variant.note else []
    said += [f"{name} {ratio:.2f}" for name, (ratio, _, _) in found.items()]
    said.append(f"ours {1000 * statistics.median(own):.0f} ms a cycle of batch {batch}")
    yield Row(case.name, fastest, *found[fastest], "x faster", ", ".join(said))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few rows, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="rows with it in their name"
    )
    return parser.parse_args()


def chosen_cases(quick: bool, only: str) -> Sequence[Case]:
    found = [case for case in cases() if only in case.name]
    return [case for case in found if case.name in QUICK] if quick and not only else found


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
