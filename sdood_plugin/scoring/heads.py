"""The scores that the network's heads give by themselves, without any bank; larger = more OOD."""

from __future__ import annotations

import torch


def head_scores(binary: torch.Tensor, inside: torch.Tensor, outside: torch.Tensor) -> dict[str, torch.Tensor]:
    """What g_bin, g_in and g_out say of B images.

    Args:
        binary: float (B, 2) logits of g_bin; class 1 is outlier.
        inside: float (B, C) logits of g_in.
        outside: float (B, C) logits of g_out.

    Returns:
        float (B,) each. `g_bin`: its probability of an outlier. `msp`: minus g_in's largest class probability (Hendrycks &
        Gimpel, ICLR 2017). `energy`: minus the log of g_in's summed exponentials (Liu et al., NeurIPS 2020). `g_out`: the
        same of g_out, which is less sure of an outlier, that has lost what it was made of, than of an image.
    """
    return {
        "g_bin": binary.softmax(dim=1)[:, 1],
        "msp": -inside.softmax(dim=1).amax(dim=1),
        "energy": -inside.logsumexp(dim=1),
        "g_out": -outside.logsumexp(dim=1),
    }
