"""Outliers of one batch: tensors in, tensors out."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel

from ..config import DiffusionConfig, OutliersConfig
from ..data.images import to_uint8, to_unit
from ..diffusion.guidance import guidance_terms, wrong_classes
from ..diffusion.sampling import guided_partial_sample
from ..errors import RunError
from ..randomness import normal
from ..training import unet_format
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
) -> torch.Tensor:
    """Outliers of one batch: uint8 (B, 3, H, W) in and out, on the U-Net's device; row b depends on row b only, but for rounding.

    Args:
        unet: The diffusion model.
        images: uint8 (B, 3, H, W) sources.
        labels: int64 (B,) pseudo-labels.
        identity: int64 (B,) of `identities`, what the noise, the wrong class, S and w are drawn by; one S for all.
        config: Mode, w, S, sampler, steps.
        diffusion: The model's settings.
        classes: C.
        seed: Seed of the outlier set.

    Raises:
        RunError: Pixels that are not finite.
    """
    start = start_fractions(config, seed, identity)
    assert bool((start == start[0]).all()), "a batch is denoised from one S: use the blocks"
    wrong = wrong_classes(labels, classes, seed=seed, index=identity)
    terms = guidance_terms(config.mode, guidance_weights(config, seed, identity), labels, wrong, classes)

    def denoiser(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        x = x.to(memory_format=unet_format(x.device))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            return unet(x, t, class_labels=condition, return_dict=False)[0]

    clean = guided_partial_sample(
        denoiser,
        to_unit(images),
        *terms,
        lambda draw: normal(seed, identity, draw, tuple(images.shape[1:])),
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
