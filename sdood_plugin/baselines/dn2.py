"""DN2 (Bergman, Cohen & Hoshen, "Deep nearest neighbor anomaly detection", arXiv 2002.10445): k-NN on frozen features.

The paper averages the squared Euclidean distances to the k = 2 nearest training features (equation 1); the code of the
same group sums them, which ranks alike and is what is done here. Neither scales features to unit length, although on
some backbones that is worth several points; rows named `-cosine` are the same score with unit length.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..neighbours import nearest

NEIGHBOURS = 2


def knn_score(train: torch.Tensor, queries: torch.Tensor, *, unit_length: bool = False) -> torch.Tensor:
    """The sum of squared distances to the two nearest training features; larger = more OOD.

    Args:
        train: float (N, D) features of the in-distribution training images.
        queries: float (B, D).
        unit_length: Scale all features to unit length first, so that a squared distance is 2 - 2 cos.

    Returns:
        float (B,).

    Raises:
        UsageError: Fewer than two training features, or values that are not finite.
    """
    if unit_length:
        train, queries = F.normalize(train, dim=1), F.normalize(queries, dim=1)
    return nearest(queries, train, NEIGHBOURS)[0].sum(dim=1)
