"""How many operators a cycle dispatches on a GPU's path, and how long the host takes for that.

    python -m benchmarks.launches [--quick] [--json FILE] [--only SUBSTRING]

A GPU computes small networks faster than the host can launch their operators. There, a cycle takes
as long as the host needs for it, so operators and Python are what has to be few.

- `launches/OBJECTIVE/NETWORK`: operators of one cycle with networks of width 4 and a batch of 4, or
  the mean over as many as all lazy penalties take;
  views and allocations, which launch nothing, are left out
- `host/OBJECTIVE/NETWORK`: processor time of a cycle with networks of width 1 and a batch of 2,
  which compute next to nothing; the median of interleaved cycles, and its quartiles

The rival is the plain loop of benchmarks/rivals/loops.py with the same networks. Batches are on the
device at the start, ours with the random numbers that the loader's process made for them. The ratio
is ours over the rival's: below 1, we launch less. It is counted on a CPU as a GPU would compute it:
random words by tensor operations, and none of the forms that are for CPUs only (`gpu_path`).
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ours import CONFIGS, Ours, config_of, lazy_cycles, narrow, random_images
from benchmarks.report import Row, argument_parser, report
from benchmarks.rivals.loops import PlainLoop
from benchmarks.timing import speedup, step_clock
from ganscale import randomness
from ganscale.objectives import double_backward, fast_convolutions, fast_derivatives
from ganscale.runtime import Runtime
from ganscale.training import cycle, step_forwards

OBJECTIVES = tuple(sorted(path.stem for path in (CONFIGS / "objective").glob("*.yaml")))
NETWORKS = ("dcgan32", "resnet32")
OWN_NETWORKS = {"r3gan": ("r3gan32",), "r1": ("stylegan2-32",)}  # as a paper has them
QUICK = ("wgan_gp/dcgan32", "wgan_gp/resnet32", "r3gan/dcgan32", "non_saturating/dcgan32")
_NO_LAUNCH = {
    torch.ops.aten._unsafe_view,
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
}
_WARM_UP = 2  # cycles: the first ones make the optimizers' state


class OperatorCounter(TorchDispatchMode):
    """Counts the operators within by name, but for those that launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._overloadpacket not in _NO_LAUNCH:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def gpu_path() -> Iterator[None]:
    """Within, a CPU computes by the operators that a GPU would launch."""

    def on_device(counter: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
        return randomness._philox_on_device(counter, key)

    with ExitStack() as patches:
        patches.enter_context(patch.object(randomness, "philox", on_device))
        for module, name in (
            (fast_convolutions, "is_subpixel_faster"),
            (fast_convolutions, "is_im2col_faster"),
            (fast_derivatives, "is_subpixel_faster"),
            (fast_derivatives, "is_im2col_faster"),
            (fast_derivatives, "has_cheap_launches"),
            (double_backward, "has_cheap_launches"),
            (cycle, "has_cheap_launches"),
            (step_forwards, "has_cheap_launches"),
        ):
            patches.enter_context(patch.object(module, name, lambda *_: False))
        yield


def contestants(objective: str, network: str, width: int, batch: int) -> tuple[Ours, PlainLoop]:
    """Our cycle and the plain loop with copies of its networks."""
    config = config_of(objective, network, batch, *narrow(network, width))
    runtime = Runtime.start()
    ours = Ours(config, runtime, random_images(config, runtime.device))
    return ours, PlainLoop(ours.task())


def operators(contestant: Ours | PlainLoop, cycles: int = 1) -> Counter[str]:
    """Of all these cycles, by name."""
    for _ in range(_WARM_UP):
        contestant()
    counts: Counter[str] = Counter()
    for _ in range(cycles):
        run = cycle_of(contestant)
        with OperatorCounter() as counter:
            run()
        counts += counter.counts
    return counts


def cycle_of(contestant: Ours | PlainLoop) -> Callable[[], None]:
    """The next cycle, without what a loader does for it."""
    if isinstance(contestant, PlainLoop):
        return contestant
    return partial(contestant.run, contestant.batches())


def launches(objective: str, network: str) -> Row:
    cycles = lazy_cycles(config_of(objective, network, 4))
    both = contestants(objective, network, 4, 4)
    own, rival = (operators(each, cycles).total() / cycles for each in both)
    note = f"ours {own:.0f}, plain loop {rival:.0f}"
    name = f"launches/{objective}/{network}"
    return Row(name, PlainLoop.name, own / rival, unit="of its operators", note=note)


def host(objective: str, network: str, rounds: int) -> Row:
    both = dict(zip(("ours", "rival"), contestants(objective, network, 1, 2), strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for turn in range(_WARM_UP + rounds):
        for name, contestant in both.items():
            run = cycle_of(contestant)
            started = step_clock()
            run()
            if turn >= _WARM_UP:
                seconds[name].append(step_clock() - started)
    medians = {name: 1000 * statistics.median(turns) for name, turns in seconds.items()}
    note = f"ours {medians['ours']:.1f} ms a cycle, plain loop {medians['rival']:.1f}"
    ratios = speedup(seconds["ours"], seconds["rival"])
    name = f"host/{objective}/{network}"
    return Row(name, PlainLoop.name, *ratios, unit="of its time", note=note)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--only", default="", metavar="SUBSTRING", help="only rows whose name contains it"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = [(o, n) for o in OBJECTIVES for n in (*NETWORKS, *OWN_NETWORKS.get(o, ()))]
    is_short = options.quick and not options.only
    rows: list[Row] = []
    with gpu_path():
        for case in cases:
            name = "/".join(case)
            if is_short and name not in QUICK:
                continue
            if options.only in f"launches/{name}":
                rows.append(launches(*case))
            if options.only in f"host/{name}":
                rows.append(host(*case, rounds=11 if options.quick else 51))
    report(rows, options.json)


if __name__ == "__main__":
    main()
