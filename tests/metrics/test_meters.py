"""Meters are averaged over the steps that had them, are read once, and survive a restart."""

import itertools
import json
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ganscale.metrics.meters import MeterAccumulator, NormOf, Scaled


def add(meters: MeterAccumulator, **values: float) -> None:
    meters.add({name: torch.tensor(value) for name, value in values.items()})


def test_a_meter_is_averaged_over_the_steps_that_had_it(runtime):
    meters = MeterAccumulator(runtime)
    for critic, real in ((1.0, 10.0), (2.0, 20.0), (6.0, 60.0)):
        add(meters, critic=critic, real=real)
    add(meters, generator=5.0)
    add(meters, critic=3.0, real=30.0, panel=7.0)  # the last step of a cycle has more meters
    assert meters.read() == {"critic": 3.0, "real": 30.0, "generator": 5.0, "panel": 7.0}


def test_the_largest_of_maxima_is_read_and_reset(runtime):
    meters = MeterAccumulator(runtime)
    for largest in (-3.0, -1.0, -2.0):
        meters.add({"loss": torch.tensor(1.0)}, {"norm": torch.tensor(largest)})
    meters.add({"loss": torch.tensor(3.0)}, {"norm": torch.tensor(-1.5), "other": torch.tensor(7)})
    assert meters.read() == {"loss": 1.5, "norm": -1.0, "other": 7.0}
    meters.add({"loss": torch.tensor(1.0)}, {"norm": torch.tensor(-5.0)})
    assert meters.read() == {"loss": 1.0, "norm": -5.0}


def test_a_meter_may_be_a_number_a_multiple_or_a_norm(runtime):
    meters, one, two = MeterAccumulator(runtime), torch.tensor(-1.0), torch.tensor(2.0)
    for factor in (1.0, 3.0):
        meters.add({"a": factor, "b": Scaled(one, factor), "c": NormOf((2 * two, 3 * one))})
    meters.add({"a": 5.0}, {"c_max": NormOf((two, two, one))})
    assert meters.read() == {"a": 3.0, "b": -2.0, "c": 5.0, "c_max": 3.0}


def test_reading_resets(runtime):
    meters = MeterAccumulator(runtime)
    add(meters, loss=1.0)
    assert meters.read() == {"loss": 1.0}
    assert meters.read() == {}
    add(meters, loss=3.0)
    assert meters.read() == {"loss": 3.0}


def test_the_order_of_meters_does_not_matter(runtime):
    meters = MeterAccumulator(runtime)
    add(meters, a=1.0, b=2.0)
    add(meters, b=4.0, a=3.0)
    assert meters.read() == {"a": 2.0, "b": 3.0}


def test_sums_of_many_float32_values_are_exact(runtime):
    meters = MeterAccumulator(runtime)
    add(meters, loss=2.0**24)
    for _ in range(9):
        add(meters, loss=1.0)  # in float32, 2**24 + 1 is 2**24
    assert meters.read()["loss"] == (2**24 + 9) / 10


class Launches(TorchDispatchMode):
    """The operators within, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


def test_adding_launches_nothing_and_many_steps_are_reduced_at_once(runtime):
    meters = MeterAccumulator(runtime)
    steps = [torch.randn(4, 3) for _ in range(200)]
    counts = []
    for step in steps:
        logits, norms, first = {"real": step[:2], "fake": step[2:]}, {"norm": step[0]}, step[0, 0]
        with Launches() as launches:
            meters.add({"loss": first}, {"most": first}, norms, logits)
        counts.append(len(launches.operators))
    assert [index for index, count in enumerate(counts) if count] == [63, 127, 191]
    row = meters.read()
    values = torch.stack(steps).double()
    assert row["loss"] == pytest.approx(values[:, 0, 0].mean().item(), rel=1e-12)
    assert row["most"] == values[:, 0, 0].max()
    assert row["norm"] == pytest.approx(values[:, 0].mean().item(), rel=1e-12)
    assert row["norm_max"] == values[:, 0].max()
    assert row["logits/fake_mean"] == pytest.approx(values[:, 2:].mean().item(), rel=1e-12)


@pytest.mark.parametrize("portions", [[1] * 100, [63, 2, 35], [30, 70]])
def test_sums_are_the_same_bits_however_often_they_are_saved(runtime, portions):
    whole, saved = MeterAccumulator(runtime), MeterAccumulator(runtime)
    steps = torch.randn(100, 2, 8, 5, generator=torch.Generator().manual_seed(1))
    loads = iter(steps)
    for step in steps:
        whole.add({"loss": step[0, 0, 0]}, {}, {}, {"real": step[0], "fake": step[1]})
    for portion in portions:
        for step in itertools.islice(loads, portion):
            saved.add({"loss": step[0, 0, 0]}, {}, {}, {"real": step[0], "fake": step[1]})
        continued = MeterAccumulator(runtime)
        continued.load_state(json.loads(json.dumps(saved.state())))
        saved = continued
    assert saved.read() == whole.read()


def test_meters_continue_from_a_checkpoint_as_if_never_stopped(runtime):
    whole, first, second = (MeterAccumulator(runtime) for _ in range(3))
    values = [0.1, 0.7, -3.3, 1e-9, 5.5]
    for meters, steps in ((whole, values), (first, values[:2])):
        for value in steps:
            add(meters, loss=value, norm=2 * value)
            meters.add({"b": torch.tensor(value)}, {"largest": torch.tensor(value)})
        add(meters, other=1.0)
    second.load_state(json.loads(json.dumps(first.state())))
    for value in values[2:]:
        add(second, loss=value, norm=2 * value)
        second.add({"b": torch.tensor(value)}, {"largest": torch.tensor(value)})
    assert second.read() == whole.read()
    assert whole.read() == {}


def test_saving_the_state_does_not_disturb_the_running_means(runtime):
    meters = MeterAccumulator(runtime)
    add(meters, loss=1.0)
    assert meters.state() == meters.state()
    add(meters, loss=2.0)
    assert meters.read() == {"loss": 1.5}
    assert MeterAccumulator(runtime).state() == []
