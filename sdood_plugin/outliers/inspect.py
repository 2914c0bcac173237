"""What an outlier set is like: did the class flip, did the background stay, is it a copy of a training image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ..data.images import to_unit
from ..neighbours import nearest
from .dataset import OutlierSet

Judge = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # uint8 images -> features (B, D), probabilities (B, C)
CONFIDENT = 0.9
NEAR_DUPLICATE = 0.02  # root mean square difference in [-1, 1] units: two and a half grey levels


def set_quality(made: OutlierSet, train: torch.Tensor, judge: Judge) -> dict[str, Any]:
    """Figures of an outlier or control set, in per cent where they are rates.

    Args:
        made: The set.
        train: uint8 (N, 3, H, W), the training images the set was made from, in order.
        judge: A classifier trained on real in-distribution images only.

    Returns:
        `stay_rate`: the judge still says the source's class; `flip_rate`: it is confident (above 0.9) of another class;
        `ambiguous_rate`: neither; the same judge's `source_accuracy` against the pseudo-labels; `distance_to_source`
        (root mean square, [-1, 1] units); `near_duplicate_rate`: nearest training image closer than 2.5 grey levels;
        `border_correlation`: correlation of low-pass filtered border pixels between outlier and source, the nuisance that
        should stay, beside `border_correlation_random` against another image; `fd_reference`: Frechet distance between the
        judge's features of outliers and of training images (not FID: another extractor).
    """
    sources = train[made.sources]
    features, probabilities = judge(made.images)
    confidence, said = probabilities.cpu().max(dim=1)
    stayed = said == made.labels
    flipped = ~stayed & (confidence > CONFIDENT)
    real_features, real_probabilities = judge(train)
    difference = (to_unit(made.images) - to_unit(sources)).square().mean(dim=(1, 2, 3)).sqrt()
    nearest_pixels, _ = nearest(_small(made.images), _small(train), 1)
    duplicate = (nearest_pixels[:, 0] / _small(train).shape[1]).sqrt() < NEAR_DUPLICATE
    other = made.sources.roll(len(made) // 2)  # by one would meet another copy of the same source
    return {
        "count": len(made),
        "stay_rate": _percent(stayed),
        "flip_rate": _percent(flipped),
        "ambiguous_rate": _percent(~stayed & ~flipped),
        "source_accuracy": _percent(real_probabilities.cpu().argmax(dim=1)[made.sources] == made.labels),
        "distance_to_source": float(difference.mean()),
        "near_duplicate_rate": _percent(duplicate),
        "border_correlation": _border_correlation(made.images, sources),
        "border_correlation_random": _border_correlation(made.images, train[other]),
        "fd_reference": frechet_distance(features, real_features),
        "judged": {"confidence": [round(value, 4) for value in confidence.tolist()], "class": said.tolist()},
    }


def _percent(flags: torch.Tensor) -> float:
    return 100.0 * float(flags.float().mean())


def _small(images: torch.Tensor) -> torch.Tensor:
    """float (N, D) pixels in [-1, 1], averaged down to 16 px at most."""
    values = to_unit(images)
    return (F.adaptive_avg_pool2d(values, 16) if images.shape[-1] > 16 else values).flatten(1)


def _border_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean over images of the correlation of their smoothed outer ring (an eighth of the side on each edge)."""
    side, ring = first.shape[-1], max(1, first.shape[-1] // 8)
    mask = torch.ones(side, side, dtype=torch.bool)
    mask[ring:-ring, ring:-ring] = False
    rings = []
    for images in (first, second):
        smooth = F.avg_pool2d(to_unit(images), 3, stride=1, padding=1, count_include_pad=False)
        values = smooth[:, :, mask].flatten(1)
        rings.append(F.normalize(values - values.mean(dim=1, keepdim=True), dim=1))
    return float((rings[0] * rings[1]).sum(dim=1).mean())


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of float (N, D) and (M, D) features, in float64."""
    a, b = first.double().cpu(), second.double().cpu()
    covariance_a, covariance_b = torch.cov(a.T), torch.cov(b.T)
    eigenvalues = torch.linalg.eigvals(covariance_a @ covariance_b)
    root = eigenvalues.real.clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * root)
