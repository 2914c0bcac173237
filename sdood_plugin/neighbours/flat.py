"""The exact search: candidates by matrix products, kept until no other row can be nearer, then distances by definition."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch.nn import functional as F

from .candidates import Candidates, FaissFinder, Finder, ProductFinder, multiplies_bfloat16

Backend = Literal["auto", "torch", "faiss"]
_SPARE = 24  # candidates beyond k; more are looked at where these do not settle it
_PROBE = 64  # queries that show whether a precision is enough for features like these
_MANY = 4096  # bank rows from which loading faiss pays


class FlatBank:
    """All rows compared with every query.

    Products in bfloat16, then in float32 and float64, give candidates and a bound of their error. A query whose k-th
    candidate, errors included, is nearer than the last candidate is settled; of the others, more candidates are taken, and
    what remains is searched by the definition.

    Args:
        features: float32 or float64 (M, D), M > 0, finite, on any device.
        backend: As of `Bank`.
    """

    def __init__(self, features: torch.Tensor, backend: Backend) -> None:
        self.features = features
        self.backend = backend
        self.centre = self.features.mean(dim=0)
        self._scale = 1.0
        self._finders: dict[torch.dtype, Finder] = {}
        self._scale = (
            max(float(self._centred(part, torch.float32).norm(dim=1).max()) for part in self.features.split(1 << 16)) or 1.0
        )

    def __len__(self) -> int:
        return len(self.features)

    def search(
        self, queries: torch.Tensor, k: int, query_chunk: int | None = None, limit: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k nearest rows of each query.

        Args:
            queries: float (N, D), finite.
            k: At most M.
            query_chunk: As of `Bank.nearest`.
            limit: float64 (N,), squared distances from which rows are of no interest; infinity for all. Rows beyond it may
                be missing, at an infinite distance.

        Returns:
            float64 (N, k) squared distances, ascending, and int64 (N, k) rows.
        """
        exact = exact_dtype(queries.device)
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
                beyond = None if limit is None else (limit[part] * ((1 + 2.0**-20) / self._scale**2)).to(found.values.dtype)
                near, within, settled = self._settled(found, k, beyond)
                done = part[settled]
                distances[done], rows[done] = self._ranked(queries[done], near[settled], within[settled], k)
                left.append(part[~settled])
                if precision != exact and number == 0 and 2 * len(done) < len(part):
                    left += parts[1:]
                    too_alike = precision
                    break
            pending = torch.cat(left) if left else pending
            if not len(pending):
                return distances, rows
        for part in pending.split(min(chunk, 256)):
            near = self._by_definition(queries[part], k)
            distances[part], rows[part] = self._ranked(queries[part], near, torch.ones_like(near, dtype=torch.bool), k)
        return distances, rows

    def _attempts(self, k: int) -> Iterator[tuple[torch.dtype, int]]:
        """Precision of the products, and how many candidates to take, from the fastest to the most exact."""
        counts = sorted({min(len(self), factor * (k + _SPARE)) for factor in (1, 16)})
        low = [torch.bfloat16] if self.backend != "faiss" and multiplies_bfloat16(self.features.device) else []
        for precision in dict.fromkeys([*low, torch.float32, exact_dtype(self.features.device)]):
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

    def _settled(
        self, found: Candidates, k: int, limit: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows (n, c') and bool (n, c'), which of them may be among the k nearest; bool (n,): whether no other row can be."""
        kth = found.values[:, k - 1].clamp(min=0) / (1 - found.relative) + found.error
        if limit is not None:
            kth = torch.minimum(kth, limit)
        reach = (kth + found.error) * (1 + found.relative)
        settled = found.values[:, -1] > reach
        if found.values.shape[1] == len(self):
            settled = reach.isfinite()
        within = found.values <= reach[:, None]
        width = max(k, int(within[settled].sum(dim=1).amax())) if settled.any() else k
        return found.rows[:, :width], within[:, :width], settled

    def _ranked(
        self, queries: torch.Tensor, candidates: torch.Tensor, within: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances and rows (n, k) of the nearest of the candidates (n, c) that are `within` (n, c), by the definition."""
        queries = queries.to(exact_dtype(queries.device))
        by_row = candidates.sort(dim=1)  # earlier rows first at equal distance
        candidates, within = by_row.values, within.gather(1, by_row.indices)
        at_once = max(1, (1 << (17 if queries.device.type == "cpu" else 22)) // queries.shape[1])
        filling = (0, -queries.shape[1] % 4, 0)  # sums of one layout: the same bits for a pair wherever it stands
        sums = []
        for query, row in zip(*(part.split(at_once) for part in (within.nonzero()[:, 0], candidates[within])), strict=True):
            differences = F.pad(queries[query] - self.features[row], (*filling, at_once - len(row)))
            sums.append(differences.square_().sum(dim=1)[: len(row)])
        distances = torch.full_like(candidates, torch.inf, dtype=queries.dtype)
        distances[within] = torch.cat(sums)
        nearest = distances.sort(dim=1, stable=True)
        return nearest.values[:, :k], candidates.gather(1, nearest.indices[:, :k])

    def _by_definition(self, queries: torch.Tensor, k: int, block: int = 4096) -> torch.Tensor:
        """int64 (n, k) rows: every distance summed from differences, for features that products cannot tell apart."""
        exact = exact_dtype(queries.device)
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


def exact_dtype(device: torch.device) -> torch.dtype:
    """What distances are summed in: float64, but for Apple GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64
