"""From held-out in-distribution scores to a decision: thresholds with their uncertainty, and p-values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

LEVEL = 0.95  # of the interval of the false-alarm rate


@dataclass(frozen=True)
class Threshold:
    """A score above which an image is called OOD.

    Attributes:
        value: The score.
        false_alarm_rate: Share of in-distribution images above it, as asked for.
        low: Lower end of the 95 % interval of the share that it will really be.
        high: Upper end of it.
    """

    value: float
    false_alarm_rate: float
    low: float
    high: float


def choose_threshold(heldout: torch.Tensor, false_alarm_rate: float) -> Threshold:
    """The lowest held-out score that no more than a share `false_alarm_rate` of the held-out scores exceeds.

    The share of new in-distribution images above the j-th smallest of n independent scores follows Beta(n - j + 1, j)
    whatever the scores' distribution (Wilks, Ann. Math. Stat. 1941); with ties it is no larger.

    Args:
        heldout: float (n,) scores of held-out in-distribution images, n > 0.
        false_alarm_rate: Above 0 and below 1.
    """
    from scipy.stats import beta

    scores = np.sort(heldout.double().cpu().numpy())
    value = float(np.quantile(scores, 1 - false_alarm_rate, method="higher"))
    rank = int(np.searchsorted(scores, value, side="right"))
    low, high = beta.interval(LEVEL, len(scores) - rank + 1, rank)
    return Threshold(value, false_alarm_rate, float(low), float(high))


def p_values(scores: torch.Tensor, heldout: torch.Tensor) -> torch.Tensor:
    """Conformal p-values: how many held-out in-distribution images look at least as OOD (Vovk et al. 2005).

    Of images like the held-out ones a share of at most p has a value of p or less. They are valid on average over
    held-out sets, and nearly so here, where the same held-out images have chosen alpha and the scale.

    Args:
        scores: float (B,).
        heldout: float (n,) scores of held-out in-distribution images.

    Returns:
        float64 (B,) in [1 / (n + 1), 1].
    """
    ordered = heldout.double().sort().values
    below = torch.searchsorted(ordered, scores.double().to(ordered.device), side="left")
    return (1.0 + len(ordered) - below) / (1.0 + len(ordered))
