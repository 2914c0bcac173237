"""The algebra of guidance, and which wrong class an image gets."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from sdood_plugin.diffusion.guidance import guidance_terms, wrong_classes
from sdood_plugin.errors import UsageError

WEIGHTS = [-1.0, -0.5, 0.0, 1.0, 2.0, 3.5]
MODES = ["other", "away", "blend", "blend-own", "same"]


def oracle(mode, w, predictions, own, wrong):
    """METHOD section 3, one image at a time; predictions[c] is eps(c), the last one eps(null)."""
    null = predictions[-1]
    if mode == "other":
        return (1 + w) * predictions[wrong[0]] - w * null
    if mode == "away":
        return (1 + w) * null - w * predictions[own]
    if mode == "blend":
        return (1 + w) * (predictions[wrong[0]] + predictions[wrong[1]]) / 2 - w * null
    if mode == "blend-own":
        return (1 + w) * (predictions[wrong[0]] + predictions[own]) / 2 - w * null
    return predictions[own]


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("mode", MODES)
def test_terms_equal_the_equations(generator, mode, w, classes):
    predictions = torch.randn(classes + 1, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(20) % classes
    wrong = wrong_classes(labels, classes, seed=0, index=torch.arange(20))
    conditions, weights = guidance_terms(mode, w, labels, wrong, classes)
    assert weights.dtype == torch.float32 and conditions.dtype == torch.int64
    for row in range(20):
        mixed = (weights.double()[:, None] * predictions[conditions[row]]).sum(0)
        torch.testing.assert_close(mixed, oracle(mode, w, predictions, int(labels[row]), wrong[row].tolist()))


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_for_each_image(generator, mode):
    predictions = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    labels, w = torch.arange(12) % 3, torch.tensor(WEIGHTS).repeat(2)
    wrong = wrong_classes(labels, 3, seed=0, index=torch.arange(12))
    conditions, weights = guidance_terms(mode, w, labels, wrong, 3)
    assert weights.shape == conditions.shape and weights.dtype == torch.float32
    for row in range(12):
        mixed = (weights[row].double()[:, None] * predictions[conditions[row]]).sum(0)
        torch.testing.assert_close(mixed, oracle(mode, float(w[row]), predictions, int(labels[row]), wrong[row].tolist()))
    single = guidance_terms(mode, torch.zeros(12), labels, wrong, 3)
    assert torch.equal(single[0], guidance_terms(mode, 0.0, labels, wrong, 3)[0])  # idle for all: left out here too


@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("mode", MODES)
def test_weights_sum_to_one_and_no_term_is_idle(mode, w):
    labels = torch.arange(6) % 3
    conditions, weights = guidance_terms(mode, w, labels, wrong_classes(labels, 3, seed=0, index=torch.arange(6)), 3)
    assert float(weights.sum()) == pytest.approx(1)
    assert conditions.shape == (6, len(weights))
    assert (weights != 0).all()


@pytest.mark.parametrize(
    ("mode", "w", "expected"),
    [
        ("other", -1.0, "null"),
        ("blend", -1.0, "null"),
        ("blend-own", -1.0, "null"),
        ("away", 0.0, "null"),
        ("away", -1.0, "own"),
        ("same", 2.0, "own"),
        ("other", 0.0, "wrong"),
    ],
)
def test_one_forward_is_enough_where_one_condition_is_left(mode, w, expected):
    labels = torch.arange(6) % 3
    wrong = wrong_classes(labels, 3, seed=0, index=torch.arange(6))
    conditions, weights = guidance_terms(mode, w, labels, wrong, 3)
    assert weights.tolist() == [1.0]
    assert torch.equal(conditions[:, 0], {"null": torch.full((6,), 3), "own": labels, "wrong": wrong[:, 0]}[expected])


@pytest.mark.parametrize("classes", [2, 3, 5, 10])
def test_wrong_classes_are_uniform_over_the_wrong_ones(classes):
    count = 6000
    for own in {0, classes // 2, classes - 1}:
        first, second = wrong_classes(torch.full((count,), own), classes, seed=11, index=torch.arange(count)).T
        counts = torch.bincount(first, minlength=classes)
        assert counts[own] == 0
        others = counts[torch.arange(classes) != own]
        assert len(others) == 1 or stats.chisquare(others.numpy()).pvalue > 1e-4
        if classes == 2:
            assert (second == own).all()  # there is no second wrong class
            continue
        assert (second != own).all() and (second != first).all()
        pairs = torch.bincount(first * classes + second)
        pairs = pairs[pairs > 0]
        assert len(pairs) == (classes - 1) * (classes - 2)
        assert stats.chisquare(pairs.numpy()).pvalue > 1e-4


def test_the_wrong_class_depends_on_the_images_identity_only():
    labels, index = torch.tensor([0, 1, 2, 0]), torch.tensor([5, 3, 8, 1])
    order = torch.tensor([2, 0, 3, 1])
    found = wrong_classes(labels, 3, seed=4, index=index)
    assert torch.equal(wrong_classes(labels[order], 3, seed=4, index=index[order]), found[order])
    many = torch.arange(300)
    assert not torch.equal(wrong_classes(many % 3, 3, seed=4, index=many), wrong_classes(many % 3, 3, seed=5, index=many))


@pytest.mark.parametrize(
    ("mode", "w", "word"),
    [
        ("other", -1.01, "w >= -1"),
        ("away", torch.tensor([2.0, -1.5]), "w >= -1"),
        ("blend", float("nan"), "w >= -1"),
        ("nearby", 1.0, "other, away, blend, blend-own, same"),
    ],
)
def test_refuses(mode, w, word):
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UsageError, match=word):
        guidance_terms(mode, w, labels, torch.ones(2, 2, dtype=torch.int64), 3)
