"""What each transformation does to images, against the papers' formulas written out."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from ganscale.augmentation import ada, diffaugment
from ganscale.augmentation.pipelines import PIPELINES, build_pipeline
from ganscale.augmentation.resampling import sample_nearest, sample_smoothly
from ganscale.augmentation.transformations import Drawn, Pipeline
from ganscale.errors import UserError

SIZE = 12


def each_transformation() -> list[tuple[str, str]]:
    return [
        (pipeline, name)
        for pipeline, known in PIPELINES.items()
        for name in dict.fromkeys(each.name for each in known.transformations)
    ]


def drawn(pipeline: Pipeline, probability: float, shape: tuple[int, ...]) -> Drawn:
    torch.manual_seed(0)
    numbers = torch.rand(shape[0], pipeline.columns, dtype=torch.float64)
    made = {"parameters": pipeline.parameters(numbers, probability)}
    if pipeline.adds_noise:
        made["noise"] = torch.randn(shape, dtype=torch.float64)
    return made


def parameter_names(pipeline: Pipeline) -> list[str]:
    """`scale` for a transformation's only parameter, `xint_0` and `xint_1` for one of two."""
    counts: Counter[str] = Counter()
    for each in pipeline.transformations:
        counts[each.name] += len(each.values)
    return [f"{n}_{i}" if count > 1 else n for n, count in counts.items() for i in range(count)]


def with_parameters(pipeline: Pipeline, count: int, **values: Tensor) -> Drawn:
    """These parameters, and zeros for all others."""
    columns = [values.pop(name, torch.zeros(count)).double() for name in parameter_names(pipeline)]
    assert not values
    return {"parameters": torch.stack(columns, dim=1)}


@pytest.mark.parametrize(("pipeline_name", "name"), each_transformation())
def test_every_transformation_is_differentiable_twice(pipeline_name: str, name: str) -> None:
    pipeline = build_pipeline(pipeline_name, {name: 1.0}, channels=3)
    images = torch.randn(3, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    made = drawn(pipeline, 1.0, tuple(images.shape))
    assert not torch.equal(pipeline(images, made), images)
    assert torch.autograd.gradcheck(lambda x: pipeline(x, made), images)
    assert torch.autograd.gradgradcheck(lambda x: pipeline(x, made), images)


@pytest.mark.parametrize(("pipeline_name", "name"), each_transformation())
def test_the_gradient_of_a_penalty_before_a_transformation_agrees_with_finite_differences(
    pipeline_name: str, name: str
) -> None:
    """By the weights of a critic, through the transformation, as R1 needs it."""
    pipeline = build_pipeline(pipeline_name, {name: 1.0}, channels=3)
    made = drawn(pipeline, 1.0, (3, 3, 6, 6))
    weights = torch.randn(108, 5, dtype=torch.float64, requires_grad=True)

    def penalty(weights: Tensor) -> Tensor:
        images = torch.linspace(-1, 1, 324, dtype=torch.float64).sin().view(3, 3, 6, 6)
        images.requires_grad_()
        scores = (pipeline(images, made).flatten(1) @ weights).tanh().sum()
        (gradients,) = torch.autograd.grad(scores, images, create_graph=True)
        return gradients.square().sum() / 2

    (gradient,) = torch.autograd.grad(penalty(weights), weights)
    direction, step = torch.randn_like(weights), 1e-5
    with torch.enable_grad():
        difference = penalty(weights + step * direction) - penalty(weights - step * direction)
    expected = difference.item() / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PIPELINES)
def test_an_image_to_which_nothing_is_applied_stays_as_it_is(name: str, channels: int) -> None:
    strengths = dict.fromkeys({each.category for each in PIPELINES[name].transformations}, 1.0)
    pipeline = build_pipeline(name, strengths, channels)
    images = torch.randn(4, channels, SIZE, SIZE, dtype=torch.float64)
    unchanged = pipeline(images, drawn(pipeline, 0.0, tuple(images.shape)))
    torch.testing.assert_close(unchanged, images, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_and_the_precision_of_images_are_kept(layout: torch.memory_format) -> None:
    pipeline = build_pipeline("ada", {}, 3)
    images = torch.randn(4, 3, SIZE, SIZE).contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        augmented = pipeline(images, drawn(pipeline, 1.0, tuple(images.shape)))
    assert augmented.is_contiguous(memory_format=layout)
    assert augmented.dtype == torch.float32


def scaling(x: float, y: float) -> Tensor:
    return torch.diag(torch.tensor([x, y, 1.0], dtype=torch.float64))


def rotation(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)


def translation(x: float, y: float) -> Tensor:
    return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float64)


def centered(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float64) - (size - 1) / 2


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 40), (40, 28)])
def test_geometric_transformations_are_those_of_the_paper_on_a_smooth_image(
    height: int, width: int
) -> None:
    """A sum of slow waves, at the points that the composed matrix maps to each pixel."""
    count = 16
    pipeline = build_pipeline("ada", {"blit": 1.0, "geom": 1.0}, 1)
    parameters = drawn(pipeline, 1.0, (count, 1, height, width))["parameters"]
    names = parameter_names(pipeline)
    ys, xs = torch.meshgrid(centered(height), centered(width), indexing="ij")

    def waves(x: Tensor, y: Tensor) -> Tensor:
        return (0.2 * x + 0.1).sin() + (0.15 * y - 0.3).cos() + 0.02 * x

    images = waves(xs, ys).expand(count, 1, height, width)
    augmented = pipeline(images, {"parameters": parameters})
    compared = 0
    for row, image in zip(parameters.tolist(), augmented, strict=True):
        p = dict(zip(names, row, strict=True))
        sides = (height, width) if p["rotate90"] % 2 else (width, height)
        composed = (  # algorithm 1 from its end, with the translation by whole pixels first
            translation(p["xfrac_0"] * width, p["xfrac_1"] * height)
            @ rotation(p["rotate_1"])
            @ scaling(2 ** p["aniso"], 2 ** -p["aniso"])
            @ rotation(p["rotate_0"])
            @ scaling(2 ** p["scale"], 2 ** p["scale"])
            @ rotation(p["rotate90"] * math.pi / 2)
            @ scaling(1 - 2 * p["xflip"], 1)
            @ translation(round(p["xint_0"] * sides[0]), round(p["xint_1"] * sides[1]))
        )
        targets = torch.stack([xs, ys, torch.ones_like(xs)]).flatten(1)
        x, y, _ = (torch.linalg.inv(composed) @ targets).view(3, height, width)
        is_inside = (x.abs() < width / 2 - 4) & (y.abs() < height / 2 - 4)
        compared += int(is_inside.sum())
        error = (image[0] - waves(x, y))[is_inside].abs()
        assert error.max() < 0.03
    assert compared > count * height * width / 4


@pytest.mark.parametrize("turns", range(4))
def test_blitting_an_image_that_is_not_square_is_a_blit_in_the_papers_order(turns: int) -> None:
    """Turned, and then translated by eighths of the sides that the image has."""
    height, width, (a, b) = 16, 32, (1 / 8, -1 / 16)
    pipeline = build_pipeline("ada", {"blit": 1.0}, 1)
    images = torch.randn(1, 1, height, width, dtype=torch.float64)
    made = with_parameters(
        pipeline,
        1,
        rotate90=torch.tensor([turns]),
        xint_0=torch.tensor([a]),
        xint_1=torch.tensor([b]),
    )
    papers = [(a, b), (-b, a), (-a, -b), (b, -a)][turns]
    composed = translation(papers[0] * width, papers[1] * height) @ rotation(turns * math.pi / 2)
    ys, xs = torch.meshgrid(centered(height), centered(width), indexing="ij")
    targets = torch.stack([xs, ys, torch.ones_like(xs)]).flatten(1)
    x, y, _ = torch.linalg.inv(composed) @ targets
    columns = reflected_index(x + (width - 1) / 2, width)
    rows = reflected_index(y + (height - 1) / 2, height)
    expected = images[0, 0][rows, columns].view(1, 1, height, width)
    torch.testing.assert_close(pipeline(images, made), expected, rtol=0, atol=0)


def reflected_index(position: Tensor, size: int) -> Tensor:
    position = position.round().long().abs() % (2 * size - 2)
    return torch.minimum(position, 2 * size - 2 - position)


def test_blitting_moves_pixels_without_changing_them() -> None:
    pipeline = build_pipeline("ada", {"blit": 1.0}, 2)
    images = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    for turns in range(4):
        for flip in range(2):
            for shift in (-1, 0, 1):
                made = with_parameters(
                    pipeline,
                    1,
                    rotate90=torch.tensor([turns]),
                    xflip=torch.tensor([flip]),
                    xint_1=torch.tensor([shift / 8]),
                )
                expected = pad(images, [0, 0, 2, 2], mode="reflect")
                expected = expected[:, :, 2 - shift : 10 - shift]
                expected = expected.flip(3) if flip else expected
                expected = expected.rot90(-turns, (2, 3))
                assert torch.equal(pipeline(images, made), expected)


def test_resampling_returns_an_image_that_was_not_moved_but_for_its_border() -> None:
    images = torch.randn(2, 3, SIZE, 20, dtype=torch.float64)
    identity = torch.eye(2, dtype=torch.float64).expand(2, 2, 2), torch.zeros(2, 2).double()
    found = sample_smoothly(images, identity)
    inner = (..., slice(3, -3), slice(3, -3))
    # as far as the published digits of the wavelet are orthogonal
    torch.testing.assert_close(found[inner], images[inner], rtol=0, atol=1e-9)
    assert (found - images).abs().max() > 1e-3


def test_sampling_is_that_of_torch() -> None:
    images = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    torch.manual_seed(1)
    matrix, offset = torch.randn(2, 2, 2).double(), torch.randn(2, 2).double()
    units = torch.tensor([2 / 8, 2 / 6], dtype=torch.float64)
    ys, xs = torch.meshgrid(torch.arange(7) - 3.0, torch.arange(9) - 4.0, indexing="ij")
    targets = torch.stack([xs, ys], dim=-1).double().view(-1, 2)
    points = (torch.einsum("bij,nj->bni", matrix, targets) + offset[:, None]) * units
    for mode, is_reflected in (("reflection", True), ("zeros", False)):
        grid = points.view(2, 7, 9, 2)
        expected = grid_sample(images, grid, "nearest", mode, align_corners=True)
        found = sample_nearest(images, (matrix, offset), is_reflected=is_reflected)
        torch.testing.assert_close(found, expected)


def test_colors_are_those_of_the_paper() -> None:
    """As 4 x 4 matrices, composed one after the other."""
    pipeline = build_pipeline("ada", {"color": 1.0}, 3)
    images = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    made = drawn(pipeline, 1.0, tuple(images.shape))
    names = parameter_names(pipeline)
    axis = torch.tensor([1.0, 1, 1, 0], dtype=torch.float64) / math.sqrt(3)
    onto, identity = torch.outer(axis, axis), torch.eye(4, dtype=torch.float64)
    cross = torch.zeros(4, 4, dtype=torch.float64)
    cross[:3, :3] = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    space = torch.diag(torch.tensor([1.0, 1, 1, 0], dtype=torch.float64))
    expected = []
    for row, image in zip(made["parameters"].tolist(), images, strict=True):
        p = dict(zip(names, row, strict=True))
        color = identity.clone()
        color[:3, 3] = p["brightness"]
        contrast = 2 ** p["contrast"]
        color = torch.diag(torch.tensor([contrast] * 3 + [1.0], dtype=torch.float64)) @ color
        color = (identity - 2 * onto * p["lumaflip"]) @ color
        c, s = math.cos(p["hue"]), math.sin(p["hue"])
        color = (onto + c * (space - onto) + s * cross + identity - space) @ color
        saturation = 2 ** p["saturation"]
        color = (onto + (identity - onto) * saturation) @ color
        color[3] = identity[3]  # the paper's last factor scales the homogeneous coordinate, too
        pixels = torch.cat([image.flatten(1), torch.ones(1, 16).double()])
        expected.append((color @ pixels)[:3].view(3, 4, 4))
    torch.testing.assert_close(pipeline(images, made), torch.stack(expected))


def test_filters_amplify_their_bands_and_keep_the_expected_power() -> None:
    kernels = torch.from_numpy(ada.band_kernels())
    identity = torch.zeros(43, dtype=torch.float64)
    identity[21] = 1
    torch.testing.assert_close(kernels.sum(dim=0), identity, rtol=0, atol=1e-9)
    responses = torch.fft.rfft(kernels, n=512).abs()
    middles = [8, 48, 96, 200]  # of the bands, in 256 steps up to the largest frequency
    for band, frequency in enumerate(middles):
        assert responses[:, frequency].argmax() == band

    pipeline = build_pipeline("ada", {"filter": 1.0}, 1)
    logs = torch.tensor([[0.7, -0.2, 0.0, 1.1]])
    made = with_parameters(pipeline, 1, **{f"imgfilter_{i}": logs[:, i] for i in range(4)})
    gains = torch.ones(4)  # the paper's loop over bands
    for band in range(4):
        amplified = torch.ones(4)
        amplified[band] = 2 ** logs[0, band]
        power = torch.tensor([10.0, 1, 1, 1]) / 13
        gains = gains * amplified / (power * amplified.square()).sum().sqrt()
    flat = torch.ones(1, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(pipeline(flat, made), flat * gains[0].item() ** 2, rtol=1e-6, atol=0)
    sign = 1 - 2 * (torch.arange(17) % 2).double()
    stripes = sign.expand(1, 1, 17, 17)  # the largest frequency one way, the lowest the other
    expected = stripes * (gains[0] * gains[3]).item()
    torch.testing.assert_close(pipeline(stripes, made), expected, rtol=1e-6, atol=1e-6)


def test_noise_has_the_drawn_deviation_and_cutout_a_quarter_of_the_area() -> None:
    pipeline = build_pipeline("ada", {"noise": 1.0, "cutout": 1.0}, 3)
    images = torch.ones(2, 3, 16, 24, dtype=torch.float64)
    values = {"noise": torch.tensor([0.3, 0.0]), "cutout_0": torch.tensor([0.0, 1.0])}
    made = with_parameters(pipeline, 2, **values)
    made["noise"] = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    noisy, cut = pipeline(images, made)
    torch.testing.assert_close(noisy, 1 + 0.3 * made["noise"][0])
    expected = images[1].clone()
    expected[:, 4:12, 6:18] = 0
    assert torch.equal(cut, expected)


def test_diffaugment_does_what_its_paper_says() -> None:
    pipeline = build_pipeline("diffaugment", {}, 3)
    images = torch.randn(1, 3, 16, 32, dtype=torch.float64)
    values = {"brightness": 0.3, "saturation": -0.6, "contrast": 0.4}
    colors = {name: torch.tensor([value]) for name, value in values.items()}
    found = pipeline(images, with_parameters(pipeline, 1, **colors))
    brighter = images + 0.3
    gray = brighter.mean(dim=1, keepdim=True)
    saturated = (brighter - gray) * 0.4 + gray
    expected = (saturated - saturated.mean()) * 1.4 + saturated.mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    moves = {"translation_0": torch.tensor([-0.999]), "translation_1": torch.tensor([0.4])}
    found = pipeline(images, with_parameters(pipeline, 1, **moves))
    padded = pad(images, [4, 4, 2, 2])
    assert torch.equal(found, padded[:, :, 1:17, 8:40])  # 4 pixels left, 1 down

    cut = {"cutout_0": torch.ones(1), "cutout_1": torch.zeros(1), "cutout_2": torch.tensor([0.5])}
    expected = images.clone()
    expected[:, :, 4:12, :8] = 0  # half of the rectangle is left of the image
    assert torch.equal(pipeline(images, with_parameters(pipeline, 1, **cut)), expected)


def test_translations_of_diffaugment_are_equally_likely() -> None:
    shares = torch.linspace(-1, 1, 90_001, dtype=torch.float64)[:-1]
    counts = torch.bincount(diffaugment._whole_pixels(shares, 4).long() + 4)
    assert len(counts) == 9
    assert (counts - 10_000).abs().max() <= 1


@pytest.mark.parametrize(
    ("strengths", "channels", "message"),
    [
        ({"colour": 1.0}, 3, "strengths.colour: unknown (did you mean 'color'?)"),
        ({"color": 1.5}, 3, "strengths.color must be between 0 and 1, not 1.5"),
        ({"xflip": -0.1}, 3, "strengths.xflip must be between 0 and 1, not -0.1"),
        ({"hue": 1.0}, 1, "strengths.hue needs images of three channels, data.channels is 1"),
        ({"saturation": 0.5}, 1, "strengths.saturation needs images of three channels"),
    ],
)
def test_strengths_that_make_no_sense_are_refused(
    strengths: dict[str, float], channels: int, message: str
) -> None:
    with pytest.raises(UserError) as refusal:
        build_pipeline("ada", strengths, channels)
    assert message in str(refusal.value)


def test_gray_images_get_the_colors_that_make_sense_for_them() -> None:
    assert build_pipeline("ada", {"color": 1.0}, 1).is_on == {"brightness", "contrast", "lumaflip"}
    assert build_pipeline("diffaugment", {"color": 1.0}, 1).is_on == {"brightness", "contrast"}


def test_a_transformation_s_own_strength_comes_before_that_of_its_category() -> None:
    pipeline = build_pipeline("ada", {"blit": 0.5, "rotate90": 0.0, "cutout": 0.25}, 3)
    strengths = {
        t.name: s for t, s in zip(pipeline.transformations, pipeline.strengths, strict=True)
    }
    assert strengths["xflip"] == strengths["xint"] == 0.5
    assert strengths["rotate90"] == strengths["hue"] == 0.0
    assert strengths["cutout"] == 0.25
