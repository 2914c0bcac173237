"""The exact search: candidates by matrix products, kept until no other row can be nearer, then distances by definition."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch

from ..errors import UsageError
from .candidates import Candidates, FaissFinder, Finder, ProductFinder, multiplies_bfloat16

Backend = Literal["auto", "torch", "faiss"]
_SPARE = 24  # candidates beyond k; more are looked at where these do not settle it
_PROBE = 64  # queries that show whether a precision is enough for features like these
_MANY = 4096  # bank rows from which loading faiss pays


class Bank:
    """Features to be searched, prepared once.

    The neighbours are those by the definition sum (q - b)^2 in float64, equal distances in the order of the bank, whatever
    the backend, the precision of the products, or which queries are searched together. Products in bfloat16, then in
    float32 and float64, give candidates and a bound of their error. A query whose k-th candidate, errors included, is nearer
    than the last candidate is settled; of the others, more candidates are taken, and what remains is searched by the
    definition.

    Args:
        features: float (M, D), M > 0, on any device.
        backend: `torch`; `faiss` (IndexFlatL2, on the CPU); `auto`: torch, and in place of its float32 products faiss
            where it is installed, on the CPU and for many rows.

    Raises:
        UsageError: Values that are not finite, an empty bank, or `faiss` where it is not installed.
    """

    def __init__(self, features: torch.Tensor, *, backend: Backend = "auto") -> None:
        if backend == "faiss" and find_spec("faiss") is None:
            raise UsageError("backend", "faiss", "the package faiss-cpu", "pip install 'sdood_plugin[faiss]' or use auto")
        if not len(features):
            raise UsageError("bank", "no rows", "one or more", "give features")
        self.features = _finite(features, "bank")
        self.backend = backend
        self.centre = self.features.mean(dim=0)
        self._scale = 1.0
        self._finders: dict[torch.dtype, Finder] = {}
        self._scale = (
            max(float(self._centred(part, torch.float32).norm(dim=1).max()) for part in self.features.split(1 << 16)) or 1.0
        )

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
            UsageError: k that does not fit, another width than the bank's, or values that are not finite.
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
        queries = _finite(queries, "query")
        distances, rows = self._search(queries, k + int(exclude_self), query_chunk)
        if exclude_self:
            own = rows == torch.arange(len(queries), device=rows.device)[:, None]
            own[:, -1] |= ~own.any(dim=1)  # so many duplicates come before it that it is not even among them
            distances, rows = (part[~own].reshape(-1, k) for part in (distances, rows))
        return distances, rows

    def _search(self, queries: torch.Tensor, k: int, query_chunk: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        exact = _exact(queries.device)
        distances = queries.new_empty(len(queries), k, dtype=exact)
        rows = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        chunk = query_chunk or (512 if queries.device.type == "cpu" else 4096)
        pending = torch.arange(len(queries), device=queries.device)
        too_alike = None
        for precision, count in self._attempts(k):
            if precision == too_alike:
                continue
            finder, left = self._finder(precision), []
            parts = self._parts(pending, chunk, finder)
            for number, part in enumerate(parts):
                found = finder(self._centred(queries[part], precision), count)
                near, settled = self._settled(found, k)
                done = part[settled]
                distances[done], rows[done] = self._ranked(queries[done], near[settled], k)
                left.append(part[~settled])
                if precision != exact and number == 0 and 2 * len(done) < len(part):
                    left += parts[1:]
                    too_alike = precision
                    break
            pending = torch.cat(left) if left else pending
            if not len(pending):
                return distances, rows
        for part in pending.split(min(chunk, 256)):
            distances[part], rows[part] = self._ranked(queries[part], self._by_definition(queries[part], k), k)
        return distances, rows

    def _attempts(self, k: int) -> Iterator[tuple[torch.dtype, int]]:
        """Precision of the products, and how many candidates to take, from the fastest to the most exact."""
        counts = sorted({min(len(self), factor * (k + _SPARE)) for factor in (1, 16)})
        low = [torch.bfloat16] if self.backend != "faiss" and multiplies_bfloat16(self.features.device) else []
        for precision in dict.fromkeys([*low, torch.float32, _exact(self.features.device)]):
            yield from ((precision, count) for count in counts)

    def _parts(self, pending: torch.Tensor, chunk: int, finder: Finder) -> tuple[torch.Tensor, ...]:
        """Queries to search together: a few that show whether a precision will do; many for faiss, which has its own blocks."""
        if isinstance(finder, FaissFinder):
            return pending.split(16 * chunk)
        return (*pending[:_PROBE].split(chunk), *pending[_PROBE:].split(chunk))

    def _finder(self, precision: torch.dtype) -> Finder:
        """What finds candidates by products in that precision, made once."""
        if precision not in self._finders:
            rows, use_faiss = partial(self._rows, precision), precision == torch.float32 and self._takes_faiss()
            self._finders[precision] = FaissFinder(rows(0, len(self))) if use_faiss else ProductFinder(rows, len(self), precision)
        return self._finders[precision]

    def _takes_faiss(self) -> bool:
        on_cpu, installed = self.features.device.type == "cpu", find_spec("faiss") is not None
        return self.backend == "faiss" or (self.backend == "auto" and on_cpu and installed and len(self) >= _MANY)

    def _rows(self, precision: torch.dtype, start: int, stop: int) -> torch.Tensor:
        return self._centred(self.features[start:stop], precision)

    def _centred(self, rows: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
        """Moved and scaled as candidates want them: the rounding of products goes with the norms, which this makes small."""
        wanted = torch.promote_types(precision, torch.float32)
        return (rows.to(torch.promote_types(rows.dtype, wanted)) - self.centre).div_(self._scale).to(wanted)

    def _settled(self, found: Candidates, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates (n, c') that may be among the k nearest, and bool (n,): whether no other row can be."""
        kth = found.values[:, k - 1].clamp(min=0) / (1 - found.relative) + found.error
        reach = (kth + found.error) * (1 + found.relative)
        settled = found.values[:, -1] > reach
        if found.values.shape[1] == len(self):
            settled = reach.isfinite()
        within = (found.values[settled] <= reach[settled, None]).sum(dim=1)
        return found.rows[:, : int(within.max()) if len(within) else k], settled

    def _ranked(self, queries: torch.Tensor, candidates: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances and rows (n, k) of the nearest of the candidates (n, c), by the definition."""
        exact = _exact(queries.device)
        at_once = max(1, (1 << (19 if queries.device.type == "cpu" else 26)) // (candidates.shape[1] * queries.shape[1]))
        distances, rows = [queries.new_empty(0, k, dtype=exact)], [candidates.new_empty(0, k)]
        for some, chosen in zip(queries.split(at_once), candidates.sort(dim=1).values.split(at_once), strict=True):
            order = (some.to(exact)[:, None] - self.features[chosen]).square().sum(dim=2).sort(dim=1, stable=True)
            distances.append(order.values[:, :k])
            rows.append(chosen.gather(1, order.indices[:, :k]))
        return torch.cat(distances), torch.cat(rows)

    def _by_definition(self, queries: torch.Tensor, k: int, block: int = 4096) -> torch.Tensor:
        """int64 (n, k) rows: every distance summed from differences, for features that products cannot tell apart."""
        exact = _exact(queries.device)
        queries = queries.to(exact)
        best = queries.new_empty(len(queries), 0)
        rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start, part in zip(range(0, len(self), block), self.features.split(block), strict=True):
            own = torch.cdist(queries, part.to(exact), compute_mode="donot_use_mm_for_euclid_dist")
            places = torch.arange(start, start + len(part), device=rows.device).expand(len(queries), -1)
            order = torch.cat([best, own], dim=1).sort(dim=1, stable=True)  # earlier rows first at equal distance
            best = order.values[:, :k]
            rows = torch.cat([rows, places], dim=1).gather(1, order.indices[:, :k])
        return rows


def nearest(
    queries: torch.Tensor, bank: torch.Tensor, k: int, *, exclude_self: bool = False, query_chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Bank(bank).nearest(queries, k)` of a bank that is searched once, its distances in float32 or as wide as the queries."""
    distances, rows = Bank(bank).nearest(queries, k, exclude_self=exclude_self, query_chunk=query_chunk)
    return distances.to(torch.promote_types(queries.dtype, torch.float32)), rows


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64


def _finite(features: torch.Tensor, name: str) -> torch.Tensor:
    """The features in float32 or float64, all of them numbers."""
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0, 0])
        raise UsageError(
            f"{name} features", f"NaN or infinity in row {row}", "finite numbers", "check that image and the backbone"
        )
    return features if features.dtype == torch.float64 else features.float()
