"""Approximate squared distances by matrix products, with a bound of their error: what the exact search chooses from.

Everything here is of centred features scaled by the largest norm in the bank, so that a bank row has a norm of at most 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

BLOCK = 4096  # bank rows of one matrix product: its operands and its result stay in a processor's cache
GROUP = 7  # products that share one list of minima; of 512 queries in bfloat16 less than the 32 MiB that malloc keeps
FOLD = 4  # rows of one block that share a minimum
MOST = 512  # candidates beyond k, of one query, that are looked at at most
SPARE = 24  # that are always looked at; faiss is asked for so many at first
WORTH = 64  # rows that can be multiplied more exactly in the time that one candidate takes
_PADDING = float("inf")  # "squared distance" of rows that fill up the last block
_PARTS = {torch.bfloat16: 3, torch.float32: 1, torch.float64: 1}  # summands a squared norm is split into, exactly
_RELATIVE = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22, torch.float64: 2.0**-51}  # rounding of the result, at least
_TF32, _BFLOAT16 = 2.0**-10, 2.0**-7
_MATMUL_ROUNDING = {"none": 0.0, "ieee": 0.0, "tf32": _TF32, "bf16": _BFLOAT16}  # torch.backends' fp32_precision
_MATMUL_ROUNDING |= {"highest": 0.0, "high": _TF32, "medium": _BFLOAT16}  # torch.get_float32_matmul_precision


class Candidates(NamedTuple):
    """Pairs of a query and a bank row that may be among its nearest, in the order of the queries and of the bank.

    Of a query that is settled no other row can be among the k nearest. One that is not has no pairs.
    """

    queries: torch.Tensor  # int64 (P,)
    rows: torch.Tensor  # int64 (P,)
    settled: torch.Tensor  # bool (n,)


Finder = Callable[[torch.Tensor, int, "torch.Tensor | None"], Candidates]  # (queries (n, D), k, limit (n,))


def reach(kth: torch.Tensor, error: torch.Tensor, relative: float, limit: torch.Tensor | None = None) -> torch.Tensor:
    """Approximate squared distance (n,) beyond which no row is among the k nearest, or nearer than the limit.

    Args:
        kth: Float (n,): k rows have an approximate squared distance of at most this one.
        error: Float (n,): a true squared distance lies within this of the approximate one, after that is taken from or to
            within a factor of 1 +- `relative`.
        relative: See there.
        limit: Float (n,), squared distances from which rows are of no interest.
    """
    true = kth.clamp(min=0) / (1 - relative) + error
    return ((true if limit is None else torch.minimum(true, limit)) + error) * (1 + relative)


class ProductFinder:
    """||q - b||^2 as one product of extended rows, [-2 q, |q|^2, 1] . [b, 1, |b|^2], in bfloat16, float32 or float64.

    For bfloat16 squared norms are split into three summands, which together are as exact as float32, and the processor adds
    up in float32: what is lost is the rounding of the features, whose size is measured, and of the result, which is
    relative to the distance itself and so is small for near neighbours.

    Args:
        bank: Its rows start to stop, at most `size`, as float (n, D), centred, with norms of at most 1; they and the queries
            are float64 for products in it, else float32.
        size: M.
        dtype: bfloat16, whose extended rows are kept, or a wider one, whose are made anew: that costs little beside the
            product and would cost much memory.
    """

    def __init__(self, bank: Callable[[int, int], torch.Tensor], size: int, dtype: torch.dtype) -> None:
        self.bank, self.size, self.dtype = bank, size, dtype
        blocks = -(-size // BLOCK)
        self.width = -(-size // (blocks * FOLD)) * FOLD  # blocks of one size, with little to fill up
        self.relative = _RELATIVE[dtype]
        self.most = MOST if dtype == torch.float64 else min(MOST, max(SPARE, size // WORTH))
        self.kept: dict[int, torch.Tensor] = {}
        self.bank_error = 0.0  # the largest rounding error of a row
        if dtype == torch.bfloat16:
            for start in range(0, size, self.width):
                rows = bank(start, start + self.width)
                self.bank_error = max(self.bank_error, float(_rounding_error(rows, dtype).max()))
                self.kept[start] = self._padded(rows)

    def __call__(self, queries: torch.Tensor, k: int, limit: torch.Tensor | None = None) -> Candidates:
        """Candidates for the k nearest; k <= M."""
        operand, error = self.extended_queries(queries), self.error(queries)
        bound, settled, pairs = torch.full_like(error, torch.inf), torch.ones_like(error, dtype=torch.bool), []
        with _added_in_float32(queries.device):
            for first in range(0, self.size, self.width * GROUP):
                products = self.products(operand, first)
                if 8 * k > self.width:  # too few columns to tell the k nearest: each row a column of its own
                    products = products.transpose(0, 1).flatten(1)[None]
                minima = _minima(products, k)
                bound = torch.minimum(bound, reach(_kth(minima, k).to(bound.dtype), error, self.relative, limit))
                near = minima <= (bound * (1 + torch.finfo(minima.dtype).eps)).to(minima.dtype)[:, None]  # rounded up
                settled &= near.sum(dim=1) <= k + self.most
                asked, column = near.nonzero(as_tuple=True)
                asked, column = asked[settled[asked]], column[settled[asked]]
                values = products.unflatten(2, (-1, minima.shape[1]))[:, asked, :, column].to(bound.dtype)
                pair, block, fold = (values <= bound[asked, None, None]).nonzero(as_tuple=True)
                rows = first + block * self.width + fold * minima.shape[1] + column[pair]
                pairs.append((asked[pair], rows, values[pair, block, fold]))
        asked, rows, values = (torch.cat(part) for part in zip(*pairs, strict=True))
        within = values <= bound[asked]
        return _in_order(asked[within], rows[within], settled & bound.isfinite(), k + self.most)

    def error(self, queries: torch.Tensor) -> torch.Tensor:
        """Float (n,): as of `reach`."""
        lost, norms = _rounding_error(queries, self.dtype), queries.norm(dim=1)
        error = 2 * (lost + (norms + lost) * self.bank_error) + summing_error(queries)
        if self.dtype == torch.float32:
            error = error + 4 * _matmul_rounding(queries.device) * (norms + 1).square()
        return error

    def products(self, operand: torch.Tensor, first: int) -> torch.Tensor:
        """Approximate squared distances (blocks, n, width) of extended queries to up to BLOCK x GROUP bank rows."""
        starts = range(first, min(self.size, first + self.width * GROUP), self.width)
        products = operand.new_empty(len(starts), len(operand), self.width)
        for place, start in enumerate(starts):
            torch.mm(operand, self._block(start).T, out=products[place])
        return products

    def extended_queries(self, queries: torch.Tensor) -> torch.Tensor:
        """What `products` takes, in its precision, of float (n, D)."""
        return self._extended(queries, -2.0, ones_first=False)

    def _block(self, start: int) -> torch.Tensor:
        return self.kept[start] if self.kept else self._padded(self.bank(start, start + self.width))

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        """The extended rows of one block, filled up to its width by rows that are far from everything."""
        block = self._extended(rows, 1.0, ones_first=True)
        filling = block.new_zeros(self.width - len(block), block.shape[1])
        filling[:, rows.shape[1] + _PARTS[self.dtype]] = _PADDING
        return torch.cat([block, filling]) if len(filling) else block

    def _extended(self, rows: torch.Tensor, factor: float, *, ones_first: bool) -> torch.Tensor:
        rest, parts = rows.square().sum(dim=1), []
        for _ in range(_PARTS[self.dtype]):
            parts.append(rest.to(self.dtype))
            rest = rest - parts[-1].to(rest.dtype)
        norms = torch.stack(parts, dim=1)
        pair = [torch.ones_like(norms), norms] if ones_first else [norms, torch.ones_like(norms)]
        width = rows.shape[1] + 2 * norms.shape[1]
        filling = norms.new_zeros(len(rows), -width % 8)  # rows that begin at whole 16 bytes
        return torch.cat([rows.to(self.dtype) * factor, *pair, filling], dim=1)


class FaissFinder:
    """faiss's exhaustive index, IndexFlatL2; on the CPU whatever the device.

    Args:
        bank: float32 (M, D), centred, norms of at most 1.
    """

    def __init__(self, bank: torch.Tensor) -> None:
        import faiss

        self.index = faiss.IndexFlatL2(bank.shape[1])
        self.index.add(bank.cpu().numpy())

    def __call__(self, queries: torch.Tensor, k: int, limit: torch.Tensor | None = None) -> Candidates:
        """Candidates for the k nearest; k <= M."""
        error, relative, size = summing_error(queries), _RELATIVE[torch.float32], self.index.ntotal
        settled, pairs = torch.zeros_like(error, dtype=torch.bool), []
        for count in sorted({min(size, k + SPARE), min(size, k + MOST)}):
            left = (~settled).nonzero()[:, 0]
            found = self.index.search(queries[left].cpu().numpy(), count)
            values, rows = (torch.from_numpy(part).to(queries.device) for part in found)
            bound = reach(values[:, k - 1], error[left], relative, None if limit is None else limit[left])
            done = (values[:, -1] > bound) | ((count == size) & bound.isfinite())
            query, place = (done[:, None] & (values <= bound[:, None])).nonzero(as_tuple=True)
            pairs.append((left[query], rows[query, place]))
            settled[left[done]] = True
        asked, rows = (torch.cat(part) for part in zip(*pairs, strict=True))
        return _in_order(asked, rows, settled, size)


def _minima(products: torch.Tensor, k: int) -> torch.Tensor:
    """(n, C): the least of every column, each C-th bank row, of the products (blocks, n, width).

    The k smallest minima are of k rows, so that no row beyond the last of them is wanted. Finding them costs one pass over
    the products, and few columns make the rest cheap.
    """
    least = products[0] if len(products) == 1 else products.amin(dim=0)
    folds = least.shape[1] % FOLD == 0 and 8 * k <= least.shape[1] // FOLD
    return least.unflatten(1, (FOLD, -1)).amin(dim=1) if folds else least


def _kth(minima: torch.Tensor, k: int) -> torch.Tensor:
    """(n,), the k-th smallest of (n, C); infinity where there are fewer."""
    if k > minima.shape[1]:
        return torch.full_like(minima[:, 0], torch.inf)
    return minima.topk(k, dim=1, largest=False).values[:, -1]


def _in_order(asked: torch.Tensor, rows: torch.Tensor, settled: torch.Tensor, most: int) -> Candidates:
    """Those of settled queries, of which any with more pairs than `most` is none."""
    settled = settled & (torch.bincount(asked, minlength=len(settled)) <= most)
    kept = settled[asked]
    asked, rows = asked[kept], rows[kept]
    order = (asked * (int(rows.max()) + 1 if len(rows) else 1) + rows).argsort()
    return Candidates(asked[order], rows[order], settled)


def summing_error(queries: torch.Tensor) -> torch.Tensor:
    """float (n,): twice the bound of |q|^2 - 2 q.b + |b|^2 summed in the queries' dtype in any order (Higham 2002, 3.1)."""
    terms, rounding = queries.shape[1] + 32, torch.finfo(queries.dtype).eps
    return terms * rounding * (queries.norm(dim=1) + 1).square() + 1e-30  # the last: products too small for the format


def _rounding_error(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float (n,): Euclidean distance of each row to itself rounded."""
    return (rows - rows.to(dtype).to(rows.dtype)).norm(dim=1) * (1 + 2.0**-10)


def _matmul_rounding(device: torch.device) -> float:
    """What float32 factors are rounded to in products there, which a user may have set; bfloat16 if that cannot be told."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    try:
        precision = backend.matmul.fp32_precision
    except AttributeError:  # torch < 2.9 has one setting for all; a later one refuses to read it where backends differ
        precision = torch.get_float32_matmul_precision()
    return _MATMUL_ROUNDING.get(precision, _BFLOAT16)


@contextmanager
def _added_in_float32(device: torch.device) -> Iterator[None]:
    """No partial sums in bfloat16, which torch allows by default on NVIDIA GPUs: their rounding goes with the norms."""
    matmul = torch.backends.cuda.matmul
    if device.type != "cuda" or not matmul.allow_bf16_reduced_precision_reduction:
        yield
        return
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 there: GPUs, and processors with instructions for them."""
    if device.type != "cpu":
        return device.type == "cuda"
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
