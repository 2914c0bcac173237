"""Which images teach, how much each cluster counts, and what happens to a cluster that is lost."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from sdood_plugin.clustering.scan import ClusterHead
from sdood_plugin.clustering.self_label import confident_images, report_clusters, self_label_head, self_label_loss
from sdood_plugin.config import ClusteringConfig
from sdood_plugin.errors import RunError
from sdood_plugin.metrics import clustering_metrics


def naive_confident(probabilities, threshold):
    """The mask, the labels and the weights, image by image in Python floats."""
    rows, labels = [], []
    for row, values in enumerate(probabilities.tolist()):
        if max(values) > threshold:
            rows.append(row)
            labels.append(values.index(max(values)))
    weights = [len(rows) / labels.count(c) if c in labels else 1.0 for c in range(probabilities.shape[1])]
    return rows, labels, weights


@pytest.mark.parametrize("threshold", [0.4, 0.7, 0.9])
def test_the_mask_and_the_weights_are_the_papers(generator, threshold):
    probabilities = (3 * torch.randn(200, 5, generator=generator, dtype=torch.float64)).softmax(dim=1)
    found = confident_images(probabilities, threshold)
    rows, labels, weights = naive_confident(probabilities, threshold)
    assert 0 < len(rows) < 200
    assert found.rows.tolist() == rows and found.labels.tolist() == labels
    torch.testing.assert_close(found.weights.double(), torch.tensor(weights, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_probability_of_exactly_the_threshold_is_not_confident():
    probabilities = torch.tensor([[0.75, 0.25], [0.875, 0.125], [0.25, 0.75]])
    assert confident_images(probabilities, 0.75).rows.tolist() == [1]


def test_the_loss_is_the_weighted_mean_of_the_cross_entropies(generator):
    logits = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    labels, weights = torch.arange(12) % 4, [1.0, 2.0, 5.0, 0.5]
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total -= weights[label] * (row[label] - math.log(sum(math.exp(value) for value in row)))
    found = self_label_loss(logits, labels, torch.tensor(weights))
    assert float(found) == pytest.approx(total / (3 * sum(weights)), rel=1e-5)


def test_a_cluster_without_images_is_an_error_with_a_remedy():
    with pytest.raises(RunError, match="no image left in cluster 1 .2 clusters of 4.*self_label_epochs"):
        confident_images(torch.eye(4)[[0, 0, 2]], 0.9)


def test_no_confident_image_is_an_error_that_says_how_far_they_are():
    with pytest.raises(RunError, match="above 0.99 .the largest is 0.600.*self_label_threshold"):
        confident_images(torch.tensor([[0.6, 0.4], [0.4, 0.6]]), 0.99)


def test_a_cluster_without_confident_images_is_reported(caplog):
    confident = confident_images(torch.tensor([[0.999, 0.001], [0.4, 0.6]]), 0.99)
    with caplog.at_level(logging.WARNING):
        lines = report_clusters(confident, 3)
    assert lines == ["self-labelling epoch 3: cluster 1 has no confident image and teaches nothing"] == caplog.messages
    assert confident.weights.tolist() == [1.0, 1.0]


def noisy_blobs(generator):
    labels = torch.arange(300) % 3
    return torch.eye(3, 16)[labels] + 0.5 * torch.randn(300, 16, generator=generator), labels


def test_a_head_teaches_itself(generator):
    features, labels = noisy_blobs(generator)
    unit = torch.nn.functional.normalize(features, dim=1)
    directions = torch.eye(16, 3) + 0.25 * torch.randn(16, 3, generator=generator)  # a head that has the right idea
    head = ClusterHead(unit.mean(0), unit.std(0), 2 * directions, torch.zeros(3))

    def accuracy():
        with torch.no_grad():
            return clustering_metrics(head(features).argmax(1), labels)["acc"]

    before, weight = accuracy(), head.weight.detach().clone()
    config = ClusteringConfig(clusters=3, self_label_epochs=5, self_label_threshold=0.9, head_batch_size=64)
    history, notes = self_label_head(head, features, config, seed=0)
    assert notes == [] and not torch.equal(head.weight, weight) and accuracy() >= before > 60
    assert len(history["loss"]) == len(history["confident"]) == 5
    assert history["loss"][-1] < history["loss"][0] and 0 < history["confident"][0] < history["confident"][-1] <= 1
