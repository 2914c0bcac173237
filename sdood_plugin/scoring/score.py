"""The distance + voting score (METHOD section 5), larger = more OOD."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..config import ScoringConfig
from ..errors import RunError, UsageError
from ..metrics import auroc_standard_error, detection_metrics
from ..neighbours import nearest


def distance_and_votes(
    features: torch.Tensor, inside: torch.Tensor, outliers: torch.Tensor | None, k_distance: int, k_vote: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms of the score, from one search of each bank.

    Args:
        features: float (B, D) of the images to score.
        inside: float (N, D), the bank of in-distribution training features.
        outliers: float (M, D), the bank of outlier features; None or empty gives no votes.
        k_distance: Neighbours whose squared distances are summed.
        k_vote: Neighbours in both banks together that vote.

    Returns:
        (distance, votes), both float (B,): sum of squared distances to the k_distance nearest ID features, and how many
        of the k_vote nearest of both banks are outliers (at equal distance ID comes first).

    Raises:
        UsageError: A k is larger than its bank.
    """
    if outliers is None or not len(outliers):
        distances, _ = nearest(features, inside, k_distance)
        return distances.sum(dim=1), torch.zeros(len(features), device=features.device)
    if k_vote > len(inside) + len(outliers):
        raise UsageError(
            "k_vote", k_vote, f"at most {len(inside) + len(outliers)}, the size of both banks", "lower scoring.k_vote"
        )
    if k_distance > len(inside):
        raise UsageError("k_distance", k_distance, f"at most {len(inside)}, the in-distribution bank", "lower scoring.k_distance")
    near_inside, _ = nearest(features, inside, min(len(inside), max(k_distance, k_vote)))
    near_outliers, _ = nearest(features, outliers, min(len(outliers), k_vote))
    both = torch.cat([near_inside[:, :k_vote], near_outliers], dim=1)
    first = both.sort(dim=1, stable=True).indices[:, :k_vote]
    votes = (first >= min(k_vote, near_inside.shape[1])).sum(dim=1)
    return near_inside[:, :k_distance].sum(dim=1), votes.to(features.dtype)


@dataclass(frozen=True)
class Calibration:
    """What held-out data decided; no test image has a part in it.

    Attributes:
        distance_scale: Median distance term of held-out ID images, which the distance is divided by.
        alpha: Weight of the votes.
        curve: AUROC of held-out outliers against held-out ID for each candidate alpha, as [alpha, per cent] pairs.
        threshold: Score above which an image is called OOD.
        false_alarm_rate: Share of held-out ID images above it, as asked for.
        heldout: Numbers of held-out ID images and outliers.
    """

    distance_scale: float
    alpha: float
    curve: list[list[float]]
    threshold: float
    false_alarm_rate: float
    heldout: list[int]


@dataclass(frozen=True)
class Score:
    """A fitted score: banks, settings and calibration.

    Attributes:
        inside: float (N, D), in-distribution bank, normalised if the settings say so.
        outliers: float (M, D), outlier bank, may be empty.
        config: The settings.
        calibration: What held-out data decided.
    """

    inside: torch.Tensor
    outliers: torch.Tensor
    config: ScoringConfig
    calibration: Calibration

    def terms(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(distance / its held-out median, votes) of float (B, D) features, each float (B,)."""
        distance, votes = _terms(features, self.inside, self.outliers, self.config)
        return distance / self.calibration.distance_scale, votes

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """The score, float (B,), of float (B, D) features; larger = more OOD."""
        distance, votes = self.terms(features)
        return distance + self.calibration.alpha * votes


def _prepare(features: torch.Tensor, normalise: bool) -> torch.Tensor:
    return F.normalize(features.float(), dim=1) if normalise else features.float()


def _terms(
    features: torch.Tensor, inside: torch.Tensor, outliers: torch.Tensor, config: ScoringConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    prepared = _prepare(features, config.normalise)
    return distance_and_votes(prepared, inside, outliers, config.k_distance, config.k_vote)


def fit_score(
    inside: torch.Tensor,
    outliers: torch.Tensor,
    heldout_inside: torch.Tensor,
    heldout_outliers: torch.Tensor,
    config: ScoringConfig,
) -> Score:
    """Build the banks and choose alpha, the distance's scale and the threshold on held-out data.

    alpha is the smallest candidate whose held-out AUROC is within one standard error of the best one's (the rule of
    Breiman et al. 1984 for choosing the simplest model): held-out outliers come from the generator the network was
    trained against, so the plain maximum would trust the votes too much on anything else.

    Args:
        inside: float (N, D) features of in-distribution training images.
        outliers: float (M, D) features of outliers made of them; M may be 0.
        heldout_inside: float (P, D), images no training has seen, P > 0.
        heldout_outliers: float (Q, D), outliers made of those; Q may be 0, then alpha is 0 unless it is set.
        config: The settings.
    """
    inside, outliers = _prepare(inside, config.normalise), _prepare(outliers, config.normalise)
    distance, votes = _terms(heldout_inside, inside, outliers, config)
    scale = float(distance.median())
    if scale <= 0:
        raise RunError(
            "median distance of held-out images",
            scale,
            "a positive number",
            "remove duplicate images or train a backbone that tells images apart",
        )
    distance = distance / scale
    curve: list[list[float]] = []
    alpha = config.alpha if config.alpha is not None else 0.0
    if len(heldout_outliers) and len(outliers):
        far_distance, far_votes = _terms(heldout_outliers, inside, outliers, config)
        far_distance = far_distance / scale
        candidates = config.alphas if config.alpha is None else [config.alpha]
        for candidate in sorted(candidates):
            auroc = detection_metrics((distance + candidate * votes).cpu(), (far_distance + candidate * far_votes).cpu())["auroc"]
            curve.append([candidate, auroc])
        best = max(auroc for _, auroc in curve)
        allowed = best - auroc_standard_error(best, len(distance), len(far_distance))
        alpha = next(candidate for candidate, auroc in curve if auroc >= allowed)
    scores = (distance + alpha * votes).cpu().double().numpy()
    threshold = float(np.quantile(scores, 1 - config.false_alarm_rate, method="higher"))
    calibration = Calibration(
        scale, alpha, curve, threshold, config.false_alarm_rate, [len(heldout_inside), len(heldout_outliers)]
    )
    return Score(inside, outliers, config, calibration)
