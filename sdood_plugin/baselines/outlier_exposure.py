"""Other ways to train on outliers, with pytorch-ood's losses on g_in: the same batches as the detector's, another loss.

- Outlier exposure (Hendrycks et al., ICLR 2019), scored by the largest softmax probability; also with uniform noise for
  outliers: what outliers bring when they cost nothing.
- Energy-bounded learning (Liu et al., NeurIPS 2020), scored by the energy. The paper fine-tunes a trained classifier;
  here every network starts where the detector starts.
- A background class (the one of Dhamija et al., NeurIPS 2018): ID and outliers as one mixture of C + 1 classes, scored by
  the probability of the last.
"""

from __future__ import annotations

from collections.abc import Callable

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


def energy_bounded_loss(heads: Heads, labels: torch.Tensor, is_outlier: torch.Tensor) -> dict[str, torch.Tensor]:
    """pytorch-ood's EnergyRegularizedLoss on g_in's logits, with the paper's weight and margins; arguments as above."""
    from pytorch_ood.loss import EnergyRegularizedLoss

    return {"loss": EnergyRegularizedLoss()(heads.inside.float(), torch.where(is_outlier, -1, labels))}


def background_loss(heads: Heads, labels: torch.Tensor, is_outlier: torch.Tensor) -> dict[str, torch.Tensor]:
    """pytorch-ood's BackgroundClassLoss: g_in's logits are the C classes', g_bin's for outliers the background's."""
    from pytorch_ood.loss import BackgroundClassLoss

    logits = torch.cat([heads.inside, heads.binary[:, 1:]], dim=1).float()
    return {"loss": BackgroundClassLoss(heads.inside.shape[1])(logits, torch.where(is_outlier, -1, labels))}


def exposed_scores(method: str, heads: Heads) -> torch.Tensor:
    """float (B,), larger = more OOD: what the paper behind one of `EXPOSED` scores by."""
    inside = heads.inside.float()
    if method == "energy-oe":
        return -inside.logsumexp(dim=1)
    if method == "background":
        return torch.cat([inside, heads.binary[:, 1:].float()], dim=1).softmax(dim=1)[:, -1]
    return -inside.softmax(dim=1).max(dim=1).values


EXPOSED: dict[str, Callable[[Heads, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]] = {
    "oe": outlier_exposure_loss,
    "energy-oe": energy_bounded_loss,
    "background": background_loss,
}
