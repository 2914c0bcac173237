"""Detection and clustering metrics against loops that follow their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sdood_plugin.errors import UsageError
from sdood_plugin.metrics import auroc_interval, auroc_standard_error, clustering_metrics, detection_metrics


def naive_auroc(inside, outside):
    """The probability that an OOD image scores higher than an ID image, ties counting a half."""
    wins = sum((b > a) + 0.5 * (b == a) for a in inside.tolist() for b in outside.tolist())
    return 100 * wins / (len(inside) * len(outside))


def naive_average_precision(positive, negative):
    """Sum over distinct thresholds, from the top, of precision times the gain in recall."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(positive) | set(negative), reverse=True):
        hits, false = sum(p >= threshold for p in positive), sum(n >= threshold for n in negative)
        total += (hits / len(positive) - recall) * hits / (hits + false)
        recall = hits / len(positive)
    return 100 * total


def naive_fpr(positive, negative, recall=0.95):
    """False positives at the highest threshold that keeps at least 95 % of the positives."""
    for threshold in sorted(set(positive), reverse=True):
        if sum(p >= threshold for p in positive) / len(positive) >= recall:
            return 100 * sum(n >= threshold for n in negative) / len(negative)
    raise AssertionError


def scores(kind, seed):
    random = np.random.default_rng(seed)
    inside, outside = random.normal(0, 1, 40), random.normal(1, 1.5, 31)
    if kind == "ties":
        inside, outside = inside.round(), outside.round()
    if kind == "separated":
        outside = outside + 100
    if kind == "reversed":
        outside = outside - 100
    return inside, outside


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["plain", "ties", "separated", "reversed"])
def test_detection_metrics_equal_their_definitions(kind, seed):
    inside, outside = scores(kind, seed)
    assert detection_metrics(inside, outside) == pytest.approx(
        {
            "auroc": naive_auroc(inside, outside),
            "aupr": naive_average_precision(outside, inside),
            "aupr_id": naive_average_precision(-inside, -outside),
            "fpr95": naive_fpr(-inside, -outside),
            "fpr95_ood_positive": naive_fpr(outside, inside),
        }
    )


def test_the_two_conventions_of_fpr95_differ_where_they_should():
    # every ID image below every OOD image but one OOD outlier far below: it is accepted, no ID image is rejected
    inside, outside = np.arange(100.0, 200.0), np.r_[0.0, np.arange(300.0, 340.0)]
    found = detection_metrics(inside, outside)
    assert found["fpr95"] == pytest.approx(100 / 41)
    assert found["fpr95_ood_positive"] == 0


def test_larger_means_more_ood():
    assert detection_metrics([0, 1], [2, 3])["auroc"] == 100
    assert detection_metrics([2, 3], [0, 1])["auroc"] == 0


@pytest.mark.parametrize(
    ("inside", "outside", "name"), [([], [1.0], "ID"), ([1.0], [], "OOD"), ([np.nan], [1.0], "ID"), ([1.0], [np.inf], "OOD")]
)
def test_refuses_scores_that_mean_nothing(inside, outside, name):
    with pytest.raises(UsageError, match=f"^{name} scores"):
        detection_metrics(inside, outside)


def test_interval_is_hanley_and_mcneils():
    inside, outside = scores("plain", 0)
    area, n, m = naive_auroc(inside, outside) / 100, 40, 31
    q1, q2 = area / (2 - area), 2 * area * area / (1 + area)
    error = ((area * (1 - area) + (m - 1) * (q1 - area**2) + (n - 1) * (q2 - area**2)) / (n * m)) ** 0.5
    assert auroc_standard_error(100 * area, n, m) == pytest.approx(100 * error)
    assert auroc_interval(100 * area, n, m) == pytest.approx((100 * (area - 1.959964 * error), 100 * (area + 1.959964 * error)))
    assert auroc_interval(100.0, n, m) == (100, 100) and auroc_interval(99.9, 5, 5)[1] == 100


def test_interval_covers_the_true_area_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    true = 100 * 0.7602499389  # Phi(1 / sqrt 2), the AUROC of two unit normals one apart
    held = 0
    for _ in range(200):
        low, high = auroc_interval(naive_auroc(random.normal(0, 1, 60), random.normal(1, 1, 60)), 60, 60)
        held += low <= true <= high
    assert held >= 180


@pytest.mark.parametrize(("clusters", "classes"), [(4, 4), (5, 3), (3, 5)])
def test_accuracy_is_the_best_matching_over_all_permutations(clusters, classes):
    random = np.random.default_rng(clusters)
    true = random.integers(classes, size=60)
    predicted = np.where(random.random(60) < 0.6, (true + 1) % clusters, random.integers(clusters, size=60))
    most = max(clusters, classes)
    best = max(
        np.mean([order[p] == t for p, t in zip(predicted, true, strict=True)]) for order in itertools.permutations(range(most))
    )
    assert clustering_metrics(predicted, true)["acc"] == pytest.approx(100 * best)


def test_renamed_clusters_are_perfect_and_random_ones_are_not():
    true = np.arange(300) % 3
    assert clustering_metrics((true + 2) % 3, true) == pytest.approx({"acc": 100, "nmi": 100, "ari": 100})
    chance = clustering_metrics(np.random.default_rng(0).integers(3, size=300), true)
    assert chance["acc"] < 50 and chance["nmi"] < 5 and abs(chance["ari"]) < 5


def test_nmi_and_ari_follow_their_formulas():
    random = np.random.default_rng(1)
    a, b = random.integers(3, size=40), random.integers(4, size=40)
    table = np.array([[np.sum((a == i) & (b == j)) for j in range(4)] for i in range(3)]) / 40
    rows, columns = table.sum(1), table.sum(0)
    mutual = sum(table[i, j] * np.log(table[i, j] / rows[i] / columns[j]) for i in range(3) for j in range(4) if table[i, j])
    entropy = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (rows, columns)]
    pairs = list(itertools.combinations(range(40), 2))
    both = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
    in_a, in_b = (sum(c[i] == c[j] for i, j in pairs) for c in (a, b))
    chance = in_a * in_b / len(pairs)
    found = clustering_metrics(a, b)
    assert found["nmi"] == pytest.approx(100 * mutual / np.mean(entropy))
    assert found["ari"] == pytest.approx(100 * (both - chance) / ((in_a + in_b) / 2 - chance))
