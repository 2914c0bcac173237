"""Smaller banks: their rows replaced by the centres of k-means clusters."""

from __future__ import annotations

import math

import torch


def reduce_banks(banks: tuple[torch.Tensor, torch.Tensor], size: int | None, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both banks with at most `size` rows together, each shrunk by the same factor, so that votes keep their odds.

    Args:
        banks: float (N, D), in-distribution, and (M, D), outliers.
        size: Rows wanted; None keeps all.
        least: Rows below `size` that the in-distribution bank keeps if it has them, whatever that does to the odds.

    Returns:
        Centres of scikit-learn's MiniBatchKMeans (Sculley, WWW 2010), on the banks' device, or the banks themselves.
    """
    total = sum(len(bank) for bank in banks)
    if size is None or size >= total:
        return banks
    outliers = max(1, round(size * len(banks[1]) / total)) if len(banks[1]) else 0
    outliers = min(outliers, size - min(least, len(banks[0])))
    return _centres(banks[0], size - outliers), _centres(banks[1], outliers)


def _centres(bank: torch.Tensor, count: int) -> torch.Tensor:
    from sklearn.cluster import MiniBatchKMeans

    if count >= len(bank):
        return bank
    means = MiniBatchKMeans(count, batch_size=max(1024, 4 * count), n_init=1, random_state=0, compute_labels=False)
    rows = bank.cpu()
    unit = 2.0 ** (math.frexp(float(rows.abs().max()))[1] - 1)  # k-means squares what it is given; a power of two rounds nothing
    return torch.from_numpy(means.fit((rows / unit).numpy()).cluster_centers_ * unit).to(bank)
