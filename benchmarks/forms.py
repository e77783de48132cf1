"""Which forms of a computation that are chosen by the device would be faster as on the other one.

    python -m benchmarks.forms [--seconds N] [--json FILE] [--only SUBSTRING]

Some sums are computed in one form on a CPU and in another on a GPU, for reasons that were measured
on a CPU. Here, cycles of WGAN-GP take turns, as they are and with one of these forms switched the
other way, or several where one needs another:

- `first_derivatives`: the functions of `fast_derivatives` also where nothing is differentiated
  twice, among them matrix products for layers that amount to one
- `subpixel`: strided layers to and from images as sub-pixel convolutions; where there are no
  `first_derivatives`, in penalties only
- `im2col`: weight gradients of small maps in bfloat16 as matrix products, likewise
- `unpool`: copies as the gradient of an average pool
- `fakes_together`: the fakes of all critic steps from one forward
- `shared_forward`: real and fake images in one forward, for R1, R2 and some losses

`all` switches all of them. The ratio is the time of the switched cycle over that of the cycle as it
is, the median of rounds; low and high are its quartiles. Below 1, the form should be chosen on this
device, too. Forms that make no difference to a cycle are left out.

Batches are of 64 images; on a CPU, of 4, for tiny networks, to see that it works.
"""

import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import nan
from types import ModuleType
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.limit import PRECISIONS
from benchmarks.ours import Ours, config_of, cycles_per_turn, next_cycles, random_images
from benchmarks.report import Row, argument_parser, table, write
from benchmarks.timing import interleaved, speedup, step_clock
from ganscale.objectives import double_backward, fast_convolutions, fast_derivatives
from ganscale.runtime import Runtime, is_out_of_memory
from ganscale.training import cycle as training_cycle
from ganscale.training import step_forwards
from ganscale.training.cycle import Cycle
from ganscale.training.device_batch import DeviceBatch

Place = tuple[ModuleType, str]  # a function that asks for the device

_PLACES: dict[str, tuple[Place, ...]] = {
    "first_derivatives": ((fast_derivatives, "has_cheap_launches"),),
    "subpixel": tuple(
        (module, "is_subpixel_faster") for module in (fast_convolutions, fast_derivatives)
    ),
    "im2col": tuple(
        (module, "is_im2col_faster") for module in (fast_convolutions, fast_derivatives)
    ),
    "unpool": ((double_backward, "has_cheap_launches"),),
    "fakes_together": ((training_cycle, "has_cheap_launches"),),
    "shared_forward": ((step_forwards, "has_cheap_launches"),),
}
FORMS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in _PLACES},
    "subpixel+first_derivatives": ("subpixel", "first_derivatives"),
    "im2col+first_derivatives": ("im2col", "first_derivatives"),
    "all": tuple(_PLACES),
}
NETWORKS = ("dcgan32", "resnet32")
_BATCH = {"cuda": 64, "cpu": 4}
_CPU_SETTINGS = ("generator.options.width=4", "critic.options.width=4")
_ROUNDS = 21


class Switched(Ours):
    """The cycle of `ours`, on the same state, with forms switched the other way. `effects` are the
    forms on which something has depended."""

    def __init__(self, ours: Ours, forms: tuple[str, ...]) -> None:
        vars(self).update(vars(ours))
        self.effects: set[str] = set()
        self._functions = {
            place: self._other_way(form, *place) for form in forms for place in _PLACES[form]
        }
        with _in_place(self._functions):
            usual = ours.cycle
            self.cycle = Cycle(usual.config, usual.objective, usual.runtime, ours.state)

    def run(self, batches: list[DeviceBatch]) -> None:
        with _in_place(self._functions):
            super().run(batches)

    def _other_way(self, form: str, module: ModuleType, name: str) -> Callable[..., bool]:
        function: Callable[..., bool] = getattr(module, name)

        def of_a_device(device: torch.device) -> bool:
            self.effects.add(form)
            return not function(device)

        def of_a_weight(weight: Tensor, *others: Any) -> bool:
            is_faster_on_cpu = function(_on_cpu(weight.shape), *others)
            if is_faster_on_cpu:
                self.effects.add(form)
            return is_faster_on_cpu and weight.device.type != "cpu"

        return of_a_device if name == "has_cheap_launches" else of_a_weight


@cache
def _on_cpu(shape: torch.Size) -> Tensor:
    """A tensor of that shape without its memory."""
    return torch.empty(1).expand(shape)


@contextmanager
def _in_place(functions: Mapping[Place, Callable[..., bool]]) -> Iterator[None]:
    """unittest.mock would take longer than some operators."""
    originals = {place: getattr(*place) for place in functions}
    for (module, name), function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name), function in originals.items():
            setattr(module, name, function)


def measure(
    network: str, precision: str, runtime: Runtime, limit_seconds: float
) -> tuple[list[Row], int]:
    """A row for each of the FORMS that makes a difference, and how many failed."""
    torch.manual_seed(0)
    kind = runtime.device.type
    tiny = _CPU_SETTINGS if kind == "cpu" else ()
    config = config_of("wgan_gp", network, _BATCH[kind], *tiny, *PRECISIONS[precision])
    ours = Ours(config, runtime, random_images(config, runtime.device))
    contestants = {"": Switched(ours, ())}
    rows: list[Row] = []
    failures = 0
    for name, forms in FORMS.items():
        switched = Switched(ours, forms)
        try:
            switched.run(ours.batches())
        except Exception as error:  # the other forms are worth their time
            traceback.print_exception(error)
            is_short = is_out_of_memory(error)
            reason = f"not measured: {'out of memory' if is_short else repr(error)}"
            rows.append(Row(f"{network}/{precision}/{name}", "", nan, note=reason))
            failures += not is_short
        else:
            if name == "all" or switched.effects == {*forms}:
                contestants[name] = switched

    count = cycles_per_turn(contestants[""])
    seconds = interleaved(
        contestants,
        _ROUNDS,
        clock=step_clock,
        prepare=lambda contestant: next_cycles(contestant, count),
        limit_seconds=limit_seconds,
    )
    as_it_is = seconds.pop("")
    milliseconds = 1000 * statistics.median(as_it_is) / count
    note = f"as it is {milliseconds:.2f} ms a cycle of batch {_BATCH[kind]}"
    for name, turns in seconds.items():
        ratios = speedup(turns, as_it_is)
        rows.append(Row(f"{network}/{precision}/{name}", "as it is", *ratios, "of its time", note))
    return rows, failures


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only such cases")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="when to end, from the start (default: 120)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Imports may take some of a short time.
    deadline = psutil.Process().create_time() + options.seconds
    runtime, rows, failures = Runtime.start(), list[Row](), 0
    cases = [(network, precision) for precision in ("f32", "bf16") for network in NETWORKS]
    chosen = [case for case in cases if options.only in "/".join(case)]
    for done, case in enumerate(chosen):
        left = (deadline - time.time()) / (len(chosen) - done)
        if left > 0:
            found, failed = measure(*case, runtime, left / 2)  # building takes the other half
            failures += failed
        else:
            found = [Row(f"{'/'.join(case)}/*", "", nan, note="not measured: no time was left")]
        rows += found
        gc.collect()
        write(rows, options.json)
    print(table(rows))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
