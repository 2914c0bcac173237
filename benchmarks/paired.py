"""Paired differences of two methods' AUROC on the same test images, with a bootstrap interval over those images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdood_plugin.artifacts import read_csv

DRAWS = 2000
OURS = {"score": "sdood", "distance": "sdood-distance", "votes": "sdood-vote", "g_bin": "sdood-g_bin"}  # column -> method
Scores = tuple[np.ndarray, np.ndarray]  # float64 scores of ID and of OOD images, larger = more OOD


def read_scores(folder: Path, ood: str) -> dict[str, Scores]:
    """Every method's scores of the ID test images and of one OOD set in a run folder: ours and the comparators'."""
    found: dict[str, Scores] = {}
    for stage in ("evaluation", "comparison"):
        sides = [read_csv(folder / stage / f"scores-{name}.csv") for name in ("id", ood)]
        for column in sides[0][0]:
            name = OURS.get(column) if stage == "evaluation" else column
            if name is not None and column != "path":
                inside, outside = (np.array([float(row[column]) for row in side]) for side in sides)
                found[name] = (inside, outside)
    return found


def weighted_auroc(scores: Scores, id_weights: np.ndarray, ood_weights: np.ndarray) -> np.ndarray:
    """AUROC (0 to 1) for each of several weightings of the images; a tie counts one half.

    Args:
        scores: (N,) and (M,).
        id_weights: (R, N) counts of each ID image in a resample.
        ood_weights: (R, M).

    Returns:
        (R,).
    """
    inside, outside = scores
    order = np.argsort(inside, kind="stable")
    below = np.concatenate([np.zeros((len(id_weights), 1)), np.cumsum(id_weights[:, order], axis=1)], axis=1)
    left, right = (np.searchsorted(inside[order], outside, side=side) for side in ("left", "right"))
    wins = (ood_weights * (below[:, left] + below[:, right])).sum(axis=1) / 2
    return wins / id_weights.sum(axis=1) / ood_weights.sum(axis=1)


def paired_difference(
    ours: Sequence[Scores], theirs: Sequence[Scores], *, seed: int = 0, draws: int = DRAWS, level: float = 0.95
) -> dict[str, float]:
    """Ours minus theirs in per cent of AUROC, the mean over runs, with a percentile interval.

    Every run's test images are resampled on their own, ID and OOD apart, and both methods see the same resample.

    Args:
        ours, theirs: Scores of each run (seed), in the same order, of the same images.
        seed: Seed of the resampling.
        draws: Resamples.
        level: Coverage of the interval.

    Returns:
        `difference`, `low`, `high`; `spread`, the sample standard deviation of the difference over runs (0 for one run);
        `n_runs`.
    """
    generator = np.random.default_rng(seed)
    points, resampled = [], []
    for mine, other in zip(ours, theirs, strict=True):
        sizes = [len(side) for side in mine]
        if sizes != [len(side) for side in other]:
            raise ValueError(f"scores of {[len(side) for side in other]} images, expected {sizes}: not the same images")
        whole = [np.ones((1, size)) for size in sizes]
        weights = [generator.multinomial(size, np.full(size, 1 / size), size=draws) for size in sizes]
        points.append(float((weighted_auroc(mine, *whole) - weighted_auroc(other, *whole))[0]))
        resampled.append(weighted_auroc(mine, *weights) - weighted_auroc(other, *weights))
    low, high = np.quantile(np.mean(resampled, axis=0), [(1 - level) / 2, (1 + level) / 2])
    spread = float(np.std(points, ddof=1)) if len(points) > 1 else 0.0
    values = {"difference": float(np.mean(points)), "low": float(low), "high": float(high), "spread": spread}
    return {name: 100 * value for name, value in values.items()} | {"n_runs": len(points)}


def paired_rows(runs: Sequence[Mapping[str, Mapping[str, Scores]]], ours: str = "sdood") -> list[dict[str, Any]]:
    """One record for each OOD set and comparator: `ours` minus it.

    Args:
        runs: For each seed, by OOD set, by method, the scores (`read_scores`).
        ours: Name of our method.
    """
    rows: list[dict[str, Any]] = []
    for ood, methods in runs[0].items():
        for method in methods:
            if not method.startswith("sdood"):
                values = paired_difference([run[ood][ours] for run in runs], [run[ood][method] for run in runs])
                rows.append({"ours": ours, "method": method, "ood": ood, **values})
    return rows
