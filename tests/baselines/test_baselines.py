"""The comparators: larger = more OOD for all of them, and the scores that have a formula follow it."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from sdood_plugin.baselines.outlier_exposure import outlier_exposure_loss, uniform_noise
from sdood_plugin.baselines.posthoc import POSTHOC, posthoc_scores
from sdood_plugin.detector.network import Heads
from sdood_plugin.errors import UsageError
from sdood_plugin.metrics import detection_metrics


@pytest.fixture
def problem(generator):
    labels = torch.arange(300) % 3
    centres = 4 * torch.eye(3, 8)
    train = centres[labels] + 0.5 * torch.randn(300, 8, generator=generator)
    inside = centres[labels[:60]] + 0.5 * torch.randn(60, 8, generator=generator)
    outside = 0.5 * torch.randn(40, 8, generator=generator) + torch.tensor([0.0] * 3 + [2.0] * 5)
    return (train, labels), centres, torch.zeros(3), [inside, outside]


@pytest.mark.parametrize("method", POSTHOC)
def test_larger_is_more_ood(problem, method):
    train, weight, bias, queries = problem
    before = [query.clone() for query in queries]
    inside, outside = posthoc_scores(method, train, weight, bias, queries)
    assert inside.shape == (60,) and outside.shape == (40,) and torch.isfinite(inside).all()
    assert detection_metrics(inside, outside)["auroc"] > 90
    assert all(torch.equal(a, b) for a, b in zip(before, queries, strict=True))


def test_softmax_and_energy_follow_their_formulas(problem):
    train, weight, bias, queries = problem
    logits = queries[0].double() @ weight.double().T + bias
    torch.testing.assert_close(
        posthoc_scores("msp", train, weight, bias, queries)[0].double(), -logits.softmax(1).max(1).values, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        posthoc_scores("energy", train, weight, bias, queries)[0].double(), -logits.exp().sum(1).log(), atol=1e-5, rtol=1e-5
    )


def test_labels_with_a_gap_do(problem):
    (features, labels), weight, bias, queries = problem
    gap = torch.where(labels == 1, 0, labels)
    assert torch.isfinite(posthoc_scores("mahalanobis", (features, gap), weight, bias, queries)[0]).all()


def test_an_unknown_comparator_is_refused(problem):
    with pytest.raises(UsageError, match="msp, energy, knn, mahalanobis, vim"):
        posthoc_scores("odin", *problem)


def test_noise_is_uniform_over_all_grey_levels():
    noise = uniform_noise(50, 16, seed=0)
    assert noise.shape == (50, 3, 16, 16) and noise.dtype == torch.uint8
    assert stats.chisquare(torch.bincount(noise.flatten().long(), minlength=256).numpy()).pvalue > 1e-4
    assert torch.equal(noise[:10], uniform_noise(10, 16, seed=0))
    assert not torch.equal(noise, uniform_noise(50, 16, seed=1))


def test_outlier_exposure_adds_half_the_cross_entropy_to_uniform(generator):
    logits, labels, flags = torch.randn(10, 4, generator=generator), torch.arange(10) % 4, torch.arange(10) % 3 == 0
    heads = Heads(torch.zeros(10, 2), torch.zeros(10, 2), logits, logits)
    log = logits.double().log_softmax(1)
    inside = -log[~flags].gather(1, labels[~flags, None]).mean()  # the paper averages the two groups apart
    uniform = -log[flags].mean(1).mean()
    found = float(outlier_exposure_loss(heads, labels, flags)["loss"])
    assert found == pytest.approx(float(inside + 0.5 * uniform), rel=1e-4)
