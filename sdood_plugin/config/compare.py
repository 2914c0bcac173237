"""The comparators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Comparator = Literal["distance", "msp", "energy", "knn", "mahalanobis", "vim", "oe-noise"]


@dataclass(frozen=True)
class CompareConfig:
    """The comparators, trained on the same images with the same backbone.

    Args:
        methods: On a network trained by cross-entropy alone: `distance` (our distance term), `msp`, `energy`, `knn`,
            `mahalanobis`, `vim`; and `oe-noise`, outlier exposure with uniform noise.
    """

    methods: list[Comparator] = field(
        default_factory=lambda: ["distance", "msp", "energy", "knn", "mahalanobis", "vim", "oe-noise"]
    )
