"""Exact k nearest neighbours in squared Euclidean distance; clustering, the score and the duplicate check share it."""

from __future__ import annotations

import torch

from .errors import UsageError


def nearest(
    queries: torch.Tensor,  # float (N, D)
    bank: torch.Tensor,  # float (M, D), same device
    k: int,
    *,
    exclude_self: bool = False,  # queries IS the bank: leave out the diagonal
    max_elements: int = 1 << 25,  # distances held at once
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest rows of `bank` for each query, by chunks of the distance matrix.

    Candidates come from ||q||^2 - 2 q.b + ||b||^2, which cancels badly, so it is taken of centred features, every row
    of the bank that its rounding could have misplaced stays a candidate, and the distances returned are recomputed as
    sums of squared differences.

    Returns:
        (distances, indices): float (N, k) squared distances in ascending order, int64 (N, k). Equal distances are
        ordered by bank index.

    Raises:
        UsageError: k outside 1..M (M - 1 with `exclude_self`), widths that differ, or values that are not finite.
    """
    available = len(bank) - int(exclude_self)
    if not 1 <= k <= available:
        raise UsageError("k nearest neighbours", k, f"1 <= k <= {available}, the size of the bank", "lower k or give more images")
    if queries.shape[1] != bank.shape[1]:
        raise UsageError(
            "feature width", queries.shape[1], f"{bank.shape[1]} as in the bank", "use the backbone the bank was made with"
        )
    for name, features in (("query", queries), ("bank", bank)):
        finite = torch.isfinite(features).all(dim=1)
        if not finite.all():
            row = int((~finite).nonzero()[0, 0])
            raise UsageError(
                f"{name} features", f"NaN or infinity in row {row}", "finite numbers", "check that image and the backbone"
            )
    centre = bank.mean(dim=0)
    centred = bank - centre
    squared_norms = centred.square().sum(dim=1)
    chunk = max(1, max_elements // max(len(bank), k * bank.shape[1]))
    rounding = (
        4 * torch.finfo(bank.dtype).eps * (bank.shape[1] + 4)
    )  # bound of the expansion's error, in units of the norms' product
    largest = squared_norms.max().sqrt()
    distances, indices = [], []
    for start in range(0, len(queries), chunk):
        block = queries[start : start + chunk]
        expanded = torch.addmm(squared_norms, block - centre, centred.T, alpha=-2.0)  # up to ||q||^2, constant in the bank
        if exclude_self:
            rows = torch.arange(len(block), device=block.device)
            expanded[rows, rows + start] = torch.inf
        found = expanded.topk(min(k + 4, available), dim=1, largest=False)
        reach = found.values[:, k - 1] + rounding * largest * ((block - centre).norm(dim=1) + largest)
        count = found.indices.shape[1]
        if count < available and (found.values[:, -1] <= reach).any():  # ties, or a cluster tighter than the rounding
            count = min(available, int((expanded <= reach[:, None]).sum(dim=1).max()))
            found = expanded.topk(count, dim=1, largest=False)
        candidates = found.indices.sort(dim=1).values
        piece = max(1, max_elements // (count * bank.shape[1]))
        for part, chosen in zip(block.split(piece), candidates.split(piece), strict=True):
            order = (part[:, None] - bank[chosen]).square().sum(dim=2).sort(dim=1, stable=True)
            distances.append(order.values[:, :k])
            indices.append(chosen.gather(1, order.indices[:, :k]))
    if not distances:
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=queries.device)
    return torch.cat(distances), torch.cat(indices)
