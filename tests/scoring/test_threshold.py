"""Thresholds, their intervals and p-values against loops, the binomial distribution and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom

from sdood_plugin.scoring.threshold import choose_threshold, p_values


@pytest.mark.parametrize(("count", "rate"), [(20, 0.05), (19, 0.05), (200, 0.1), (3, 0.5), (1, 0.5)])
def test_the_interval_is_that_of_an_order_statistic(generator, count, rate):
    scores = torch.randn(count, generator=generator)
    chosen = choose_threshold(scores, rate)
    above = int((scores > chosen.value).sum())
    assert chosen.value in scores.tolist() and above <= rate * count and chosen.false_alarm_rate == rate
    # a share of at most x lies above the j-th smallest of n exactly if fewer than j of n lie below the quantile 1 - x
    for end, probability in ((chosen.low, 0.025), (chosen.high, 0.975)):
        assert binom.cdf(count - above - 1, count, 1 - end) == pytest.approx(probability, abs=1e-9)


def test_the_interval_covers_the_true_rate_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(800):
        chosen = choose_threshold(torch.from_numpy(rng.uniform(size=60)), 0.1)
        hits += chosen.low <= 1 - chosen.value <= chosen.high  # of uniform scores the share above t is 1 - t
    assert 0.92 < hits / 800 < 0.98


def test_a_tie_at_the_threshold_counts_as_accepted():
    chosen = choose_threshold(torch.tensor([0.0, 1.0, 1.0, 1.0]), 0.5)
    assert chosen.value == 1.0 and chosen.low < 0.01  # none of four is above it
    assert choose_threshold(torch.tensor([0.0, 1.0, 2.0, 3.0]), 0.5).low > 0.05


def test_p_values_equal_the_loop(generator):
    heldout = torch.randint(5, (30,), generator=generator).float()
    scores = torch.tensor([-1.0, 0.0, 2.0, 2.5, 4.0, 9.0])
    expected = [(1 + sum(h >= s for h in heldout.tolist())) / 31 for s in scores.tolist()]
    assert p_values(scores, heldout).tolist() == pytest.approx(expected)


def test_p_values_of_images_like_the_held_out_ones_are_valid(generator):
    together = torch.randn(400, 100, generator=generator)
    values = torch.stack([p_values(row[:1], row[1:]) for row in together])[:, 0]
    for share in (0.05, 0.2, 0.5):
        assert abs(float((values <= share).double().mean()) - share) < 0.06
