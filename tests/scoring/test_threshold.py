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


@pytest.mark.parametrize("count", [1, 9, 19, 20, 21, 40, 99, 500])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.35, 0.5, 0.95])
@pytest.mark.parametrize("tied", [False, True])
def test_above_the_threshold_are_those_whose_p_value_is_at_most_the_rate(generator, caplog, count, rate, tied):
    draw = (
        (lambda n: torch.randint(7, (n,), generator=generator).float())
        if tied
        else (lambda n: torch.randn(n, generator=generator))
    )
    heldout = draw(count)
    chosen, scores = choose_threshold(heldout, rate), torch.cat([heldout, draw(200)])
    if rate >= 1 / (count + 1):
        assert torch.equal(scores > chosen.value, p_values(scores, heldout) <= rate)
        assert not caplog.records
    else:
        assert chosen.value == heldout.max()
        assert f"{1 / (count + 1):.3g}, the smallest that {count} held-out images" in caplog.text


@pytest.mark.parametrize("count", [21, 60])
def test_false_alarms_are_on_average_no_more_than_asked(count):
    rng = np.random.default_rng(1)
    shares = [1 - choose_threshold(torch.from_numpy(rng.uniform(size=count)), 0.05).value for _ in range(2000)]
    assert np.mean(shares) < 0.05 + 3 * np.std(shares) / 2000**0.5


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
