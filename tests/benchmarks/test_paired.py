"""The paired bootstrap against a slow one, and against what is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.paired import paired_rows, weighted_auroc


def auroc(inside, outside):
    return roc_auc_score([0] * len(inside) + [1] * len(outside), [*inside, *outside])


def difference(ours, theirs, **settings):
    """The one row of several runs against one OOD set."""
    (row,) = paired_rows([{"near": {"sdood": mine, "x": other}} for mine, other in zip(ours, theirs, strict=True)], **settings)
    return row


@pytest.fixture
def scores():
    generator = np.random.default_rng(0)
    inside, outside = generator.normal(0, 1, 60), generator.normal(1, 1, 40)
    return np.round(inside, 1), np.round(outside, 1)  # ties


def test_counts_as_weights_are_images_repeated(scores):
    generator = np.random.default_rng(1)
    for _ in range(5):
        rows = [generator.integers(0, len(side), len(side)) for side in scores]
        weights = [np.bincount(row, minlength=len(side))[None] for row, side in zip(rows, scores, strict=True)]
        found = weighted_auroc(scores, *weights)[0]
        assert found == pytest.approx(auroc(scores[0][rows[0]], scores[1][rows[1]]))


def test_the_difference_and_its_interval_are_those_of_a_slow_bootstrap(scores):
    generator = np.random.default_rng(2)
    other = tuple(side + generator.normal(0, 1, len(side)) for side in scores)
    found = difference([scores], [other], draws=3000)
    assert found["difference"] == pytest.approx(100 * (auroc(*scores) - auroc(*other)))
    slow = []
    for _ in range(300):
        rows = [generator.integers(0, len(side), len(side)) for side in scores]
        first, second = (auroc(pair[0][rows[0]], pair[1][rows[1]]) for pair in (scores, other))
        slow.append(100 * (first - second))
    low, high = np.quantile(slow, [0.025, 0.975])
    assert found["low"] == pytest.approx(low, abs=2.0) and found["high"] == pytest.approx(high, abs=2.0)


def test_equal_methods_differ_by_nothing_and_runs_are_averaged(scores):
    same = difference([scores, scores], [scores, scores])
    assert (same["difference"], same["low"], same["high"], same["spread"], same["n_runs"]) == (0, 0, 0, 0, 2)
    worse = (scores[0], scores[1] - 1)
    both = difference([scores, scores], [scores, worse])
    alone = difference([scores], [worse])
    assert both["difference"] == pytest.approx(alone["difference"] / 2) and both["spread"] > 0
    assert alone["low"] > 0


def width(row):
    return row["high"] - row["low"]


def test_more_runs_on_the_same_images_make_the_interval_no_narrower(scores):
    other = tuple(side + np.random.default_rng(2).normal(0, 1, len(side)) for side in scores)
    once = difference([scores], [other])
    for runs in (3, 5):
        copies = difference([scores] * runs, [other] * runs)
        assert width(copies) == pytest.approx(width(once)) and copies["spread"] == pytest.approx(0) and copies["n_runs"] == runs


def test_ood_images_that_are_each_runs_own_narrow_it(scores):
    far = (scores[0], scores[1][:6])  # few OOD images: they are what is not known
    other = tuple(side + np.random.default_rng(2).normal(0, 1, len(side)) for side in far)
    together, apart = (difference([far] * 9, [other] * 9, same_ood=same) for same in (True, False))
    assert width(apart) < 0.7 * width(together)


def test_scores_of_other_images_are_refused(scores):
    fewer = (scores[0], scores[1][:-1])
    with pytest.raises(ValueError, match="not the same images"):
        difference([scores], [fewer])
    with pytest.raises(ValueError, match="not the same images"):
        difference([scores, fewer], [scores, fewer])
    assert difference([scores, fewer], [scores, fewer], same_ood=False)["n_runs"] == 2
    with pytest.raises(ValueError, match="not the same images"):
        difference([scores, (scores[0][:-1], scores[1])], [scores] * 2, same_ood=False)


def test_only_comparators_get_a_row(scores):
    rows = paired_rows([{"near": {"sdood": scores, "sdood-vote": scores, "dn2": scores}}])
    assert [(row["ours"], row["method"], row["ood"]) for row in rows] == [("sdood", "dn2", "near")]
    assert paired_rows([]) == []
