"""The random parameters have the papers' distributions, whatever the probability, so that what is
drawn most often is the image itself and nothing leaks into the generator."""

import math

import pytest
import torch
from torch import Tensor

from ganscale.augmentation.pipelines import PIPELINES, build_pipeline
from ganscale.randomness import uniform
from tests.augmentation.test_transformations import parameter_names

COUNT = 20_000
SLOTS = torch.arange(COUNT)


def drawn_by_name(
    pipeline_name: str, probability: float, purpose: str = "test"
) -> dict[str, Tensor]:
    known = PIPELINES[pipeline_name]
    strengths = dict.fromkeys({each.category for each in known.transformations}, 1.0)
    pipeline = build_pipeline(pipeline_name, strengths, 3)
    numbers = uniform(3, purpose, SLOTS, pipeline.columns)
    parameters = pipeline.parameters(numbers, probability).double()
    names = parameter_names(pipeline)
    return dict(zip(names, parameters.unbind(1), strict=True))


def assert_share(hits: Tensor, expected: float) -> None:
    """Within four standard deviations."""
    deviation = math.sqrt(expected * (1 - expected) / len(hits))
    assert abs(hits.double().mean().item() - expected) <= 4 * deviation + 1e-12


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", PIPELINES)
def test_each_transformation_is_applied_with_its_probability(name: str, probability: float) -> None:
    found = drawn_by_name(name, probability)
    for parameter, values in found.items():
        expected = probability
        if parameter.startswith("rotate_"):
            expected = 1 - math.sqrt(1 - probability)
        if parameter in ("xflip", "lumaflip"):
            expected *= 1 / 2  # one of the two draws is no change
        if parameter == "rotate90":
            expected *= 3 / 4
        assert_share(values != 0, expected)
    if name == "ada":
        either = (found["rotate_0"] != 0) | (found["rotate_1"] != 0)
        assert_share(either, probability)


NORMAL = {
    "scale": 0.2, "aniso": 0.2, "xfrac_0": 0.125, "xfrac_1": 0.125, "brightness": 0.2,
    "contrast": 0.5, "saturation": 1.0, "noise": 0.1,
    **{f"imgfilter_{band}": 1.0 for band in range(4)},
}  # fmt: skip
UNIFORM = {
    "xint_0": (-0.125, 0.125), "xint_1": (-0.125, 0.125), "hue": (-math.pi, math.pi),
    "rotate_0": (-math.pi, math.pi), "rotate_1": (-math.pi, math.pi),
    "cutout_1": (-0.5, 0.5), "cutout_2": (-0.5, 0.5),
}  # fmt: skip


def distance_to(values: Tensor, cumulative: Tensor) -> float:
    """Kolmogorov and Smirnov's statistic times the root of the count: above 2.2 once in 10,000."""
    steps = torch.arange(1, len(values) + 1).double() / len(values)
    return ((cumulative - steps).abs().max() * math.sqrt(len(values))).item()


@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_parameters_have_the_distributions_of_the_paper(probability: float) -> None:
    found = drawn_by_name("ada", probability)
    for name, deviation in NORMAL.items():
        values = found[name][found[name] != 0].sort().values
        assert distance_to(values, torch.special.ndtr(values / deviation)) < 2.2
    for name, (low, high) in UNIFORM.items():
        values = found[name][found[name] != 0].sort().values
        assert distance_to(values, (values - low) / (high - low)) < 2.2


def test_diffaugment_draws_from_its_ranges() -> None:
    found = drawn_by_name("diffaugment", 1.0)
    ranges = {"brightness": (-0.5, 0.5), "saturation": (-1, 1), "contrast": (-0.5, 0.5)}
    ranges |= dict.fromkeys(("translation_0", "translation_1"), (-1, 1))
    ranges |= dict.fromkeys(("cutout_1", "cutout_2"), (0, 1))
    for name, (low, high) in ranges.items():
        values = found[name].sort().values
        assert distance_to(values, (values - low) / (high - low)) < 2.2


def largest_correlation(columns: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Of a column with another one, with any one of the neighboring slot, and with any of
    `others`."""
    own = torch.stack(list(columns.values()))
    together = torch.cat([own, own.roll(1, dims=1), torch.stack(list(others.values()))])
    correlations = torch.corrcoef(together.double()) - torch.eye(len(together))
    return correlations.abs().max().item()


def test_parameters_are_independent_of_each_other_of_slots_and_of_purposes() -> None:
    limit = 5 / math.sqrt(COUNT)  # exceeded by one of two million pairs; here are 2,000
    found, others = (drawn_by_name("ada", 1.0, purpose) for purpose in ("test", "another"))
    for each in (found, others):
        del each["cutout_0"]  # always one
    assert largest_correlation(found, others) < limit
    # Whether they are applied: of parameters of one transformation, together.
    found, others = (drawn_by_name("ada", 0.5, purpose) for purpose in ("test", "another"))
    for each in (found, others):
        for name in ("xint_1", "xfrac_1", "cutout_1", "cutout_2"):
            del each[name]
    found, others = ({k: v != 0 for k, v in each.items()} for each in (found, others))
    assert largest_correlation(found, others) < limit


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_the_original_orientation_stays_the_most_likely_below_probability_one(
    probability: float,
) -> None:
    """All eight orientations of an image that is turned by quarters and mirrored are counted; below
    probability 1, the original one is the most frequent (section 2.2 of the paper)."""
    pipeline = build_pipeline("ada", {"xflip": 1.0, "rotate90": 1.0}, 1)
    corner = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    images = corner.expand(COUNT, 1, 2, 2)
    numbers = uniform(5, "test", SLOTS, pipeline.columns)
    seen = pipeline(images, {"parameters": pipeline.parameters(numbers, probability)})
    flipped, unflipped = probability / 2, 1 - probability / 2
    turned, straight = probability / 4, 1 - probability * 3 / 4
    shares = []
    for is_flipped in (False, True):
        for turns in range(4):
            oriented = corner.flip(1) if is_flipped else corner
            oriented = oriented.rot90(-turns)
            hits = (seen[:, 0] == oriented).all(dim=(1, 2))
            share = (flipped if is_flipped else unflipped) * (straight if turns == 0 else turned)
            assert_share(hits, share)
            shares.append(hits.double().mean().item())
    assert sum(shares) == pytest.approx(1)
    if probability < 1:
        deviation = math.sqrt(1 / 8 / COUNT)
        assert shares[0] > max(shares[1:]) + 4 * deviation


def test_below_probability_one_augmented_distributions_differ_where_the_originals_do() -> None:
    """The operator on distributions over orientations is invertible: solving for the original
    distribution from what is seen gives it back; at probability 1 it cannot be."""
    for probability, is_invertible in ((0.8, True), (1.0, False)):
        turns = torch.full((4,), probability / 4) + torch.tensor([1 - probability, 0, 0, 0])
        operator = torch.stack([turns.roll(shift) for shift in range(4)], dim=1)
        assert (torch.linalg.matrix_rank(operator) == 4) == is_invertible
        if not is_invertible:
            continue
        original = torch.tensor([0.1, 0.6, 0.0, 0.3])
        orientations = torch.searchsorted(
            original.cumsum(0), uniform(7, "original", SLOTS)[:, 0], right=True
        ).clamp_max(3)
        corner = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        turned = torch.stack([corner.rot90(-turn) for turn in range(4)])
        pipeline = build_pipeline("ada", {"rotate90": 1.0}, 1)
        numbers = uniform(7, "test", SLOTS, pipeline.columns)
        made = {"parameters": pipeline.parameters(numbers, probability)}
        seen = pipeline(turned[orientations][:, None], made)[:, 0]
        hits = (seen[:, None] == turned[None]).all(dim=(2, 3)).float().mean(dim=0)
        found = torch.linalg.solve(operator, hits)
        assert (found - original).abs().max() < 4 * 0.5 / math.sqrt(COUNT) / (1 - probability)
