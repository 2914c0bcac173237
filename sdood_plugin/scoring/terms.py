"""The score's two terms (METHOD section 5): distance to the nearest images, votes of the nearest outliers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..errors import UsageError
from ..neighbours import Backend, Bank

GROUPS = 10  # of classes, each left out in turn


class Terms(NamedTuple):
    """The two terms of B images, each float64 (B,), as squares of finite features need; float32 on Apple GPUs."""

    distance: torch.Tensor
    votes: torch.Tensor

    def over(self, scale: float) -> Terms:
        """The same, the distance in units of `scale`."""
        return Terms(self.distance / scale, self.votes)


def distance_and_votes(features: torch.Tensor, inside: Bank, outliers: Bank | None, k_distance: int, k_vote: int) -> Terms:
    """The two terms of the score, from one pass over the joint bank: each image meets each row once.

    The nearest of both banks together are among the nearest of each, so the vote needs no search of its own.

    Args:
        features: float32 or float64 (B, D) of the images to score.
        inside: N in-distribution training features.
        outliers: M outlier features; None gives no votes.
        k_distance: Neighbours whose squared distances are summed.
        k_vote: Neighbours in both banks together that vote.

    Returns:
        The sum of squared distances to the k_distance nearest ID features, and how many of the k_vote nearest of both banks
        are outliers (at equal distance, but for the rounding of float64 sums, ID comes first).

    Raises:
        UsageError: A k is larger than its bank.
    """
    both_sizes = len(inside) + (0 if outliers is None else len(outliers))
    if k_distance > len(inside):
        raise UsageError("k_distance", k_distance, f"at most {len(inside)}, the in-distribution bank", "lower scoring.k_distance")
    if outliers is None:
        distances, _ = inside.nearest(features, k_distance)
        return Terms(distances.sum(dim=1), distances.new_zeros(len(features)))
    if k_vote > both_sizes:
        raise UsageError("k_vote", k_vote, f"at most {both_sizes}, the size of both banks", "lower scoring.k_vote")
    near_inside, _ = inside.nearest(features, min(len(inside), max(k_distance, k_vote)))
    near_outliers, _ = outliers.nearest(features, min(len(outliers), k_vote))
    return _terms(near_inside, near_outliers, features.shape[1], k_distance, k_vote)


def terms_by_class(
    features: torch.Tensor,
    own: torch.Tensor,
    inside: Bank,
    outliers: torch.Tensor,
    classes: torch.Tensor,
    k_distance: int,
    k_vote: int,
    backend: Backend,
) -> tuple[Terms, Terms]:
    """The terms of outliers, and those where they meet no outlier of their own class: each is of a kind that the bank lacks.

    Of more than ten classes a tenth is left out at a time, own one and others, as in cross-validation by groups.

    Args:
        features: float (B, D) of outliers that are not in the bank.
        own: int64 (B,), the classes they were made of, from 0.
        inside: N in-distribution training features.
        outliers: float (M, D) outlier features.
        classes: int64 (M,), the classes those were made of, from 0.
        k_distance: As in `distance_and_votes`, at most N.
        k_vote: As there, at most N + M.
        backend: As of a `Bank`.
    """
    names = classes.unique()
    near_inside, _ = inside.nearest(features, min(len(inside), max(k_distance, k_vote)))
    near, without_own = [], []
    for first in range(min(GROUPS, len(names))):  # every group a bank of its own: each query meets each row once
        group = names[first::GROUPS]
        bank = Bank(outliers[torch.isin(classes, group)], backend=backend)
        near.append(bank.nearest(features, min(k_vote, len(bank)))[0])
        without_own.append(near[-1].masked_fill(torch.isin(own, group)[:, None], math.inf))
    both = (torch.cat(found, dim=1).sort(dim=1).values[:, :k_vote] for found in (near, without_own))
    whole, lacking = (_terms(near_inside, some, features.shape[1], k_distance, k_vote) for some in both)
    return whole, lacking


def _terms(near_inside: torch.Tensor, near_outliers: torch.Tensor, width: int, k_distance: int, k_vote: int) -> Terms:
    """The terms, given the ascending squared distances (B, K) of D = `width` summands; infinity stands for no outlier."""
    rounding = (width + 2) * torch.finfo(near_outliers.dtype).eps  # of the same sum in two orders
    both = torch.cat([near_inside[:, :k_vote], near_outliers * (1 + rounding)], dim=1).sort(dim=1, stable=True)
    is_outlier = (both.indices >= min(k_vote, near_inside.shape[1])) & both.values.isfinite()
    votes = is_outlier[:, :k_vote].sum(dim=1)
    return Terms(near_inside[:, :k_distance].sum(dim=1), votes.to(near_inside.dtype))
