"""The detector and its score."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .check import require, require_positive


@dataclass(frozen=True)
class DetectorConfig:
    """The three-head detector.

    Args:
        backbone: `small_cnn`, `resnet18_cifar`, or the name of any timm model.
        weights: safetensors file for the backbone; null starts from random weights.
        epochs: Passes over the in-distribution training images.
        batch_size: In-distribution images a step, over all processes.
        outlier_ratio: Outliers a step, as a share of `batch_size`.
        control_ratio: Same-class controls a step, used as in-distribution, as a share of `batch_size`.
        lambda_out: lambda, weight of the outliers' own classification loss.
        optimizer: `sgd` (Nesterov momentum 0.9) or `adamw`.
        lr: Peak learning rate (short warm-up, cosine to 0).
        weight_decay: Weight decay.
        augmentation: `digits` (small shifts), `natural` (shifts and flips) or `none`; the same for every origin.
    """

    backbone: str = "small_cnn"
    weights: str | None = None
    epochs: int = 25
    batch_size: int = 128
    outlier_ratio: float = 0.5
    control_ratio: float = 0.5
    lambda_out: float = 1.0
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 2e-3
    weight_decay: float = 5e-4
    augmentation: Literal["digits", "natural", "none"] = "natural"

    def __post_init__(self) -> None:
        require_positive("detector", self, "epochs", "batch_size", "lr")
        require(0 <= self.outlier_ratio < math.inf, "detector.outlier_ratio", self.outlier_ratio, "0 (no outliers) or more")
        require(0 <= self.control_ratio < math.inf, "detector.control_ratio", self.control_ratio, "0 (no controls) or more")
        require(0 <= self.lambda_out < math.inf, "detector.lambda_out", self.lambda_out, "0 or more")
        require(0 <= self.weight_decay < math.inf, "detector.weight_decay", self.weight_decay, "0 or more")


@dataclass(frozen=True)
class ScoringConfig:
    """The distance + voting score.

    Args:
        k_distance: Neighbours among in-distribution images whose squared distances are summed.
        k_vote: Neighbours among in-distribution images and outliers that vote.
        normalise: Scale features to unit length.
        alpha: Weight of the votes against the distance in units of its held-out median; null chooses it from `alphas`
            on held-out images and held-out outliers.
        alphas: Candidates for alpha.
        false_alarm_rate: Share of in-distribution images the decision threshold may reject.
    """

    k_distance: int = 2
    k_vote: int = 5
    normalise: bool = True
    alpha: float | None = None
    alphas: list[float] = field(default_factory=lambda: [0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
    false_alarm_rate: float = 0.05

    def __post_init__(self) -> None:
        require_positive("scoring", self, "k_distance", "k_vote")
        require(self.alpha is None or 0 <= self.alpha < math.inf, "scoring.alpha", self.alpha, "0 or more, or null to choose it")
        require(
            bool(self.alphas) and all(0 <= alpha < math.inf for alpha in self.alphas),
            "scoring.alphas",
            self.alphas,
            "numbers of 0 or more",
        )
        require(0 < self.false_alarm_rate < 1, "scoring.false_alarm_rate", self.false_alarm_rate, "above 0 and below 1")
