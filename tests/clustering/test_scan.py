"""SCAN's loss against its formula, and what its heads find."""

from __future__ import annotations

import math

import pytest
import torch

from sdood_plugin.clustering.scan import feature_scale, scan_head, scan_loss
from sdood_plugin.config import ClusteringConfig
from sdood_plugin.errors import RunError
from sdood_plugin.metrics import clustering_metrics
from sdood_plugin.neighbours import nearest


def softmax(row):
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def naive_scan_loss(anchor, neighbour, weight):
    """Equation 2 of Van Gansbeke et al., one head, in Python floats."""
    first, second = [softmax(row) for row in anchor.tolist()], [softmax(row) for row in neighbour.tolist()]
    agreement = sum(math.log(sum(p * q for p, q in zip(a, b, strict=True))) for a, b in zip(first, second, strict=True)) / len(
        first
    )
    mean = [sum(row[c] for row in first) / len(first) for c in range(len(first[0]))]
    return -agreement + weight * sum(p * math.log(p) for p in mean)


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_loss_equals_the_formula_for_every_head(generator, weight):
    anchor, neighbour = 2 * torch.randn(2, 3, 8, 4, generator=generator, dtype=torch.float64)
    found = scan_loss(anchor, neighbour, weight)
    expected = [naive_scan_loss(anchor[head], neighbour[head], weight) for head in range(3)]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_loss_in_closed_form():
    sure = 50 * torch.eye(4)[None]  # four images, each surely in a class of its own
    assert float(scan_loss(sure, sure, 5.0)) == pytest.approx(-5 * math.log(4), rel=1e-5)
    one = torch.tensor([50.0, 0, 0, 0]).expand(1, 4, 4)  # all in one cluster: agreement is perfect, the entropy is 0
    assert float(scan_loss(one, one, 5.0)) == pytest.approx(0, abs=1e-5)
    nothing = torch.zeros(1, 4, 4)
    assert float(scan_loss(nothing, nothing, 5.0)) == pytest.approx(math.log(4) - 5 * math.log(4), rel=1e-5)


def test_disagreement_of_sure_heads_stays_finite():
    neighbour = (200 * torch.eye(2).flip(0)[None]).requires_grad_()
    loss = scan_loss(200 * torch.eye(2)[None], neighbour, 5.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(neighbour.grad).all()


def blobs(generator, width=8, images=40):
    labels = torch.arange(4 * images) % 4
    return 4 * torch.eye(4, width)[labels] + 0.5 * torch.randn(len(labels), width, generator=generator), labels


def probabilities(head, features):
    with torch.no_grad():
        return head(features).softmax(dim=1)


def mined(features, k):
    return nearest(features, features, k, exclude_self=True)[1]


def test_heads_find_separated_clusters(generator):
    features, labels = blobs(generator)
    config = ClusteringConfig(clusters=4, heads=3, head_epochs=30, head_lr=0.05, head_batch_size=80)
    head, history = scan_head(features, mined(features, 5), config, seed=0)
    assert clustering_metrics(probabilities(head, features).argmax(1), labels)["acc"] > 95
    assert len(history["loss"]) == len(history["lowest"]) == 30
    assert history["lowest"][-1] <= history["loss"][-1] < history["loss"][0]
    again, _ = scan_head(features, mined(features, 5), config, seed=0)
    assert torch.equal(again.weight, head.weight) and torch.equal(again.bias, head.bias)


def test_the_head_of_lowest_loss_is_kept(generator):
    # one neighbour, one batch and no learning: the loss of a head can be computed again from its probabilities
    features, _ = blobs(generator)
    config = ClusteringConfig(clusters=4, heads=6, head_epochs=1, head_lr=1e-12, head_batch_size=160)
    partner = mined(features, 1)
    head, history = scan_head(features, partner, config, seed=1)
    logits = probabilities(head, features).log()[None]
    assert history["lowest"][-1] < history["loss"][-1] - 0.01
    assert float(scan_loss(logits, logits[:, partner[:, 0]], 5.0)) == pytest.approx(history["lowest"][-1], abs=1e-4)


def test_the_head_sees_unit_length_standardised(generator):
    features = 5 * torch.randn(50, 6, generator=generator, dtype=torch.float64) + 3
    mean, std = feature_scale(features)
    rows = features.numpy()
    unit = rows / (rows**2).sum(axis=1, keepdims=True) ** 0.5
    torch.testing.assert_close(mean, torch.tensor(unit.mean(axis=0)))
    torch.testing.assert_close(std, torch.tensor(unit.std(axis=0, ddof=1)))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(30, 4), "the same for all 30 images"),
        (torch.arange(1.0, 31)[:, None] * torch.ones(4), "the same for all 30 images"),  # they differ in length alone
        (torch.ones(30, 4).index_fill(0, torch.tensor([7]), float("nan")), "features of image 7: got NaN or infinity"),
    ],
)
def test_features_that_cannot_be_clustered_are_named(features, message):
    with pytest.raises(RunError, match=message):
        feature_scale(features)
