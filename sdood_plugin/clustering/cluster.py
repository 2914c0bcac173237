"""The clustering stage's decision: from images to pseudo-labels by the configured method."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..config import ClusteringConfig
from ..data.images import ImageSet
from ..errors import RunError
from ..features import Backbone, load_backbone
from ..training import Job, place
from .finetune import predict, scan_through_backbone, self_label_through_backbone
from .labels import PseudoLabels, check_labels, given_labels
from .mixtures import gaussian_mixture, k_means
from .processes import extract_all, mine_neighbours
from .scan import feature_scale, scan_head
from .self_label import self_label_head
from .simclr import train_simclr

MIN_IMAGES_PER_CLUSTER = 10


class Clustering(NamedTuple):
    """What came of it.

    `labels`; the `backbone` whose features were clustered, as it is in the end (None for given labels); loss `curves` by
    name; `notes`, a line on each cluster that was in trouble.
    """

    labels: PseudoLabels
    backbone: Backbone | None
    curves: dict[str, dict[str, list[float]]]
    notes: list[str]


def cluster_images(
    images: ImageSet,
    config: ClusteringConfig,
    job: Job,
) -> Clustering:
    """Pseudo-label a set of images; its own labels are looked at for the method `given` only.

    Raises:
        RunError: Too few images, images that do not differ, or a cluster without images.
    """
    if config.method == "given":
        return Clustering(given_labels(images, config.labels), None, {}, [])
    check_count(images, config)
    curves: dict[str, dict[str, list[float]]] = {}
    if config.weights is not None:
        backbone = place(load_backbone(config.backbone, config.weights), job.device)
    else:
        backbone, curves["simclr"] = train_simclr(images.images, config, job)
    features = extract_all(backbone, images.images, job.accelerator)
    mean, std = feature_scale(features)
    notes: list[str] = []
    if config.method == "scan":
        points = F.normalize((F.normalize(features, dim=1) - mean) / std, dim=1)
        neighbours = mine_neighbours(points, config.neighbours, job.accelerator)
        probabilities, made, notes = _scan(backbone, images.images, features, neighbours, config, job)
        curves |= made
        confidence, labels = (values.cpu() for values in probabilities.max(dim=1))
    else:
        labels, confidence = (k_means if config.method == "kmeans" else gaussian_mixture)(features, config.clusters, job.seed)
    check_labels(labels, f"the {config.method} clustering", config.clusters)
    return Clustering(PseudoLabels(labels, confidence, config.clusters), backbone, curves, notes)


def check_count(images: ImageSet, config: ClusteringConfig) -> None:
    """Make sure that there are images enough to be clustered.

    Raises:
        RunError: There are not.
    """
    if len(images) < MIN_IMAGES_PER_CLUSTER * config.clusters:
        raise RunError(
            "training images",
            f"{len(images)} for {config.clusters} clusters",
            f"at least {MIN_IMAGES_PER_CLUSTER * config.clusters}",
            "give more images or lower --clustering.clusters",
        )
    if config.method == "scan" and config.neighbours >= len(images):
        raise RunError(
            "clustering.neighbours", config.neighbours, f"fewer than the {len(images)} images", "lower it or give more images"
        )


def _scan(
    backbone: Backbone,
    images: torch.Tensor,
    features: torch.Tensor,
    neighbours: torch.Tensor,
    config: ClusteringConfig,
    job: Job,
) -> tuple[torch.Tensor, dict[str, dict[str, list[float]]], list[str]]:
    """Probabilities (N, C), curves and notes of the two speeds: a head on frozen features, or on through the backbone."""
    curves, notes = dict[str, dict[str, list[float]]](), list[str]()
    head, curves["scan"] = scan_head(features, neighbours, config, job.seed)
    if config.finetune_epochs == 0:
        if config.self_label_epochs > 0:
            curves["self-label"], notes = self_label_head(head, features, config, job.seed)
        with torch.no_grad():
            return head(features).softmax(dim=1), curves, notes
    net = nn.Sequential(backbone.requires_grad_(True), head)
    curves["scan-backbone"] = scan_through_backbone(net, images, neighbours, config, job)
    if config.self_label_epochs > 0:
        curves["self-label"], notes = self_label_through_backbone(net, images, config, job)
    return predict(net, images, job.accelerator), curves, notes
