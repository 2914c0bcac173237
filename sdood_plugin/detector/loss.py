"""The loss of the three heads (METHOD section 4)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .network import Heads


def three_head_loss(heads: Heads, labels: torch.Tensor, is_outlier: torch.Tensor, lambda_out: float) -> dict[str, torch.Tensor]:
    """L = CE(g_bin, I) + (1 - I) CE(g_in, y) + I lambda CE(g_out, y), the mean over the batch.

    Args:
        heads: Outputs for B images.
        labels: int64 (B,), the pseudo-label; of an outlier, its source's.
        is_outlier: bool (B,), I.
        lambda_out: lambda.

    Returns:
        Scalars `loss` and its parts `binary`, `inside`, `outside` (lambda not applied). A masked term's gradient is
        exactly zero.
    """
    flags = is_outlier.long()
    binary = F.cross_entropy(heads.binary.float(), flags)
    inside = (F.cross_entropy(heads.inside.float(), labels, reduction="none") * (1 - flags)).sum() / len(flags)
    outside = (F.cross_entropy(heads.outside.float(), labels, reduction="none") * flags).sum() / len(flags)
    return {"loss": binary + inside + lambda_out * outside, "binary": binary, "inside": inside, "outside": outside}
