"""Paired differences of two methods' AUROC on the same test images, with a bootstrap interval over those images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdood_plugin.artifacts import read_csv, read_json, write_json

DRAWS = 2000
OURS = {"score": "sdood", "distance": "sdood-distance", "votes": "sdood-vote", "g_bin": "sdood-g_bin"}  # column -> method
Scores = tuple[np.ndarray, np.ndarray]  # float64 scores of ID and of OOD images, larger = more OOD
Weights = tuple[np.ndarray, np.ndarray]  # int (1 + draws, N) and (1 + draws, M): how often each image counts


def read_scores(folder: Path, ood: str) -> dict[str, Scores]:
    """Every method's scores of the ID test images and of one OOD set in a run folder: ours and the comparators'."""
    ours = read_table(folder / "evaluation", ood)
    return {OURS[column]: scores for column, scores in ours.items() if column in OURS} | read_table(folder / "comparison", ood)


def read_table(folder: Path, ood: str) -> dict[str, Scores]:
    """By column, what `scores-id.csv` and `scores-OOD.csv` of a folder hold beside `path`."""
    inside, outside = (read_csv(folder / f"scores-{name}.csv") for name in ("id", ood))
    columns = [column for column in inside[0] if column != "path"]
    return {column: (_numbers(inside, column), _numbers(outside, column)) for column in columns}


def _numbers(rows: Sequence[Mapping[str, str]], column: str) -> np.ndarray:
    return np.array([float(row[column]) for row in rows])


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


def weightings(runs: Sequence[Scores], *, same_ood: bool = True, draws: int = DRAWS, seed: int = 0) -> list[Weights]:
    """For each run the counts of its images: once all of them, then `draws` resamples, ID and OOD apart.

    Seeds are tested on the same images, so one draw serves all runs: averaging more of them shows the test images no better.

    Args:
        runs: Scores of each run, any method's; image i of one run is image i of every other.
        same_ood: Whether that holds of the OOD images too; else each run's are drawn on their own.
        draws: Resamples.
        seed: Seed of the resampling.
    """
    generator = np.random.default_rng(seed)

    def counts(size: int) -> np.ndarray:
        return np.concatenate([np.ones((1, size), int), generator.multinomial(size, np.full(size, 1 / size), size=draws)])

    inside, outside = (counts(len(side)) for side in runs[0])
    own = [outside, *(outside if same_ood else counts(len(run[1])) for run in runs[1:])]
    return [(inside, one) for one in own]


def areas(runs: Sequence[Scores], weights: Sequence[Weights]) -> np.ndarray:
    """A method's AUROC in per cent, (R, 1 + draws): of each run's images as they are, then of their resamples.

    Raises:
        ValueError: Scores of other numbers of images than were drawn.
    """
    for scores, own in zip(runs, weights, strict=True):
        found, expected = [len(side) for side in scores], [side.shape[1] for side in own]
        if found != expected:
            raise ValueError(f"scores of {found} images (ID, OOD), expected {expected}: not the same images")
    return np.stack([100 * weighted_auroc(scores, *own) for scores, own in zip(runs, weights, strict=True)])


def paired_difference(ours: np.ndarray, theirs: np.ndarray, *, level: float = 0.95) -> dict[str, float]:
    """Ours minus theirs, the mean over runs, with a percentile interval over test images.

    Args:
        ours, theirs: `areas` of the two methods under the same weightings.
        level: Coverage of the interval. It says nothing about other seeds: that is `spread`.

    Returns:
        `difference`, `low`, `high`; `spread`, the sample standard deviation of the difference over runs (0 for one run);
        `n_runs`.
    """
    gaps = ours - theirs
    points, resampled = gaps[:, 0], gaps[:, 1:].mean(axis=0)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    spread = float(np.std(points, ddof=1)) if len(points) > 1 else 0.0
    return {"difference": float(points.mean()), "low": float(low), "high": float(high), "spread": spread, "n_runs": len(points)}


def paired_rows(
    runs: Sequence[Mapping[str, Mapping[str, Scores]]], ours: str = "sdood", *, same_ood: bool = True, draws: int = DRAWS
) -> list[dict[str, Any]]:
    """One record for each OOD set and comparator: `ours` minus it.

    Args:
        runs: For each seed, by OOD set, by method, the scores (`read_scores`); none give no records.
        ours: Name of our method.
        same_ood: As in `weightings`.
        draws: Resamples.

    Raises:
        ValueError: Runs or methods whose sets differ in size.
    """
    rows: list[dict[str, Any]] = []
    for ood, methods in runs[0].items() if runs else ():
        weights = weightings([run[ood][ours] for run in runs], same_ood=same_ood, draws=draws)
        mine = areas([run[ood][ours] for run in runs], weights)
        for method in methods:
            if not method.startswith("sdood"):
                values = paired_difference(mine, areas([run[ood][method] for run in runs], weights))
                rows.append({"ours": ours, "method": method, "ood": ood, **values})
    return rows


def add_pairs(result: Path, runs: Sequence[Mapping[str, Mapping[str, Scores]]], *, same_ood: bool = True) -> None:
    """Put the paired differences into a result that is written: they take minutes on large sets, and rows should not wait."""
    written = read_json(result)
    rows = written.pop("rows")  # last in the file
    write_json(result, {**written, "paired": paired_rows(runs, same_ood=same_ood), "rows": rows})
