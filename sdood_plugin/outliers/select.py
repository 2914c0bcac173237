"""Which outliers of a set to use, by what a classifier trained on in-distribution images alone says of each.

An outlier should show no class of the training set, so one that still shows its source's (`stay`) and one that shows
another class plainly (`flip`) are both suspect; `ambiguous` ones are neither. What helps the detector is a question
for a measurement (benchmarks/selection.py), so every kind can be kept or dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..config import KINDS, SelectionConfig
from ..errors import RunError


class Verdicts(NamedTuple):
    """What was found out about each of N outliers when they were made."""

    labels: torch.Tensor  # int64 (N,), the source's pseudo-label
    predicted: torch.Tensor  # int64 (N,), the class the reference classifier sees
    confidence: torch.Tensor  # float64 (N,), in [0, 1], of that class
    nearest: torch.Tensor  # float64 (N,), distance to the nearest training image


class Selection(NamedTuple):
    """Which of N outliers are kept, and how many are not, by the first reason that applies."""

    kept: torch.Tensor  # bool (N,)
    dropped: dict[str, int]


def read_verdicts(manifest: Iterable[dict[str, str]], folder: object) -> Verdicts:
    """The verdicts in a manifest's columns.

    Args:
        manifest: Rows by column name.
        folder: What an error is to name.

    Raises:
        RunError: The set was made without a reference classifier, or a value is no number.
    """
    names = ("source_label", "predicted_after", "confidence_after", "nearest_train_distance")
    try:
        rows = [[float(row[name]) for name in names] for row in manifest]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"manifest in {folder}",
            f"{type(error).__name__} {error}",
            f"numbers in the columns {', '.join(names)}",
            "generate the set again with a reference classifier",
        ) from error
    labels, predicted, confidence, nearest = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(names)).unbind(dim=1)
    return Verdicts(labels.long(), predicted.long(), confidence, nearest)


def kinds(verdicts: Verdicts, flip_confidence: float) -> torch.Tensor:
    """int64 (N,), positions in `KINDS`: stay 0, flip 1, ambiguous 2."""
    moved = verdicts.predicted != verdicts.labels
    sure = verdicts.confidence > flip_confidence
    return torch.where(moved, torch.where(sure, KINDS.index("flip"), KINDS.index("ambiguous")), KINDS.index("stay"))


def choose(verdicts: Verdicts, config: SelectionConfig) -> Selection:
    """Keep the kinds that `config` names and drop near duplicates of training images."""
    found = kinds(verdicts, config.flip_confidence)
    kept = torch.ones(len(found), dtype=torch.bool)
    dropped: dict[str, int] = {}
    for number, name in enumerate(KINDS):
        if name not in config.keep:
            dropped[name] = int((found == number).sum())
            kept &= found != number
    if config.duplicate_distance is not None:
        near = verdicts.nearest < config.duplicate_distance
        dropped["duplicate"] = int((near & kept).sum())
        kept &= ~near
    return Selection(kept, dropped)
