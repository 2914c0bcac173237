"""The figures of an outlier set, on sets whose figures are known."""

from __future__ import annotations

import types

import numpy as np
import pytest
import scipy.linalg
import torch

from sdood_plugin.data.images import to_unit
from sdood_plugin.outliers.inspect import frechet_distance, set_quality


@pytest.mark.parametrize(("n", "m", "width"), [(60, 40, 5), (200, 300, 12), (9, 11, 20)])
def test_frechet_distance_equals_scipys_matrix_root(n, m, width):
    random = np.random.default_rng(width)
    mix = random.normal(size=(width, width))
    a, b = random.normal(size=(n, width)), random.normal(size=(m, width)) @ mix + 0.5
    c1, c2 = np.cov(a.T), np.cov(b.T)
    jitter = 1e-10 * np.eye(width)  # sqrtm needs full rank, n < width has not
    root = scipy.linalg.sqrtm((c1 + jitter) @ (c2 + jitter)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_frechet_distance_in_closed_form(generator):
    a = torch.randn(50, 4, generator=generator)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, a + 3) == pytest.approx(4 * 9, rel=1e-5)
    assert frechet_distance(a, 2 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(
        float(torch.cov(a.T).trace()), rel=1e-4
    )  # (2 - 1)^2 tr C


def naive_border_correlation(first, second):
    """The correlation of the outer ring, smoothed by a 3 x 3 mean that ignores what lies outside."""
    total = []
    for a, b in zip(first.double() / 127.5 - 1, second.double() / 127.5 - 1, strict=True):
        side = a.shape[-1]
        ring = max(1, side // 8)
        values = []
        for image in (a.numpy(), b.numpy()):
            values.append(
                [
                    image[c, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].mean()
                    for c in range(3)
                    for y in range(side)
                    for x in range(side)
                    if min(y, x, side - 1 - y, side - 1 - x) < ring
                ]
            )
        total.append(np.corrcoef(values)[0, 1])
    return float(np.mean(total))


def a_set(images, labels, sources):
    class Set(types.SimpleNamespace):
        def __len__(self):
            return len(self.images)

    return Set(images=images, labels=torch.tensor(labels), sources=torch.tensor(sources))


def judge_by_brightness(images):
    """Three classes: dark, middle, bright; sure of dark and bright, not of the middle."""
    level = images.float().mean(dim=(1, 2, 3))
    probabilities = torch.tensor([[0.95, 0.05, 0.0], [0.2, 0.6, 0.2], [0.0, 0.05, 0.95]])[(level / 86).long().clamp(max=2)]
    return images.float().flatten(1)[:, :4] / 255, probabilities


def test_rates_of_a_set_made_by_hand(generator):
    train = torch.randint(0, 60, (6, 3, 16, 16), generator=generator, dtype=torch.uint8)
    train[3:] += 190
    made = a_set(
        torch.stack(
            [
                train[0],  # a copy: stays
                torch.full((3, 16, 16), 128, dtype=torch.uint8),  # neither
                train[4] // 2 + 120,  # flips from dark to bright
                train[3],  # a copy: stays
                train[2],  # flips from bright to dark, and is a copy of another training image
            ]
        ),
        [0, 0, 0, 2, 2],
        [0, 1, 2, 3, 4],
    )
    found = set_quality(made, train, judge_by_brightness)
    assert found["count"] == 5
    assert (
        found["stay_rate"] == pytest.approx(40)
        and found["flip_rate"] == pytest.approx(40)
        and found["ambiguous_rate"] == pytest.approx(20)
    )
    assert found["near_duplicate_rate"] == pytest.approx(60)
    assert found["source_accuracy"] == 100
    sources = train[made.sources]
    assert found["distance_to_source"] == pytest.approx(
        float((to_unit(made.images) - to_unit(sources)).double().square().mean((1, 2, 3)).sqrt().mean()), rel=1e-5
    )
    assert found["judged"]["class"] == [0, 1, 2, 2, 0]


@pytest.mark.parametrize("side", [8, 16, 32])
def test_border_correlation_equals_the_loop(generator, side):
    train = torch.randint(256, (4, 3, side, side), generator=generator, dtype=torch.uint8)
    images = (train.float() * 0.6 + 0.4 * torch.randint(256, train.shape, generator=generator)).to(torch.uint8)
    found = set_quality(a_set(images, [0] * 4, range(4)), train, judge_by_brightness)
    assert found["border_correlation"] == pytest.approx(naive_border_correlation(images, train), abs=1e-5)
    assert found["border_correlation_random"] == pytest.approx(naive_border_correlation(images, train.roll(2, 0)), abs=1e-5)
    assert found["border_correlation"] > found["border_correlation_random"] + 0.2


def test_the_random_comparison_never_meets_the_own_source(generator):
    # three copies of every source, each an exact copy of it: an own source among the random ones would correlate perfectly
    train = torch.randint(256, (5, 3, 16, 16), generator=generator, dtype=torch.uint8)
    sources = [source for source in range(5) for _ in range(3)]
    found = set_quality(a_set(train[sources], [0] * 15, sources), train, judge_by_brightness)
    assert found["border_correlation"] == pytest.approx(1, abs=1e-5)
    assert abs(found["border_correlation_random"]) < 0.2


def test_a_copy_is_found_below_two_and_a_half_grey_levels(generator):
    train = torch.randint(10, 240, (3, 3, 16, 16), generator=generator, dtype=torch.uint8)
    for levels, rate in ((0, 100), (2, 100), (3, 0)):
        found = set_quality(a_set(train + levels, [0] * 3, range(3)), train, judge_by_brightness)
        assert found["near_duplicate_rate"] == rate
