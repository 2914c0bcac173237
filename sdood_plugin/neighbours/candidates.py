"""Approximate squared distances by matrix products, with a bound of their error: what the exact search chooses from.

Everything here is of centred features scaled by the largest norm in the bank, so that a bank row has a norm of at most 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

BLOCK = 4096  # bank rows of one matrix product: its operands and its result stay in a processor's cache
GROUP = 16  # products that share one list of minima
_PADDING = float("inf")  # "squared distance" of rows that fill up the last block
_PARTS = {torch.bfloat16: 3, torch.float32: 1, torch.float64: 1}  # summands a squared norm is split into, exactly
_RELATIVE = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22, torch.float64: 2.0**-51}  # rounding of the result, at least
_TF32, _BFLOAT16 = 2.0**-10, 2.0**-7
_MATMUL_ROUNDING = {"none": 0.0, "ieee": 0.0, "tf32": _TF32, "bf16": _BFLOAT16}  # torch.backends' fp32_precision
_MATMUL_ROUNDING |= {"highest": 0.0, "high": _TF32, "medium": _BFLOAT16}  # torch.get_float32_matmul_precision


class Candidates(NamedTuple):
    """Rows of the bank that may be among the nearest, and how far to trust what is said of them.

    A row that is left out has an approximate distance of at least the last value. The true squared distance lies within
    `error` of the approximate one after that is taken from or to within a factor of 1 +- `relative`.
    """

    values: torch.Tensor  # float32 or float64 (n, c), approximate squared distances, ascending
    rows: torch.Tensor  # int64 (n, c), their rows in the bank
    error: torch.Tensor  # float32 or float64 (n,)
    relative: float


Finder = Callable[[torch.Tensor, int], Candidates]  # (queries (n, D), c) -> the c best by approximate distance


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
        self.width = min(BLOCK, size)
        self.kept: dict[int, torch.Tensor] = {}
        self.bank_error = 0.0  # the largest rounding error of a row
        if dtype == torch.bfloat16:
            for start in range(0, size, self.width):
                rows = bank(start, start + self.width)
                self.bank_error = max(self.bank_error, float(_rounding_error(rows, dtype).max()))
                self.kept[start] = self._padded(rows)

    def __call__(self, queries: torch.Tensor, count: int) -> Candidates:
        """The `count` best rows; count <= M."""
        operand = self._extended(queries, -2.0, ones_first=False)
        best: tuple[torch.Tensor, torch.Tensor] | None = None
        with _added_in_float32(queries.device):
            for start in range(0, self.size, self.width * GROUP):
                found = self._of_group(operand, start, count)
                both = found if best is None else tuple(torch.cat(pair, dim=1) for pair in zip(best, found, strict=True))
                chosen = both[0].topk(min(count, both[0].shape[1]), dim=1, largest=False)
                best = chosen.values, both[1].gather(1, chosen.indices)
        assert best is not None, "a bank has rows"
        lost = _rounding_error(queries, self.dtype)
        norms = queries.norm(dim=1)
        error = 2 * (lost + (norms + lost) * self.bank_error) + summing_error(queries)
        if self.dtype == torch.float32:
            error = error + 4 * _matmul_rounding(queries.device) * (norms + 1).square()
        return Candidates(*best, error, _RELATIVE[self.dtype])

    def _of_group(self, operand: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and rows (n, <= count x GROUP) that hold the `count` best of up to BLOCK x GROUP bank rows.

        The c smallest of a matrix lie in the c columns with the smallest minima; here a column is one place of every
        block, and finding minima costs one pass over the products.
        """
        starts = range(first, min(self.size, first + self.width * GROUP), self.width)
        products = operand.new_empty(len(starts), len(operand), self.width)
        for place, start in enumerate(starts):
            torch.mm(operand, self._block(start).T, out=products[place])
        lowest = products.amin(dim=0).topk(min(count, self.width), dim=1, largest=False).indices
        values = products.gather(2, lowest.expand(len(starts), -1, -1))
        rows = torch.tensor(list(starts), device=lowest.device)[:, None, None] + lowest
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return tuple(part.transpose(0, 1).flatten(1) for part in (wide, rows))  # type: ignore[return-value]

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
        filling = norms.new_zeros(len(rows), -width % 32)  # whole vector registers
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

    def __call__(self, queries: torch.Tensor, count: int) -> Candidates:
        """The `count` best rows; count <= M."""
        found = self.index.search(queries.cpu().numpy(), count)
        values, rows = (torch.from_numpy(part).to(queries.device) for part in found)
        return Candidates(values, rows, summing_error(queries), _RELATIVE[torch.float32])


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
