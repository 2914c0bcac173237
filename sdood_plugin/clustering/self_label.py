"""Self-labelling (Van Gansbeke et al., ECCV 2020, section 2.3): the confident images teach the rest.

An image is confident where its largest probability exceeds a threshold; cross-entropy with its own cluster, weighted so
that every cluster counts alike, is all there is to the loss. Clusters are watched: one that loses its last image ends the
training with an error, one without a confident image is reported.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..config import ClusteringConfig
from ..errors import RunError
from ..randomness import step_generator
from .scan import ClusterHead

log = logging.getLogger(__name__)

LR = 1e-3  # of a head on frozen features
DROPOUT = 0.2  # of frozen features


class Confident(NamedTuple):
    """The images that teach.

    `rows` int64 (M,); `labels` int64 (M,), their clusters; `weights` float (C,), of the clusters in the loss.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


def confident_images(probabilities: torch.Tensor, threshold: float) -> Confident:
    """The images whose largest probability exceeds the threshold, a cluster's weight being M over its share of them.

    Args:
        probabilities: float (N, C).
        threshold: 0.99 in the paper.

    Raises:
        RunError: There is none, or a cluster has no image at all.
    """
    values, labels = probabilities.max(dim=1)
    classes = probabilities.shape[1]
    empty = (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist()
    if empty:
        raise RunError(
            "self-labelling",
            f"no image left in cluster {empty[0]} ({len(empty)} clusters of {classes} are empty)",
            "images in every cluster",
            "lower --clustering.self_label_epochs (0 leaves it out), --clustering.finetune_lr or --clustering.clusters",
        )
    rows = (values > threshold).nonzero().flatten()
    if not len(rows):
        raise RunError(
            "self-labelling",
            f"no image of a probability above {threshold} (the largest is {float(values.max()):.3f})",
            "confident images to learn from",
            "lower --clustering.self_label_threshold or raise --clustering.head_epochs",
        )
    counts = torch.bincount(labels[rows], minlength=classes)
    return Confident(rows, labels[rows], torch.where(counts > 0, len(rows) / counts.clamp_min(1), 1.0))


def report_clusters(confident: Confident, epoch: int) -> list[str]:
    """A line on every cluster that has no confident image; it is logged, too."""
    counts = torch.bincount(confident.labels, minlength=len(confident.weights))
    lines = [
        f"self-labelling epoch {epoch}: cluster {cluster} has no confident image and teaches nothing"
        for cluster in (counts == 0).nonzero().flatten().tolist()
    ]
    for line in lines:
        log.warning("%s", line)
    return lines


def self_label_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of float (B, C) logits with int64 (B,) clusters, the mean weighted by float (C,) weights."""
    return F.cross_entropy(logits.float(), labels, weight=weights)


def self_label_head(
    head: ClusterHead, features: torch.Tensor, config: ClusteringConfig, seed: int
) -> tuple[dict[str, list[float]], list[str]]:
    """Self-labelling of a head on frozen features, where dropout stands in for augmentation.

    Args:
        head: Trained in place, on the features' device.
        features: float (N, D).
        config: Epochs, batch size, threshold.
        seed: Seed of this stage.

    Returns:
        By epoch the loss and the share of images that are confident; and what befell clusters, a line each.

    Raises:
        RunError: A cluster has lost its last image, or no image is confident.
    """
    optimizer = torch.optim.Adam(head.parameters(), lr=LR)
    history: dict[str, list[float]] = {"loss": [], "confident": []}
    notes: list[str] = []
    batch_size = min(config.head_batch_size, len(features))
    for epoch in range(config.self_label_epochs):
        with torch.no_grad():
            confident = confident_images(head(features).softmax(dim=1), config.self_label_threshold)
        notes += report_clusters(confident, epoch)
        generator = step_generator(seed, "self-label-head", epoch, features.device)
        losses = []
        for _ in range(max(1, len(features) // batch_size)):
            chosen = torch.randint(len(confident.rows), (batch_size,), generator=generator, device=features.device)
            points = head.standardised(features[confident.rows[chosen]])
            kept = torch.rand(points.shape, generator=generator, device=points.device) >= DROPOUT
            logits = head.classify(points * kept / (1 - DROPOUT))
            loss = self_label_loss(logits, confident.labels[chosen], confident.weights)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        history["loss"].append(float(torch.stack(losses).mean()))
        history["confident"].append(len(confident.rows) / len(features))
    return history, notes
