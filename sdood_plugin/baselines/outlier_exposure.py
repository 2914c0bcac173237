"""Outlier exposure (Hendrycks et al., ICLR 2019) with uniform noise: what outliers bring when they cost nothing."""

from __future__ import annotations

import torch

from ..detector.network import Heads
from ..randomness import uniform


def uniform_noise(count: int, image_size: int, seed: int) -> torch.Tensor:
    """uint8 (N, 3, H, W) of independent uniform pixels."""
    values = uniform(seed, torch.arange(count), 0, 3 * image_size**2)
    return (values * 256).to(torch.uint8).reshape(count, 3, image_size, image_size)


def outlier_exposure_loss(heads: Heads, labels: torch.Tensor, is_outlier: torch.Tensor) -> dict[str, torch.Tensor]:
    """pytorch-ood's OutlierExposureLoss on g_in's logits.

    The paper (equation 1 and section 4) averages ID and outliers apart and weighs the outliers by 0.5; the library
    averages over the whole batch, so its weight is set to give the same gradient.

    Args:
        heads: Outputs for B images.
        labels: int64 (B,) pseudo-labels.
        is_outlier: bool (B,).
    """
    from pytorch_ood.loss import OutlierExposureLoss

    count, outliers = len(labels), int(is_outlier.sum())
    inside = count - outliers
    alpha = 0.5 * inside / outliers if outliers else 0.0
    loss = OutlierExposureLoss(alpha=alpha)(heads.inside.float(), torch.where(is_outlier, -1, labels))
    return {"loss": loss * count / inside}
