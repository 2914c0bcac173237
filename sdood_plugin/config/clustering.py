"""The pseudo-labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .check import require, require_positive, require_types


@dataclass(frozen=True)
class ClusteringConfig:
    """Pseudo-labels.

    Args:
        method: `scan`, `kmeans` or `gmm` (Gaussian mixture) on the same features, or `given`: labels from `labels`, or,
            where that is null, the images' own (class folders, imglist, batches).
        clusters: C, the number of clusters; with given labels it is read from them.
        labels: For `given`: a CSV with columns `path` (or `index`) and `label`, an imglist (.txt), or an .npy of integers
            in the order of the images.
        backbone: `small_cnn`, `resnet18_cifar`, or the name of any timm model.
        weights: safetensors file for the backbone; `hub` takes timm's own pre-trained ones; null trains it with SimCLR.
        pretext_steps: SimCLR steps.
        pretext_batch_size: Images a SimCLR step; each is seen twice.
        pretext_lr: Peak learning rate of SimCLR (Adam, cosine to 0).
        temperature: NT-Xent temperature.
        augmentation: Views of an image: `digits` (shift, scale, turn, colour mixing; no flips) or `natural` (crops,
            flips, colour jitter, grey).
        neighbours: K nearest neighbours of each image for SCAN.
        entropy_weight: Weight of SCAN's term that keeps clusters from emptying.
        heads: SCAN heads trained together; the one of lowest loss is kept.
        head_epochs: Epochs of the SCAN heads.
        head_lr: Learning rate of the SCAN heads (Adam).
        head_batch_size: Images a SCAN step of the heads, and a self-labelling step of a head on frozen features.
        finetune_epochs: Epochs of SCAN's loss through the backbone under strong augmentation, from the kept head on; 0
            leaves the backbone as it is.
        finetune_lr: Learning rate of SCAN and of self-labelling through the backbone (AdamW).
        finetune_batch_size: Images a step through the backbone.
        self_label_epochs: Epochs of self-labelling on the confident images, through the backbone under strong
            augmentation where `finetune_epochs` is above 0, else of the head on frozen features; 0 leaves it out.
        self_label_threshold: Images whose largest probability exceeds this are the confident ones.
    """

    method: Literal["scan", "kmeans", "gmm", "given"] = "scan"
    clusters: int = 10
    labels: str | None = None
    backbone: str = "small_cnn"
    weights: str | None = None
    pretext_steps: int = 600
    pretext_batch_size: int = 256
    pretext_lr: float = 2e-3
    temperature: float = 0.3
    augmentation: Literal["digits", "natural"] = "natural"
    neighbours: int = 20
    entropy_weight: float = 5.0
    heads: int = 10
    head_epochs: int = 60
    head_lr: float = 1e-3
    head_batch_size: int = 512
    finetune_epochs: int = 0
    finetune_lr: float = 1e-4
    finetune_batch_size: int = 256
    self_label_epochs: int = 0
    self_label_threshold: float = 0.99

    @property
    def leaves_backbone(self) -> bool:
        """Whether it ends with weights of its own, which no file had before."""
        return self.method != "given" and (self.weights is None or self.finetune_epochs > 0)

    def __post_init__(self) -> None:
        require_types("clustering.{}", self)
        require(
            self.clusters >= 2,
            "clustering.clusters",
            self.clusters,
            "2 or more: a wrong class must exist",
            "raise it; with one class there is nothing to be discrepant from",
        )
        require_positive(
            "clustering",
            self,
            "pretext_steps",
            "pretext_batch_size",
            "pretext_lr",
            "temperature",
            "neighbours",
            "heads",
            "head_epochs",
            "head_lr",
            "head_batch_size",
            "finetune_lr",
            "finetune_batch_size",
        )
        for name in ("finetune_epochs", "self_label_epochs"):
            require(getattr(self, name) >= 0, f"clustering.{name}", getattr(self, name), "0 (leave it out) or more")
        require(
            0 <= self.self_label_threshold < 1,
            "clustering.self_label_threshold",
            self.self_label_threshold,
            "0 to 1, 1 left out: no probability exceeds it",
        )
        require(0 <= self.entropy_weight < math.inf, "clustering.entropy_weight", self.entropy_weight, "0 or more")
        require(
            self.labels is None or self.method == "given",
            "clustering.labels",
            self.labels,
            "method `given` with it",
            "add --clustering.method given",
        )
