"""The comparators."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from .check import require, require_positive, require_types

_Standard = Literal["distance", "msp", "energy", "knn", "mahalanobis", "vim", "oe-noise", "dn2", "mscl", "multi-class", "fake-it"]
Comparator = Literal[_Standard, "oe", "energy-oe", "background"]


@dataclass(frozen=True)
class CompareConfig:
    """The comparators, trained on the same images with the same backbone.

    Args:
        methods: On a network trained by cross-entropy alone: `distance` (our distance term), `msp`, `energy`, `knn`,
            `mahalanobis`, `vim`; `oe-noise`, outlier exposure with uniform noise; and from pre-trained weights (the
            detector's, else the clustering's): `dn2` (frozen), `mscl`, `multi-class` (Multi-class AD) and `fake-it`.
            Not among the defaults, trained on the run's own outliers and controls: `oe` (outlier exposure), `energy-oe`
            (energy-bounded learning) and `background` (outliers as one more class).
        mscl_lr: MSCL's learning rate; the paper's is for ImageNet weights.
        mscl_angular: Weight of MSCL's angular centre loss: 0 as its code has it, 1 as its paper has it.
        multi_class_lr: Learning rate of Multi-class AD's fine-tuning; null is the detector's.
        fake_it_steps: When the training of Fake-it's diffusion model, planned for diffusion.steps, is stopped; null is half-way.
        fake_it_lr: Learning rate of Fake-it's fine-tuning; null is the detector's.
        fake_it_frozen_blocks: Blocks that keep their weights in it; null is the detector's.
    """

    methods: list[Comparator] = field(default_factory=lambda: list(get_args(_Standard)))
    mscl_lr: float = 1e-5
    mscl_angular: float = 1.0
    multi_class_lr: float | None = None
    fake_it_steps: int | None = None
    fake_it_lr: float | None = None
    fake_it_frozen_blocks: int | Literal["all"] | None = None

    def __post_init__(self) -> None:
        require_types("compare.{}", self)
        require_positive("compare", self, "mscl_lr")
        require(0 <= self.mscl_angular < math.inf, "compare.mscl_angular", self.mscl_angular, "0 or more")
        for name in ("multi_class_lr", "fake_it_steps", "fake_it_lr"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"compare.{name}", value, "above 0, or null")
        blocks = self.fake_it_frozen_blocks
        fits = blocks is None or blocks == "all" or blocks >= 0
        require(fits, "compare.fake_it_frozen_blocks", blocks, "0 or more, all, or null")
