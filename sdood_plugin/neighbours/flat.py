"""The exact search: candidates by matrix products, kept until no other row can be nearer, then distances by definition."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch.nn import functional as F

from .candidates import FaissFinder, Finder, ProductFinder, multiplies_bfloat16

Backend = Literal["auto", "torch", "faiss"]
_PROBE = 64  # queries that show whether a precision is enough for features like these
_MANY = 4096  # bank rows from which loading faiss pays


class FlatBank:
    """All rows compared with every query.

    Products in bfloat16, then in float32 and float64, give all rows that may be among the nearest by a bound of their error.
    A query for which these are few is settled by their distances; what remains is searched by the definition.

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
        for precision in self._precisions():
            finder, left = self._finder(precision), []
            parts = self._parts(pending, chunk, finder)
            for number, part in enumerate(parts):
                asked = self._centred(queries[part], precision)
                beyond = None if limit is None else (limit[part] * ((1 + 2.0**-20) / self._scale**2)).to(asked.dtype)
                found = finder(asked, k, beyond)
                done = part[found.settled]
                ranked = self._ranked(queries[part], found.queries, found.rows, k)
                distances[done], rows[done] = (values[found.settled] for values in ranked)
                left.append(part[~found.settled])
                if precision != exact and number == 0 and 2 * len(done) < len(part):
                    left += parts[1:]
                    break
            pending = torch.cat(left) if left else pending
            if not len(pending):
                return distances, rows
        for part in pending.split(min(chunk, 256)):
            near = self._by_definition(queries[part], k).sort(dim=1).values
            asked = torch.arange(len(part), device=near.device).repeat_interleave(k)
            distances[part], rows[part] = self._ranked(queries[part], asked, near.flatten(), k)
        return distances, rows

    def _precisions(self) -> list[torch.dtype]:
        """Of the products, from the fastest to the most exact."""
        low = [torch.bfloat16] if self.backend != "faiss" and multiplies_bfloat16(self.features.device) else []
        return list(dict.fromkeys([*low, torch.float32, exact_dtype(self.features.device)]))

    def _parts(self, pending: torch.Tensor, chunk: int, finder: Finder) -> list[torch.Tensor]:
        """Queries to search together: a few that show whether a precision will do; many for faiss, which has its own blocks."""
        if isinstance(finder, FaissFinder):
            chunk, probe = 16 * chunk, 0
        else:
            probe = _PROBE
        return [part for some in (pending[:probe], pending[probe:]) for part in some.split(chunk) if len(part)]

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

    def _ranked(
        self, queries: torch.Tensor, asked: torch.Tensor, candidates: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances and rows (n, k) of the nearest by the definition, of pairs in order, int64 (P,) queries and (P,) rows.

        Where there are fewer than k the last are row 0 at an infinite distance.
        """
        queries = queries.to(exact_dtype(queries.device))
        at_once = max(1, (1 << (17 if queries.device.type == "cpu" else 22)) // queries.shape[1])
        filling = (0, -queries.shape[1] % 4, 0)  # sums of one layout: the same bits for a pair wherever it stands
        sums = [queries.new_empty(0)]
        for query, row in zip(asked.split(at_once), candidates.split(at_once), strict=True):
            differences = F.pad(queries[query] - self.features[row], (*filling, at_once - len(row)))
            sums.append(differences.square_().sum(dim=1)[: len(row)])
        counts = torch.bincount(asked, minlength=len(queries))
        place = torch.arange(len(asked), device=asked.device) - (counts.cumsum(0) - counts)[asked]
        distances = queries.new_full((len(queries), max(k, int(counts.max()))), torch.inf)
        rows = torch.zeros_like(distances, dtype=torch.int64)
        distances[asked, place], rows[asked, place] = torch.cat(sums), candidates
        nearest = distances.sort(dim=1, stable=True)  # earlier rows first at equal distance
        return nearest.values[:, :k], rows.gather(1, nearest.indices[:, :k])

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
