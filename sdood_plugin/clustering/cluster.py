"""The clustering stage's decision: from images to pseudo-labels by the configured method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from ..config import ClusteringConfig
from ..data.images import ImageSet
from ..errors import RunError
from ..features import Backbone, extract, load_backbone
from ..randomness import derive_seed
from .labels import PseudoLabels, check_labels, given_labels
from .scan import scan_clusters
from .simclr import train_simclr

MIN_IMAGES_PER_CLUSTER = 10


def cluster_images(
    images: ImageSet,
    config: ClusteringConfig,
    *,
    accelerator: Accelerator,
    seed: int,
    folder: Path,
    key: str,
    checkpoint_seconds: float,
) -> tuple[PseudoLabels, Backbone | None, dict[str, Any]]:
    """Pseudo-label a set of images.

    Returns:
        The labels, the backbone whose features were clustered (None for given labels), and loss curves by name.

    Raises:
        RunError: Too few images, or a cluster without images.
    """
    if config.method == "given":
        return given_labels(images, config.labels), None, {}
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
    curves: dict[str, Any] = {}
    if config.weights is not None:
        backbone = load_backbone(config.backbone, config.weights).to(accelerator.device)
    else:
        backbone, curves["simclr"] = train_simclr(
            images.images,
            config,
            accelerator=accelerator,
            seed=seed,
            folder=folder,
            key=key,
            checkpoint_seconds=checkpoint_seconds,
        )
    features = extract(backbone, images.images, device=accelerator.device)
    if config.method == "scan":
        probabilities, curves["scan"] = scan_clusters(features, config, seed)
        confidence, labels = (values.cpu() for values in probabilities.max(dim=1))
    else:
        labels, confidence = _kmeans(features, config.clusters, seed)
    check_labels(labels, f"the {config.method} clustering", config.clusters)
    return PseudoLabels(labels, confidence, config.clusters), backbone, curves


def _kmeans(features: torch.Tensor, clusters: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels int64 (N,) and a confidence (N,): how much nearer the own centre is than the next, 0 to 1."""
    from sklearn.cluster import KMeans

    points = F.normalize(features, dim=1).cpu().numpy()
    model = KMeans(clusters, n_init=10, random_state=derive_seed(seed, "kmeans") % 2**32).fit(points)
    distances = torch.from_numpy(model.transform(points)).sort(dim=1).values
    return torch.from_numpy(model.labels_).long(), (1 - distances[:, 0] / distances[:, 1].clamp_min(1e-12)).float()
