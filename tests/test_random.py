"""Draws in a forward depend on seed, purpose, slot, name and element, and on nothing else."""

import math
from collections.abc import Callable
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ganscale.errors import UserError
from ganscale.random import bernoulli_like, drawing, normal_like, uniform_like
from ganscale.randomness import squares_key
from tests.test_randomness import distance_to_distribution, reference_squares

SLOTS = torch.tensor([7, 0, 12, 2**33])
MANY = torch.arange(2000)
SITE = 3, ("critic/real",)


def drawn(draw: Callable[..., Tensor], *arguments: Any, slots: Tensor = SLOTS) -> Tensor:
    """Of 5 x 7 numbers for each slot."""
    with drawing(*SITE, slots):
        return draw(torch.zeros(len(slots), 5, 7), *arguments)


def three_layers(rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = torch.zeros(rows, 3, 5, 5, dtype=dtype)
    return [
        normal_like(x[:, :1], "noise/0"),
        uniform_like(x[:, 0, 0, 0], "mixing"),
        normal_like(x, "noise/1"),
        bernoulli_like(x, "dropout", 0.3),
    ]


def test_numbers_are_as_squares_and_box_and_muller_have_them():
    """Written out for one number: slot 5, element 3, the sine of the second pair."""
    with drawing(9, ("fakes",), torch.tensor([5])):
        normals = normal_like(torch.zeros(1, 4, dtype=torch.float64), "noise")
        uniforms = uniform_like(torch.zeros(1, 4), "mixing")

    def word(name: str, element: int) -> float:
        key = squares_key(repr((9, "fakes", name))) % 2**64
        return (reference_squares((5 << 30) + element, key) ^ 2**31) // 2**8 / 2**24

    radius = np.sqrt(-2 * np.log(1 - word("noise", 1)))
    expected = radius * np.sin(2 * np.pi * word("noise", 1 + 2**29))
    assert normals[0, 3].item() == pytest.approx(expected, rel=1e-14)
    assert uniforms[0, 3].item() == word("mixing", 3)


@pytest.mark.parametrize("draw", [normal_like, uniform_like])
def test_an_images_numbers_depend_on_its_slot_alone(draw):
    whole = drawn(draw, "noise")
    assert torch.equal(drawn(draw, "noise", slots=SLOTS[[2, 0]]), whole[[2, 0]])
    for row in range(4):
        assert torch.equal(drawn(draw, "noise", slots=SLOTS[row : row + 1]), whole[row : row + 1])


def test_a_joint_forward_draws_what_separate_ones_draw():
    with drawing(3, ("real", "fake"), SLOTS):
        joint = three_layers(8)
    for purpose, half in (("real", slice(0, 4)), ("fake", slice(4, 8))):
        with drawing(3, (purpose,), SLOTS):
            separate = three_layers(4)
        assert all(torch.equal(j[half], s) for j, s in zip(joint, separate, strict=True))


def test_what_else_a_forward_draws_changes_no_number():
    """Neither in this forward nor in the one before, whose draws are made together."""
    with drawing(11, ("fakes",), SLOTS):
        first = three_layers(4)
    with drawing(11, ("fakes",), SLOTS):
        second = three_layers(4)
    with drawing(11, ("fakes",), SLOTS):
        backwards = [
            bernoulli_like(torch.zeros(4, 3, 5, 5), "dropout", 0.3),
            normal_like(torch.zeros(4, 2), "another"),
            uniform_like(torch.zeros(4), "mixing"),
        ]
    with drawing(11, ("fakes",), SLOTS):
        third = three_layers(4)
    for later in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(first, later, strict=True))
    assert torch.equal(backwards[0], first[3])
    assert torch.equal(backwards[2], first[1])


def test_float64_has_the_numbers_of_float32_without_their_rounding():
    with drawing(*SITE, SLOTS):
        wide = three_layers(4, torch.float64)
    with drawing(*SITE, SLOTS):
        narrow = three_layers(4)
    assert {each.dtype for each in wide} == {torch.float64}
    for a, b in zip(wide, narrow, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-5, atol=1e-6)
    assert torch.equal(wide[1].float(), narrow[1])
    assert torch.equal(wide[3].float(), narrow[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_uniform_numbers_stay_below_one_in_low_precision(dtype):
    with drawing(0, ("samples",), MANY):
        numbers = uniform_like(torch.zeros(2000, 50, dtype=dtype), "mixing")
    assert numbers.dtype == dtype
    assert numbers.min() >= 0
    assert 0.99 < numbers.max() < 1


def normal_cdf(values: np.ndarray) -> np.ndarray:
    return np.array([(1 + math.erf(value / 2**0.5)) / 2 for value in values])


@pytest.mark.parametrize(
    ("draw", "cumulative", "moments"),
    [
        (normal_like, normal_cdf, (0, 1, 3)),
        (uniform_like, lambda values: values, (0.5, 1 / 12, 1.8)),
    ],
)
def test_numbers_have_their_distribution_over_slots_and_elements(draw, cumulative, moments):
    """By mean, variance and Kolmogorov and Smirnov's test."""
    mean, variance, kurtosis = moments
    numbers = drawn(draw, "noise", slots=MANY).double()
    count = numbers.numel()
    for sample in (numbers.flatten(), numbers[:, 0, 0], numbers[:, 4, 6], numbers[::50].flatten()):
        assert distance_to_distribution(sample, cumulative(np.sort(sample.numpy()))) < 1.95
    assert abs(numbers.mean() - mean) < 4 * (variance / count) ** 0.5
    assert abs(numbers.var() - variance) < 4 * variance * ((kurtosis - 1) / count) ** 0.5


def test_bernoulli_numbers_are_ones_as_often_as_asked_for():
    share = drawn(bernoulli_like, "dropout", 0.3, slots=MANY)
    assert set(share.unique().tolist()) == {0.0, 1.0}
    assert abs(share.mean() - 0.3) < 4 * (0.3 * 0.7 / share.numel()) ** 0.5


def test_names_purposes_seeds_slots_and_elements_are_uncorrelated():
    def column(seed: int = 0, purpose: str = "a", name: str = "x", first: int = 0) -> Tensor:
        with drawing(seed, (purpose,), MANY + first):
            return normal_like(torch.zeros(2000, 6), name).double()

    own = column()
    others = [column(seed=1), column(purpose="b"), column(name="y"), column(first=2000)]
    columns = torch.cat([own, *others, own.roll(1, 0)], dim=1)
    correlations = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert correlations.abs().max() < 4.5 / 2000**0.5


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(a.alias_info and not a.alias_info.is_write for a in func._schema.returns)
        self.count += not is_view
        return func(*args, **(kwargs or {}))


def test_ten_layers_take_hardly_more_operators_than_one():
    """24 that compute, where one by one they would take 10 x 23. Views are not counted."""

    def count(layers: int, purpose: str) -> int:
        x = torch.zeros(4, 1, 6, 6)
        with Operators() as operators, drawing(5, (purpose,), SLOTS):
            for layer in range(layers):
                normal_like(x, f"noise/{layer}")
        return operators.count

    _, _, together = (count(10, "ten") for _ in range(3))
    _, alone = (count(1, "one") for _ in range(2))
    assert together <= alone + 1


CHECKPOINTED = pytest.mark.parametrize("is_nested", [False, True])


def noisy_network(weight: Tensor, is_checkpointed: bool, is_nested: bool) -> Callable[..., Tensor]:
    def inner(x: Tensor) -> Tensor:
        x = torch.tanh(x @ weight)
        return torch.sin(x * (1 + normal_like(x, "inner")))

    def outer(x: Tensor) -> Tensor:
        x = checkpoint(inner, x, use_reentrant=False) if is_nested else inner(x)
        x = torch.tanh((x + 1) * uniform_like(x, "outer"))
        return (x @ weight) * bernoulli_like(x, "dropout", 0.5)

    def network(x: Tensor) -> Tensor:
        if is_checkpointed:
            return checkpoint(outer, x, use_reentrant=False)  # type: ignore[return-value]
        return outer(x)

    return network


@CHECKPOINTED
def test_a_recomputation_draws_the_numbers_of_its_own_forward(is_nested):
    """Of several micro-batches, each with two forwards and a penalty, that is differentiated twice,
    in float64; the forwards' contexts are long closed when the last backward begins."""

    def gradient(is_checkpointed: bool) -> Tensor:
        torch.manual_seed(0)
        weight = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
        network = noisy_network(weight, is_checkpointed, is_nested)
        images = torch.randn(4, 6, dtype=torch.float64)
        losses = []
        for part in (slice(0, None, 2), slice(1, None, 2)):
            with drawing(0, ("real", "fake"), SLOTS[part]):
                logits = network(torch.cat([images[part], 2 * images[part]]))
            points = images[part].clone().requires_grad_()
            with drawing(0, ("points",), SLOTS[part]):
                scores = network(points)
            (found,) = torch.autograd.grad(scores.sum(), points, create_graph=True)
            losses.append(logits.square().sum() + found.square().sum())
        sum(losses).backward()  # type: ignore[union-attr]
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-12, atol=1e-12)


def test_a_recomputation_in_another_thread_draws_the_same():
    """As the backward of a GPU's graph, which runs in a thread of its own."""

    def gradient(is_checkpointed: bool) -> Tensor:
        weight = torch.eye(6, dtype=torch.float64).requires_grad_()
        network = noisy_network(weight, is_checkpointed, True)
        with drawing(0, ("real",), SLOTS):
            loss = network(torch.ones(4, 6, dtype=torch.float64)).square().sum()
        thread = Thread(target=loss.backward)
        thread.start()
        thread.join(60)
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-12, atol=1e-12)


def test_numbers_that_are_made_together_may_be_changed_in_place_each():
    weight = torch.ones(4, 3, requires_grad=True)
    for _ in range(3):
        with drawing(1, ("in place",), SLOTS):
            first = weight * normal_like(weight, "first")
            second = normal_like(weight, "second").mul_(2) * weight
        (first + second).sum().backward()


def test_misuse_gets_one_sentence():
    x = torch.zeros(4, 3)
    with pytest.raises(UserError, match="'noise' is drawn outside of a forward"):
        normal_like(x, "noise")
    with drawing(*SITE, None), pytest.raises(UserError, match="outside of a forward"):
        normal_like(x, "noise")
    with drawing(*SITE, SLOTS):
        normal_like(x, "noise")
        place = r"\(.*test_random.py:\d+\)$"
        with pytest.raises(UserError, match=r"draws 'noise' twice.*such as 'noise/2' " + place):
            normal_like(x, "noise")
        with pytest.raises(UserError, match=r"'weights' is drawn for a tensor of 3 rows.*4 images"):
            normal_like(x.T, "weights")
        with pytest.raises(UserError, match="no batch dimension in a forward of 4 images"):
            normal_like(x.sum(), "one")
        with pytest.raises(UserError, match=r"'whole' is drawn like a tensor of torch.int64"):
            uniform_like(x.long(), "whole")
        with pytest.raises(
            UserError, match=r"'many' is drawn for 536,870,913 elements of an image"
        ):
            normal_like(torch.empty(len(x), 2**29 + 1, device="meta"), "many")
        for probability in (-0.1, 1.5, float("nan")):
            with pytest.raises(
                UserError, match=f"'kept' is drawn with .* {probability}: .* 0 to 1"
            ):
                bernoulli_like(x, "kept", probability)


def test_an_unfinished_forward_leaves_nothing_behind():
    with pytest.raises(UserError, match="twice"), drawing(*SITE, SLOTS):
        _ = three_layers(4), three_layers(4)
    with pytest.raises(UserError, match="outside of a forward"):
        normal_like(torch.zeros(4, 3), "noise")
    drawn(normal_like, "noise")
