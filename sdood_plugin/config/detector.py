"""The detector and its score."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .check import require, require_positive, require_types


@dataclass(frozen=True)
class DetectorConfig:
    """The three-head detector. Outliers and images are never mixed (no mixup, no CutMix): a blend has no origin.

    Args:
        backbone: `small_cnn`, `resnet18_cifar`, or the name of any timm model.
        weights: What the backbone starts from: a safetensors file, `hub` (timm's own) or `random`; null takes what the
            clustering ended with where its backbone is the same, else random weights.
        input_size: Side in pixels the backbone gets all images in; null is a timm model's own.
        pooling: The feature: `own` is the model's, `cls` and `mean` a transformer's class token and mean token.
        frozen_blocks: The stem and so many blocks keep their weights; `all` trains the heads alone. Where `augmentation`
            is `none` their outputs are computed once: those of timm's plain vision transformer (not of its relatives, such
            as BEiT, EVA or a distilled DeiT), or of any backbone under `all`.
        cache_gib: Most memory for those outputs, in float16 on the device; what needs more is computed in every step.
        epochs: Passes over the in-distribution training images.
        batch_size: In-distribution images a step, over all processes.
        outlier_ratio: Outliers a step, as a share of `batch_size`.
        control_ratio: Same-class controls a step, used as in-distribution, as a share of `batch_size`.
        lambda_out: lambda, weight of the outliers' own classification loss.
        label_smoothing: Share of a class label spread over all classes.
        optimizer: `sgd` (Nesterov momentum 0.9) or `adamw`.
        lr: Peak learning rate (warm-up, cosine to 0).
        layer_decay: Factor on the learning rate for each block further from the heads; 1 is one rate for all.
        warmup_fraction: Share of the steps over which the learning rate rises.
        weight_decay: Weight decay.
        ema_decay: The network kept is a running average of the weights with this decay, shorter at the start; 0 keeps
            the last weights.
        augmentation: `digits` (small shifts), `natural` (shifts and flips) or `none`; the same for every origin.
        compile: torch.compile the network: minutes at the start, faster steps. Switching it makes nothing again.
    """

    backbone: str = "small_cnn"
    weights: str | None = None
    input_size: int | None = None
    pooling: Literal["own", "cls", "mean"] = "own"
    frozen_blocks: int | Literal["all"] = 0
    cache_gib: float = 4.0
    epochs: int = 25
    batch_size: int = 128
    outlier_ratio: float = 0.5
    control_ratio: float = 0.5
    lambda_out: float = 1.0
    label_smoothing: float = 0.0
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 2e-3
    layer_decay: float = 1.0
    warmup_fraction: float = 0.05
    weight_decay: float = 5e-4
    ema_decay: float = 0.0
    augmentation: Literal["digits", "natural", "none"] = "natural"
    compile: bool = False

    def __post_init__(self) -> None:
        require_types("detector.{}", self)
        require_positive("detector", self, "epochs", "batch_size", "lr")
        for name in ("outlier_ratio", "control_ratio", "lambda_out", "weight_decay", "cache_gib"):
            require(0 <= getattr(self, name) < math.inf, f"detector.{name}", getattr(self, name), "0 or more")
        for name in ("label_smoothing", "ema_decay", "warmup_fraction"):
            require(0 <= getattr(self, name) < 1, f"detector.{name}", getattr(self, name), "0 or more and below 1")
        require(0 < self.layer_decay <= 1, "detector.layer_decay", self.layer_decay, "above 0, at most 1")
        require(self.input_size is None or self.input_size > 0, "detector.input_size", self.input_size, "above 0, or null")
        require(
            self.frozen_blocks == "all" or self.frozen_blocks >= 0,
            "detector.frozen_blocks",
            self.frozen_blocks,
            "0 or more, or all",
        )


@dataclass(frozen=True)
class ScoringConfig:
    """The distance + voting score.

    Args:
        k_distance: Neighbours among in-distribution images whose squared distances are summed.
        k_vote: Neighbours among in-distribution images and outliers that vote.
        normalise: Scale features to unit length.
        alpha: Weight of the votes against the distance in units of its held-out median; null chooses it from `alphas`
            on held-out images and controls against held-out outliers that find none of their own class in the bank.
        alphas: Candidates for alpha.
        false_alarm_rate: Share of in-distribution images the decision threshold may reject.
        bank_size: Rows of both banks together at most, by k-means centres in place of images, k_distance or more of them
            in-distribution; null keeps every image. What it costs on held-out images stands in score.json.
        backend: Neighbour search by `torch`, by `faiss`, or by the faster one that is there (`auto`); the answer is the same.
    """

    k_distance: int = 2
    k_vote: int = 5
    normalise: bool = True
    alpha: float | None = None
    alphas: list[float] = field(default_factory=lambda: [0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
    false_alarm_rate: float = 0.05
    bank_size: int | None = None
    backend: Literal["auto", "torch", "faiss"] = "auto"

    def __post_init__(self) -> None:
        require_types("scoring.{}", self)
        require_positive("scoring", self, "k_distance", "k_vote")
        require(self.alpha is None or 0 <= self.alpha < math.inf, "scoring.alpha", self.alpha, "0 or more, or null to choose it")
        require(
            bool(self.alphas) and all(0 <= alpha < math.inf for alpha in self.alphas),
            "scoring.alphas",
            self.alphas,
            "numbers of 0 or more",
        )
        require(0 < self.false_alarm_rate < 1, "scoring.false_alarm_rate", self.false_alarm_rate, "above 0 and below 1")
        require(
            self.bank_size is None or self.bank_size >= max(self.k_vote, self.k_distance + 1),
            "scoring.bank_size",
            self.bank_size,
            "more than k_distance and at least k_vote, or null",
        )
