"""The distance + voting score (METHOD section 5), larger = more OOD."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional as F

from ..config import ScoringConfig
from ..errors import RunError, UsageError
from ..metrics import auroc_standard_error, detection_metrics
from ..neighbours import Bank
from .reduction import reduce_banks
from .threshold import Threshold, choose_threshold, p_values

_ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a feature, as a share of its norm: two passes over one image may differ so


def distance_and_votes(
    features: torch.Tensor, inside: Bank, outliers: Bank | None, k_distance: int, k_vote: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms of the score, from one pass over the joint bank: each image meets each row once.

    The nearest of both banks together are among the nearest of each, so the vote needs no search of its own.

    Args:
        features: float32 or float64 (B, D) of the images to score.
        inside: N in-distribution training features.
        outliers: M outlier features; None gives no votes.
        k_distance: Neighbours whose squared distances are summed.
        k_vote: Neighbours in both banks together that vote.

    Returns:
        (distance, votes), both (B,) in the features' dtype: sum of squared distances to the k_distance nearest ID features,
        and how many of the k_vote nearest of both banks are outliers (at equal distance, but for the rounding of float64
        sums, ID comes first).

    Raises:
        UsageError: A k is larger than its bank.
    """
    both_sizes = len(inside) + (0 if outliers is None else len(outliers))
    if k_distance > len(inside):
        raise UsageError("k_distance", k_distance, f"at most {len(inside)}, the in-distribution bank", "lower scoring.k_distance")
    if outliers is None:
        distances, _ = inside.nearest(features, k_distance)
        return distances.sum(dim=1).to(features.dtype), features.new_zeros(len(features))
    if k_vote > both_sizes:
        raise UsageError("k_vote", k_vote, f"at most {both_sizes}, the size of both banks", "lower scoring.k_vote")
    near_inside, _ = inside.nearest(features, min(len(inside), max(k_distance, k_vote)))
    near_outliers, _ = outliers.nearest(features, min(len(outliers), k_vote))
    rounding = (features.shape[1] + 2) * torch.finfo(near_outliers.dtype).eps  # of the same sum in two orders
    both = torch.cat([near_inside[:, :k_vote], near_outliers * (1 + rounding)], dim=1)
    first = both.sort(dim=1, stable=True).indices[:, :k_vote]
    votes = (first >= min(k_vote, near_inside.shape[1])).sum(dim=1)
    return near_inside[:, :k_distance].sum(dim=1).to(features.dtype), votes.to(features.dtype)


@dataclass(frozen=True)
class Calibration:
    """What held-out data decided; no test image has a part in it.

    Attributes:
        distance_scale: Median distance term of held-out ID images, which the distance is divided by.
        alpha: Weight of the votes.
        curve: AUROC of held-out outliers against held-out ID for each candidate alpha, as [alpha, per cent] pairs.
        threshold: Score above which an image is called OOD.
        false_alarm_rate: Share of new ID images above it at most, on average over held-out sets, as asked for.
        false_alarm_interval: 95 % interval of the share of new ID images above it.
        heldout: Numbers of held-out ID images and outliers.
    """

    distance_scale: float
    alpha: float
    curve: list[list[float]]
    threshold: float
    false_alarm_rate: float
    false_alarm_interval: list[float]
    heldout: list[int]


@dataclass(frozen=True)
class Score:
    """A fitted score: banks, settings and calibration.

    Attributes:
        inside: float (N, D), in-distribution bank, normalised if the settings say so.
        outliers: float (M, D), outlier bank, may be empty.
        config: The settings.
        calibration: What held-out data decided.
        heldout: float (P,), scores of the held-out ID images, ascending, on the CPU.
    """

    inside: torch.Tensor
    outliers: torch.Tensor
    config: ScoringConfig
    calibration: Calibration
    heldout: torch.Tensor

    @cached_property
    def _banks(self) -> tuple[Bank, Bank | None]:
        return _banks(self.inside, self.outliers, self.config)

    def terms(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(distance / its held-out median, votes) of float (B, D) features, each float (B,)."""
        distance, votes = _terms(features, self._banks, self.config)
        return distance / self.calibration.distance_scale, votes

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """The score, float (B,), of float (B, D) features; larger = more OOD."""
        return self.combined(*self.terms(features))

    def combined(self, distance: torch.Tensor, votes: torch.Tensor) -> torch.Tensor:
        """The score, float (B,), of its terms."""
        return distance + self.calibration.alpha * votes

    def threshold(self, false_alarm_rate: float) -> Threshold:
        """The threshold at another rate than the one calibrated for."""
        return choose_threshold(self.heldout, false_alarm_rate)

    def p_values(self, scores: torch.Tensor) -> torch.Tensor:
        """Conformal p-values, float64 (B,), of scores float (B,)."""
        return p_values(scores, self.heldout)


def _prepare(features: torch.Tensor, normalise: bool) -> torch.Tensor:
    return F.normalize(features.float(), dim=1) if normalise else features.float()


def _banks(inside: torch.Tensor, outliers: torch.Tensor, config: ScoringConfig) -> tuple[Bank, Bank | None]:
    return Bank(inside, backend=config.backend), Bank(outliers, backend=config.backend) if len(outliers) else None


def _terms(features: torch.Tensor, banks: tuple[Bank, Bank | None], config: ScoringConfig) -> tuple[torch.Tensor, torch.Tensor]:
    return distance_and_votes(_prepare(features, config.normalise), *banks, config.k_distance, config.k_vote)


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

    Raises:
        UsageError: Features that are not finite, or a k larger than its bank.
        RunError: Half of the held-out images are in the bank, or as near to it as rounding is.
    """
    names = ("in-distribution", "outlier", "held-out in-distribution", "held-out outlier")
    for name, features in zip(names, (inside, outliers, heldout_inside, heldout_outliers), strict=True):
        _require_finite(features, name)
    prepared = _prepare(inside, config.normalise), _prepare(outliers, config.normalise)
    reduced = reduce_banks(prepared, config.bank_size, config.k_distance)
    inside, outliers = (  # centres lie within the unit sphere; what is normalised already would move by its rounding
        bank if bank is whole else _prepare(bank, config.normalise) for bank, whole in zip(reduced, prepared, strict=True)
    )
    banks = _banks(inside, outliers, config)
    distance, votes = _terms(heldout_inside, banks, config)
    scale, least = float(distance.median()), _rounding_distance(heldout_inside, config)
    if scale <= least:
        raise RunError(
            "median distance of held-out images",
            scale,
            f"above {least:.2g}, which rounding alone makes",
            "remove duplicate images or train a backbone that tells images apart",
        )
    near, far = (distance / scale, votes), None
    if len(heldout_outliers) and len(outliers):
        far_distance, far_votes = _terms(heldout_outliers, banks, config)
        far = far_distance / scale, far_votes
    alpha, curve = _choose_alpha(near, far, config)
    scores = (near[0] + alpha * near[1]).sort().values.cpu()
    threshold = choose_threshold(scores, config.false_alarm_rate)
    calibration = Calibration(
        scale,
        alpha,
        curve,
        threshold.value,
        config.false_alarm_rate,
        [threshold.low, threshold.high],
        [len(heldout_inside), len(heldout_outliers)],
    )
    return Score(inside, outliers, config, calibration, scores)


def _rounding_distance(features: torch.Tensor, config: ScoringConfig) -> float:
    """The distance term that rounding alone gives images that are in the bank."""
    norms = _prepare(features, config.normalise).square().sum(dim=1)
    return config.k_distance * _ROUNDING**2 * float(norms.median())


def _require_finite(features: torch.Tensor, name: str) -> None:
    broken = (~torch.isfinite(features).all(dim=1)).nonzero()[:, 0].tolist()
    if broken:
        expected = "finite numbers"
        raise UsageError(f"{name} features", f"NaN or infinity in row {broken[0]}", expected, "check that image and the backbone")


Terms = tuple[torch.Tensor, torch.Tensor]  # scaled distance and votes, float (B,) each


def _choose_alpha(near: Terms, far: Terms | None, config: ScoringConfig) -> tuple[float, list[list[float]]]:
    """alpha, and the AUROC at every candidate; without held-out outliers alpha is 0 unless it is set."""
    if far is None:
        return config.alpha or 0.0, []
    curve: list[list[float]] = []
    for candidate in sorted(config.alphas) if config.alpha is None else [config.alpha]:
        inside, outside = ((distance + candidate * votes).cpu() for distance, votes in (near, far))
        curve.append([candidate, detection_metrics(inside, outside)["auroc"]])
    best = max(auroc for _, auroc in curve)
    allowed = best - auroc_standard_error(best, len(near[0]), len(far[0]))
    return next(candidate for candidate, auroc in curve if auroc >= allowed), curve
