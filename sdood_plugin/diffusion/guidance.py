"""What guidance points to, as a small algebra: weights on the noise predictions of a few conditions."""

from __future__ import annotations

import torch

from ..errors import UsageError
from ..randomness import uniform

_TARGET_DRAW = 0  # draw 0 of an outlier's random stream picks classes; noise takes the draws after it


def wrong_classes(labels: torch.Tensor, classes: int, *, seed: int, index: torch.Tensor) -> torch.Tensor:
    """Two different wrong classes for each image; c_r ~ Uniform({0 .. C - 1} without the own class).

    Args:
        labels: int64 (B,) pseudo-labels in 0 .. C - 1.
        classes: C, at least 2. With C = 2 there is one wrong class, and the second entry is the own class.
        seed: Seed of the outlier set.
        index: int64 (B,), the identity of each outlier.

    Returns:
        int64 (B, 2), on the device of `labels`.
    """
    draw = uniform(seed, index, _TARGET_DRAW, 2)
    first = (draw[:, 0] * (classes - 1)).long()
    target = first + (first >= labels).long()
    if classes == 2:
        return torch.stack([target, labels], dim=1)
    second = (draw[:, 1] * (classes - 2)).long()
    low, high = torch.minimum(target, labels), torch.maximum(target, labels)
    second = second + (second >= low).long()
    return torch.stack([target, second + (second >= high).long()], dim=1)


def guidance_terms(
    mode: str, weight: float | torch.Tensor, labels: torch.Tensor, wrong: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The conditions whose predictions are mixed, and their weights, which sum to 1.

    other: (1 + w) eps(c_r) - w eps(null), the paper's; away: (1 + w) eps(null) - w eps(y); blend: (1 + w) times the
    mean of eps of two wrong classes - w eps(null), for C = 2 of the wrong and the own one; blend-own: so of a wrong and the
    own one for every C; same: eps(y), the control. Terms of weight 0 for all images are left out.

    Args:
        mode: One of the five names.
        weight: w >= -1, one for all images or float (B,), one each; diffusers' guidance_scale is 1 + w. At w = -1 `other`
            and the blends are unconditional, `away` is at w = 0. It is looked at: on the CPU that waits for no other device.
        labels: int64 (B,) own classes y.
        wrong: int64 (B, 2) of `wrong_classes`.
        classes: C, which is also the index of the null class.

    Returns:
        Conditions int64 (B, M) and weights float32, (M,) for one w and (B, M) for one w each, on the labels' device; M from 1
        to 3.

    Raises:
        UsageError: Unknown mode, or w < -1.
    """
    w = torch.as_tensor(weight, dtype=torch.float32)
    if not bool((w >= -1).all()):
        raise UsageError("guidance weight w", float(w.min()), "w >= -1", "raise it")
    null = torch.full_like(labels, classes)
    modes = {
        "other": [(1 + w, wrong[:, 0]), (-w, null)],
        "away": [(1 + w, null), (-w, labels)],
        "blend": [((1 + w) / 2, wrong[:, 0]), ((1 + w) / 2, wrong[:, 1]), (-w, null)],
        "blend-own": [((1 + w) / 2, wrong[:, 0]), ((1 + w) / 2, labels), (-w, null)],
        "same": [(torch.ones_like(w), labels)],
    }
    if mode not in modes:
        raise UsageError("guidance mode", mode, f"one of {', '.join(modes)}", "check the name")
    terms = [(value, condition) for value, condition in modes[mode] if bool(value.any())]
    conditions, weights = [condition for _, condition in terms], [value for value, _ in terms]
    return torch.stack(conditions, dim=1), torch.stack(weights, dim=-1).to(labels.device)
