"""Exact nearest neighbours of a bank of features: flat, or of its cells where it falls into tight ones."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ..errors import UsageError
from .cells import Cells, tight_cells
from .flat import Backend, FlatBank

_LARGEST = 1e150  # its square is a number in float64; compared with float32 it is infinity


class Bank:
    """Features to be searched, prepared once.

    The neighbours are those by the definition sum (q - b)^2 in float64, equal distances in the order of the bank, whatever
    the backend, the precision of the products, or which queries are searched together. Distances that differ by less than
    the rounding of such sums, as of queries 1e8 times farther away than the rows are from each other, or that float64 rounds
    to 0, as of differences below 1e-160, may come in any order.

    Args:
        features: float (M, D), M > 0, on any device.
        backend: `torch`; `faiss` (IndexFlatL2, on the CPU, all rows); `auto`: torch, and in place of its float32 products
            faiss where it is installed, on the CPU and for many rows.

    Raises:
        UsageError: Values that are not finite or 1e150 and more, an empty bank, or `faiss` where it is not installed.
    """

    def __init__(self, features: torch.Tensor, *, backend: Backend = "auto") -> None:
        if backend == "faiss" and find_spec("faiss") is None:
            raise UsageError("backend", "faiss", "the package faiss-cpu", "pip install 'sdood_plugin[faiss]' or use auto")
        if not len(features):
            raise UsageError("bank", "no rows", "one or more", "give features")
        self.features = _finite(features, "bank")
        flat = FlatBank(self.features, backend)
        found = None if backend == "faiss" else tight_cells(self.features)
        self._index = flat if found is None else Cells(flat, *found)

    def __len__(self) -> int:
        return len(self.features)

    def nearest(
        self, queries: torch.Tensor, k: int, *, exclude_self: bool = False, query_chunk: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k nearest rows of the bank for each query.

        Args:
            queries: float (N, D), same device.
            k: 1 to M; to M - 1 with `exclude_self`.
            exclude_self: The queries are the bank; a row is not its own neighbour.
            query_chunk: Queries searched together; bounds the memory, changes no answer.

        Returns:
            (distances, rows): float64 (N, k) squared distances, ascending (float32 on Apple GPUs), and int64 (N, k).

        Raises:
            UsageError: k that does not fit, another width than the bank's, or values as of the bank.
        """
        available = len(self) - int(exclude_self)
        if not 1 <= k <= available:
            raise UsageError(
                "k nearest neighbours", k, f"1 <= k <= {available}, the size of the bank", "lower k or give more images"
            )
        if queries.shape[1] != self.features.shape[1]:
            raise UsageError(
                "feature width",
                queries.shape[1],
                f"{self.features.shape[1]} as in the bank",
                "use the backbone the bank was made with",
            )
        distances, rows = self._index.search(_finite(queries, "query"), k + int(exclude_self), query_chunk)
        if exclude_self:
            own = rows == torch.arange(len(queries), device=rows.device)[:, None]
            own[:, -1] |= ~own.any(dim=1)  # so many duplicates come before it that it is not even among them
            distances, rows = (part[~own].reshape(-1, k) for part in (distances, rows))
        return distances, rows


def nearest(
    queries: torch.Tensor, bank: torch.Tensor, k: int, *, exclude_self: bool = False, query_chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Bank(bank).nearest(queries, k)` of a bank that is searched once, its distances in float32 or as wide as the queries."""
    distances, rows = Bank(bank).nearest(queries, k, exclude_self=exclude_self, query_chunk=query_chunk)
    return distances.to(torch.promote_types(queries.dtype, torch.float32)), rows


def _finite(features: torch.Tensor, name: str) -> torch.Tensor:
    """The features in float32 or float64, all of them numbers with squares that float64 holds."""
    finite = torch.maximum(features.amax(dim=1), -features.amin(dim=1)) < _LARGEST  # no copy of a large bank
    if not finite.all():
        row = int((~finite).nonzero()[0, 0])
        raise UsageError(
            f"{name} features",
            f"NaN, infinity or beyond {_LARGEST:g} in row {row}",
            "finite numbers",
            "check that image and the backbone",
        )
    return features if features.dtype == torch.float64 else features.float()
