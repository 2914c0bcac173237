"""The outlier set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .check import require, require_positive

Mode = Literal["other", "same", "away", "blend"]


@dataclass(frozen=True)
class OutliersConfig:
    """The semantic-discrepant outliers and their same-class controls.

    Args:
        mode: What guidance points to: `other` (the paper: one wrong class), `away` (from the own class), `blend` (between
            two wrong classes), `same` (the own class).
        guidance_weight: w; diffusers' guidance_scale is 1 + w. Unused by `same`.
        start_fraction: S / T, how far an image is noised before it is denoised.
        sampler: `ddpm` (ancestral, the paper), `ddim`, or `dpm` (DPM-Solver++ 2M).
        sampling_steps: Denoising steps from S to 0.
        per_source: Outliers made of each image.
        sources: Use this many images as sources, spread evenly; null for all.
        controls: Make a same-class control of every source too.
        batch_size: Images denoised at once; the last batch is padded.
    """

    mode: Mode = "away"
    guidance_weight: float = 3.0
    start_fraction: float = 0.2
    sampler: Literal["ddpm", "ddim", "dpm"] = "dpm"
    sampling_steps: int = 6
    per_source: int = 1
    sources: int | None = None
    controls: bool = True
    batch_size: int = 128

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.guidance_weight) and self.guidance_weight >= -1,
            "outliers.guidance_weight",
            self.guidance_weight,
            "w >= -1",
        )
        require(0 < self.start_fraction <= 1, "outliers.start_fraction", self.start_fraction, "S / T above 0, at most 1")
        require_positive("outliers", self, "sampling_steps", "per_source", "batch_size")
        require(self.sources is None or self.sources > 0, "outliers.sources", self.sources, "a number above 0, or null for all")
