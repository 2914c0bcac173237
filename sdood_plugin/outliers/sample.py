"""Outliers of one batch: tensors in, tensors out."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel

from ..config import DiffusionConfig, OutliersConfig
from ..data.images import to_uint8, to_unit
from ..diffusion.guidance import guidance_terms, wrong_classes
from ..diffusion.sampling import as_denoiser, guided_partial_sample
from ..errors import RunError
from ..randomness import normal
from .blocks import guidance_weights, start_fractions


def sample_batch(
    unet: UNet2DModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    identity: torch.Tensor,
    config: OutliersConfig,
    diffusion: DiffusionConfig,
    *,
    classes: int,
    seed: int,
    precision: str = "auto",
) -> torch.Tensor:
    """Outliers of one batch: uint8 (B, 3, H, W) in and out, on the U-Net's device; row b depends on row b only, but for rounding.

    Args:
        unet: The diffusion model.
        images: uint8 (B, 3, H, W) sources.
        labels: int64 (B,) pseudo-labels.
        identity: int64 (B,) of `identities`, what the noise, the wrong class, S and w are drawn by; one S for all. Best on
            the CPU, where S and w are looked at.
        config: Mode, w, S, sampler, steps.
        diffusion: The model's settings.
        classes: C.
        seed: Seed of the outlier set.
        precision: Of the U-Net's forward: `float32`, `bf16` or `auto`.

    Raises:
        RunError: Pixels that are not finite.
    """
    start = start_fractions(config, seed, identity)
    assert bool((start == start[0]).all()), "a batch is denoised from one S: use the blocks"
    weights, index = guidance_weights(config, seed, identity), identity.to(labels.device)
    wrong = wrong_classes(labels, classes, seed=seed, index=index)
    clean = guided_partial_sample(
        as_denoiser(unet, precision),
        to_unit(images),
        *guidance_terms(config.mode, weights, labels, wrong, classes),
        lambda draw: normal(seed, index, draw, tuple(images.shape[1:])),
        diffusion,
        start_fraction=float(start[0]),
        sampler=config.sampler,
        steps=config.sampling_steps,
        guidance_interval=(config.guidance_interval[0], config.guidance_interval[1]),
        outside=guidance_terms(config.mode, 0.0, labels, wrong, classes),
    )
    if not torch.isfinite(clean).all():
        raise RunError("outliers", "NaN or infinite pixels", "finite images", "train the diffusion model longer or lower w")
    return to_uint8(clean)
