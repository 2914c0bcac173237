"""A bank that falls into tight cells, as features of a trained network do: cells that are too far away are not looked at."""

from __future__ import annotations

import torch

from .flat import FlatBank, exact_dtype

_FEWEST = 1 << 14  # bank rows from which cells are tried
_CELLS = 32
_SAMPLE = 64  # rows for each cell that k-means sees
_PROBES = 128  # rows of those that are searched for, to see how much of the bank is left
_TIGHT = 0.25  # share of the bank that may be left for its own rows; beyond that, cells cost more than they save
_WORTH = 0.5  # share above which a query asks all of the bank at once
_SLACK = 2e-6  # of the norms: more than float64 products of up to 16,384 summands may be off by in a distance


class Cells:
    """The same answers as of the flat bank, each cell a flat bank of its own.

    A query asks the cell whose centre is nearest; the k-th distance there is the reach beyond which nothing matters. By the
    triangle inequality no row of a cell is nearer than the distance to its centre less the cell's radius, nor nearer than
    the rows' least projection on the line from the query's cell to theirs is from the query's (as between the halves of
    Uhlmann 1991 and of Brin 1995). Cells beyond the reach are left out. Queries that most of the bank is left for, as far
    outliers are, ask the flat bank.

    Args:
        flat: The bank.
        centres: float64 (C, D), of the bank's features less their mean.
        cell: int64 (M,), the cell of each row. Any division gives the right answer; a tight one gives it fast.
    """

    def __init__(self, flat: FlatBank, centres: torch.Tensor, cell: torch.Tensor) -> None:
        used = cell.unique()  # of copies, k-means leaves cells empty
        centres = centres[used]
        self.flat, self.centres = flat, centres
        self.rows = [(cell == number).nonzero()[:, 0] for number in used]
        self.parts = [FlatBank(flat.features[rows], flat.backend) for rows in self.rows]
        self.sizes = torch.tensor([len(rows) for rows in self.rows], device=centres.device)
        self.gaps = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
        self.radius = centres.new_zeros(len(centres))
        self.least = torch.full_like(self.gaps, torch.inf)  # [a, b]: of the rows of b, along the line from centre a to b
        self.largest = centres.norm(dim=1).max()
        for number, rows in enumerate(self.rows):
            for some in rows.split(1 << 14):
                moved = self._moved(flat.features[some])
                along = moved @ centres.T
                self.radius[number] = torch.maximum(self.radius[number], (moved - centres[number]).norm(dim=1).max())
                least = ((along[:, number, None] - along) / self.gaps[number]).amin(dim=0)
                self.least[:, number] = torch.minimum(self.least[:, number], least)
                self.largest = torch.maximum(self.largest, moved.norm(dim=1).max())
        self.least[self.gaps <= 1e-3 * self.largest] = -torch.inf  # rounding would turn the line

    def search(self, queries: torch.Tensor, k: int, query_chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `FlatBank.search`."""
        distances = self.centres.new_full((len(queries), k), torch.inf)
        rows = torch.full((len(queries), k), len(self.flat), device=queries.device)

        def ask(number: int, asked: torch.Tensor) -> None:
            if not len(asked):
                return
            count, so_far = min(k, len(self.rows[number])), distances[asked, -1]
            found, places = self.parts[number].search(queries[asked], count, query_chunk, so_far)
            distances[asked], rows[asked] = _merged(
                torch.cat([distances[asked], found], dim=1), torch.cat([rows[asked], self.rows[number][places]], dim=1), k
            )

        own, bounds = self.bounds(queries)
        for number in range(len(self.parts)):
            ask(number, (own == number).nonzero()[:, 0])
        within = self.within(bounds, distances[:, -1])
        far = (within * self.sizes).sum(dim=1) > _WORTH * len(self.flat)
        if far.any():
            distances[far], rows[far] = self.flat.search(queries[far], k, query_chunk)
        within[far] = False
        within.scatter_(1, own[:, None], False)
        for number in range(len(self.parts)):
            asked = within[:, number].nonzero()[:, 0]
            ask(number, asked[self.within(bounds[asked, number, None], distances[asked, -1])[:, 0]])
        return distances, rows

    def bounds(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each query's cell, int64 (N,), and float64 (N, C): no row of a cell is nearer than that (a distance, not squared)."""
        cells, bounds = [], []
        for some in queries.split(1 << 14):
            moved = self._moved(some)
            along, norms = moved @ self.centres.T, moved.norm(dim=1)
            squared = norms.square()[:, None] - 2 * along + self.centres.square().sum(dim=1)
            own = squared.argmin(dim=1)
            ball = squared.clamp(min=0).sqrt() - self.radius
            plane = self.least[own] - (along - along.gather(1, own[:, None])) / self.gaps[own]
            cells.append(own)
            bounds.append(torch.fmax(ball, plane) - _SLACK * (norms + self.largest)[:, None])
        return torch.cat(cells), torch.cat(bounds)

    @staticmethod
    def within(bounds: torch.Tensor, kth: torch.Tensor) -> torch.Tensor:
        """bool (N, C): whether a row there may be among the k nearest, whose last squared distance so far is kth (N,)."""
        return ~(bounds > kth.sqrt()[:, None])

    def _moved(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.centres.dtype) - self.flat.centre


def tight_cells(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Centres and the cell of each row, as `Cells` takes them, or None where a flat search is the faster one.

    scikit-learn's k-means of a sample; whether it pays is tried on the sample too.
    """
    if len(features) < _FEWEST or exact_dtype(features.device) != torch.float64:
        return None
    from sklearn.cluster import KMeans

    mean = features.mean(dim=0)
    drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[: _CELLS * _SAMPLE]
    sample = features[drawn.to(features.device)].double() - mean
    distinct = len(sample.unique(dim=0))
    if distinct == 1 or not sample.isfinite().all():
        return None
    means = KMeans(min(_CELLS, distinct), n_init=1, max_iter=10, random_state=0).fit(sample.cpu().numpy())
    centres = torch.from_numpy(means.cluster_centers_).to(features.device)
    trial = Cells(FlatBank(sample, "torch"), centres, torch.from_numpy(means.labels_).long().to(features.device))
    probes = sample[:: max(1, len(sample) // _PROBES)]
    within = Cells.within(trial.bounds(probes)[1], trial.flat.search(probes, 2)[0][:, 1])
    if float((within * trial.sizes).sum(dim=1).double().mean()) > _TIGHT * len(sample):
        return None
    norms, rough = centres.square().sum(dim=1).float(), centres.T.float()
    cell = [(norms - 2 * (part - mean).float() @ rough).argmin(dim=1) for part in features.split(1 << 14)]
    return centres, torch.cat(cell)


def _merged(distances: torch.Tensor, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest (n, k) of (n, c), at equal distance in the order of the bank."""
    by_row = rows.sort(dim=1)
    by_distance = distances.gather(1, by_row.indices).sort(dim=1, stable=True)
    return by_distance.values[:, :k], by_row.values.gather(1, by_distance.indices[:, :k])
