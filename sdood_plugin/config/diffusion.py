"""The diffusion model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .check import require, require_positive


@dataclass(frozen=True)
class DiffusionConfig:
    """The class-conditional diffusion model.

    Args:
        channels: U-Net channels at each resolution; the side halves between them.
        layers_per_block: Residual blocks a resolution.
        attention: Self-attention at the lowest resolution.
        timesteps: T.
        schedule: Noise schedule of diffusers: `linear` or `cosine`.
        prediction: What the U-Net predicts: `epsilon` or `v`.
        max_start_fraction: S_max / T: noise levels above it are never trained (1 = all T).
        condition_dropout: p_uncond, how often the class is replaced by the null class.
        steps: Training steps.
        batch_size: Images a step, over all processes.
        lr: Peak learning rate (AdamW, short warm-up, cosine to 0).
        ema_decay: Decay of the averaged weights that are sampled from.
        flips: Mirror images at random.
        gradient_clip: Largest gradient norm.
    """

    channels: list[int] = field(default_factory=lambda: [32, 64, 64])
    layers_per_block: int = 1
    attention: bool = True
    timesteps: int = 1000
    schedule: Literal["linear", "cosine"] = "linear"
    prediction: Literal["epsilon", "v"] = "epsilon"
    max_start_fraction: float = 0.3
    condition_dropout: float = 0.1
    steps: int = 1500
    batch_size: int = 64
    lr: float = 1e-3
    ema_decay: float = 0.995
    flips: bool = True
    gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        require(
            bool(self.channels) and all(c > 0 and c % 16 == 0 for c in self.channels),
            "diffusion.channels",
            self.channels,
            "one or more multiples of 16",
        )
        require_positive("diffusion", self, "layers_per_block", "timesteps", "steps", "batch_size", "lr", "gradient_clip")
        require(0 < self.max_start_fraction <= 1, "diffusion.max_start_fraction", self.max_start_fraction, "above 0, at most 1")
        require(
            0 < self.condition_dropout < 1,
            "diffusion.condition_dropout",
            self.condition_dropout,
            "above 0 and below 1: guidance needs the null class",
        )
        require(0 <= self.ema_decay < 1, "diffusion.ema_decay", self.ema_decay, "0 or more and below 1")
