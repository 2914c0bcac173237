"""The diffusion model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from .check import require, require_positive, require_types


class UNetShape(NamedTuple):
    """Channels at each resolution (the side halves between them), residual blocks a resolution, and the one with attention."""

    channels: tuple[int, ...]
    layers_per_block: int
    attention: int


UNET_SHAPES = {
    "tiny": UNetShape((16, 16), 1, 1),
    "demo": UNetShape((32, 64, 64), 1, 2),
    "small": UNetShape((96, 192, 192), 2, 2),
    "cifar": UNetShape((128, 256, 256, 256), 2, 1),
}


@dataclass(frozen=True)
class DiffusionConfig:
    """The class-conditional diffusion model.

    Args:
        size: The U-Net: `tiny` (0.07 M parameters, for trying things out), `demo` (1.1 M), `small` (15 M) or `cifar` (36 M:
            the shape of Ho et al. 2020 for CIFAR-10, attention at 16 x 16).
        timesteps: T.
        schedule: Noise schedule of diffusers: `linear` (its betas times 1000 / T) or `cosine`.
        prediction: What the U-Net predicts: `epsilon` or `v`.
        max_start_fraction: S_max / T: noise levels above it are never trained (1 = all T).
        condition_dropout: p_uncond, how often the class is replaced by the null class.
        steps: Training steps.
        batch_size: Images a step, over all processes.
        lr: Peak learning rate (AdamW, short warm-up, cosine to 0).
        ema_decay: Decay of the averaged weights that are sampled from; after n steps it is (1 + n) / (10 + n) where that is less.
        flips: Mirror images at random.
        gradient_clip: Largest gradient norm.
        min_snr_gamma: Weight the loss of a noise level by min(SNR, gamma) of the clean image's error (Hang et al. 2023,
            who take 5); null weights all levels alike.
        compile: torch.compile the U-Net for training and sampling: a minute at the start, for long runs. Switching it
            makes nothing again.
    """

    size: Literal["tiny", "demo", "small", "cifar"] = "demo"
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
    min_snr_gamma: float | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        require_types("diffusion.{}", self)
        require_positive("diffusion", self, "timesteps", "steps", "batch_size", "lr", "gradient_clip")
        require(0 < self.max_start_fraction <= 1, "diffusion.max_start_fraction", self.max_start_fraction, "above 0, at most 1")
        require(
            0 < self.condition_dropout < 1,
            "diffusion.condition_dropout",
            self.condition_dropout,
            "above 0 and below 1: guidance needs the null class",
        )
        require(0 <= self.ema_decay < 1, "diffusion.ema_decay", self.ema_decay, "0 or more and below 1")
        if self.min_snr_gamma is not None:
            require_positive("diffusion", self, "min_snr_gamma")

    @property
    def shape(self) -> UNetShape:
        """The U-Net of `size`."""
        return UNET_SHAPES[self.size]

    def require_side(self, side: int) -> None:
        """Raise UsageError unless images of a side in pixels can be halved from each resolution to the next."""
        factor = 2 ** (len(self.shape.channels) - 1)
        require(
            side % factor == 0,
            "data.image_size",
            side,
            f"a multiple of {factor}, for diffusion.size {self.size}",
            "resize with --data.image_size or use another --diffusion.size",
        )
