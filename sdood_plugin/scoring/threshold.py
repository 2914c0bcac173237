"""From held-out in-distribution scores to a decision: thresholds with their uncertainty, and p-values."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

log = logging.getLogger(__name__)
LEVEL = 0.95  # of the interval of the false-alarm rate


@dataclass(frozen=True)
class Threshold:
    """A score above which an image is called OOD.

    Attributes:
        value: The score.
        false_alarm_rate: Share of in-distribution images above it at most, on average over held-out sets, as asked for.
        low: Lower end of the 95 % interval of the share that it will really be.
        high: Upper end of it.
    """

    value: float
    false_alarm_rate: float
    low: float
    high: float


def choose_threshold(heldout: torch.Tensor, false_alarm_rate: float) -> Threshold:
    """The held-out score that those with a p-value of at most `false_alarm_rate` exceed, and only they.

    The share of new in-distribution images above the j-th smallest of n independent scores follows Beta(n - j + 1, j)
    whatever the scores' distribution (Wilks, Ann. Math. Stat. 1941); with ties it is no larger. Its mean is
    (n - j + 1) / (n + 1), so j is the smallest for which that is at most the rate: ceil((n + 1)(1 - rate)). Where even the
    largest score, j = n, is exceeded more often, that one is taken and a warning logged.

    Args:
        heldout: float (n,) scores of held-out in-distribution images, n > 0.
        false_alarm_rate: Above 0 and below 1.
    """
    from scipy.stats import beta

    scores = np.sort(heldout.double().cpu().numpy())
    count = len(scores)
    above = int((np.arange(1, count + 1) / (count + 1) <= false_alarm_rate).sum())  # n - j + 1, rounded as p-values are
    if not above:
        least = f"{1 / (count + 1):.3g}, the smallest that {count} held-out images can promise"
        log.warning("false_alarm_rate %g: the threshold is that of a rate of %s", false_alarm_rate, least)
    value = float(scores[count - max(1, above)])
    rank = int(np.searchsorted(scores, value, side="right"))
    low, high = beta.interval(LEVEL, count - rank + 1, rank)
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
