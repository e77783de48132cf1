import math

import numpy as np
import pytest
import torch
from torchmetrics.image.inception import InceptionScore

from ganscale.errors import UserError
from ganscale.evaluation.quality.class_scores import ClassSums, class_divergence
from tests.helpers.class_scores import class_scores


def random_logits(count, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, classes, generator=generator, dtype=torch.float64)


def published_score(probabilities, splits):
    """The formula of the paper's code, in NumPy."""
    scores = []
    for number in range(splits):
        count = len(probabilities)
        part = probabilities[number * count // splits : (number + 1) * count // splits]
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize(("count", "splits"), [(500, 10), (507, 10), (10, 10), (50, 1), (23, 3)])
def test_inception_score_is_that_of_the_papers_code(count, splits):
    probabilities = random_logits(count, 20).softmax(dim=1)
    scores = class_scores(probabilities, splits)
    mean, deviation = published_score(probabilities.numpy(), splits)
    assert scores.inception_score == pytest.approx(mean, rel=1e-10)
    assert scores.deviation == pytest.approx(deviation, rel=1e-8, abs=1e-12)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", "ignore:std:UserWarning")
def test_inception_score_of_one_split_is_that_of_torchmetrics():
    logits = random_logits(300, 12)
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.update(logits)
    expected = metric.compute()[0].item()
    score = class_scores(logits.softmax(dim=1), splits=1).inception_score
    assert score == pytest.approx(expected, rel=1e-6)


def test_inception_score_of_certain_and_even_classes_is_their_number():
    certain = torch.eye(7).repeat(30, 1)
    assert class_scores(certain, splits=1).inception_score == pytest.approx(7, rel=1e-12)
    unsure = torch.full((70, 7), 1 / 7)
    assert class_scores(unsure).inception_score == pytest.approx(1, abs=1e-7)


def test_scores_do_not_depend_on_the_batches():
    probabilities = random_logits(503, 9).softmax(dim=1)
    sums = ClassSums(9, 503)
    for batch in torch.randperm(503, generator=torch.Generator().manual_seed(0)).split(16):
        sums.add(probabilities[batch], batch)
    scores, expected = sums.scores(), class_scores(probabilities)
    assert scores.inception_score == pytest.approx(expected.inception_score, rel=1e-12)
    assert scores.deviation == pytest.approx(expected.deviation, rel=1e-9)
    assert torch.equal(scores.histogram, expected.histogram)


def test_modes_are_the_classes_that_a_sample_is_classified_as():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.35, 0.25]])
    scores = class_scores(probabilities, splits=1)
    assert scores.histogram.tolist() == [2, 0, 1]
    assert scores.modes_covered == 2


def test_class_divergence_is_from_the_generated_to_the_reference_classes():
    generated, reference = torch.tensor([3, 1, 0]), torch.tensor([10, 20, 10])
    expected = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert class_divergence(generated, reference) == pytest.approx(expected, rel=1e-12)
    assert class_divergence(reference, 5 * reference) == pytest.approx(0, abs=1e-15)
    # A collapse to 99 of 1,000 even modes.
    collapsed = (torch.arange(1000) < 99).long()
    expected = math.log(1000 / 99)
    assert class_divergence(collapsed, torch.ones(1000)) == pytest.approx(expected, rel=1e-12)
    assert class_divergence(reference, generated) == math.inf


@pytest.mark.parametrize(
    "row", [[math.nan, 0.5, 0.5], [2.0, -1.0, 0.0], [3.0, 1.0, 2.0], [math.inf, 0.0, 0.0]]
)
def test_outputs_that_are_not_probabilities_are_a_users_error(row):
    probabilities = torch.full((20, 3), 1 / 3)
    probabilities[4] = torch.tensor(row)
    with pytest.raises(UserError, match="for 1 of 20 images, the classifier's outputs are not"):
        class_scores(probabilities)


def test_too_few_samples_and_other_classes_are_a_users_error():
    with pytest.raises(UserError, match="needs 10 samples or more, not 9"):
        class_scores(torch.full((9, 3), 1 / 3))
    with pytest.raises(UserError, match="reference has 4 classes, the samples 3"):
        class_divergence(torch.ones(3), torch.ones(4))
    with pytest.raises(UserError, match="one sample or more, not 0"):
        class_divergence(torch.zeros(3), torch.ones(3))
