"""The loss of the three heads (METHOD section 4)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .network import Heads

_MASKED = -100  # cross-entropy leaves rows of this label out: no value, no gradient, whatever their logits


def three_head_loss(
    heads: Heads, labels: torch.Tensor, is_outlier: torch.Tensor, lambda_out: float, label_smoothing: float = 0.0
) -> dict[str, torch.Tensor]:
    """L = CE(g_bin, I) + (1 - I) CE(g_in, y) + I lambda CE(g_out, y), the mean over the batch.

    Args:
        heads: Outputs for B images.
        labels: int64 (B,), the pseudo-label; of an outlier, its source's. -100 trains g_bin alone.
        is_outlier: bool (B,), I.
        lambda_out: lambda.
        label_smoothing: Share of each target spread evenly over the C classes, for g_in and g_out; pseudo-labels are
            sometimes wrong, I never is.

    Returns:
        Scalars `loss` and its parts `binary`, `inside`, `outside` (lambda not applied), float32 or more. A masked
        term's gradient is exactly zero.
    """

    def classified(logits: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        targets = labels.masked_fill(masked, _MASKED)
        total = F.cross_entropy(
            full_precision(logits), targets, ignore_index=_MASKED, reduction="sum", label_smoothing=label_smoothing
        )
        return total / len(labels)

    binary = F.cross_entropy(full_precision(heads.binary), is_outlier.long())
    inside, outside = classified(heads.inside, is_outlier), classified(heads.outside, ~is_outlier)
    return {"loss": binary + inside + lambda_out * outside, "binary": binary, "inside": inside, "outside": outside}


def full_precision(logits: torch.Tensor) -> torch.Tensor:
    """bf16 and float16 as float32; what is wider stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
