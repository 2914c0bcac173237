"""The outlier set."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .check import require, require_positive, require_types

Mode = Literal["other", "same", "away", "blend", "blend-own"]


def bounds(value: float | list[float]) -> tuple[float, float]:
    """The lowest and the highest a setting can be that is a value or a range [low, high]."""
    return (value[0], value[1]) if isinstance(value, list) else (value, value)


@dataclass(frozen=True)
class OutliersConfig:
    """The semantic-discrepant outliers and their same-class controls.

    Args:
        mode: What guidance points to: `other` (the paper: one wrong class), `away` (from the own class), `blend` (between
            two wrong classes; with two clusters between the wrong and the own one), `blend-own` (between the own class and a
            wrong one), `same` (the own class).
        guidance_weight: w, or a range [low, high] it is drawn from for each outlier; diffusers' guidance_scale is 1 + w.
            Unused by `same`.
        guidance_interval: Noise levels at which guidance acts, as fractions of T; w = 0 at the others, which saves one
            forward a step there.
        start_fraction: S / T, how far an image is noised before it is denoised, or a range [low, high] from whose 16 evenly
            spaced levels it is drawn for each outlier.
        sampler: `ddpm` (ancestral, the paper), `ddim`, or `dpm` (DPM-Solver++ 2M).
        sampling_steps: Denoising steps from S to 0. Give two or more: a single one is guided at the highest noise level alone
            and overshoots by about w. `dpm` with fewer than five is of first order, which is `ddim`: of second order it
            overshoots there.
        per_source: Outliers made of each image.
        sources: Use this many images as sources, spread evenly; null for all.
        controls: Make a same-class control of every source too.
        batch_size: Images denoised at once; a smaller batch is padded, under a range of S to the largest there is.
        format: `png`, or lossless `webp`: a fifth smaller.
    """

    mode: Mode = "away"
    guidance_weight: float | list[float] = 3.0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    start_fraction: float | list[float] = 0.2
    sampler: Literal["ddpm", "ddim", "dpm"] = "dpm"
    sampling_steps: int = 6
    per_source: int = 1
    sources: int | None = None
    controls: bool = True
    batch_size: int = 128
    format: Literal["png", "webp"] = "png"

    def __post_init__(self) -> None:
        require_types("outliers.{}", self)
        for name, lowest, highest, expected in (
            ("guidance_weight", -1.0, math.inf, "a finite w >= -1"),
            ("start_fraction", math.ulp(0.0), 1.0, "S / T above 0, at most 1"),
        ):
            value = getattr(self, name)
            require(
                not isinstance(value, list) or len(value) == 2,
                f"outliers.{name}",
                value,
                f"{expected}, or a range [low, high] of two such numbers",
            )
            low, high = bounds(value)
            fits = all(math.isfinite(number) and lowest <= number <= highest for number in (low, high))
            require(fits, f"outliers.{name}", value, expected)
            require(low <= high, f"outliers.{name}", value, "a range [low, high], the lower one first")
        require(
            len(self.guidance_interval) == 2 and 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1,
            "outliers.guidance_interval",
            self.guidance_interval,
            "two fractions of T, the lower one first",
        )
        require(
            self.mode == "same" or self.guidance_interval[0] <= bounds(self.start_fraction)[0],
            "outliers.guidance_interval",
            self.guidance_interval,
            f"one that begins at the lowest S or below, {bounds(self.start_fraction)[0]} T",
            "lower its first number: no noisier step is there to be guided",
        )
        require_positive("outliers", self, "sampling_steps", "per_source", "batch_size")
        require(self.sources is None or self.sources > 0, "outliers.sources", self.sources, "a number above 0, or null for all")
