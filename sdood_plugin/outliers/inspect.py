"""The quality report of an outlier set on disk, and the images its grids show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..config import InspectionConfig, SelectionConfig
from ..data.images import ImageSet, spread
from ..errors import RunError
from .dataset import OutlierSet
from .fidelity import Features, distances
from .quality import grouped, set_quality
from .select import read_verdicts

GRID_ROWS, GRID_COLUMNS = 12, 12


def check_sources(made: OutlierSet, train: ImageSet) -> None:
    """Make sure that a set's sources are these images.

    Raises:
        RunError: Their size is another, a source index or its name in the manifest is not theirs, or their pixels are others.
    """
    where, remedy = f"training images for {made.folder}", "give the images the set was made from, with the run's own --config"
    size, side = made.meta["image_size"], train.images.shape[-1]
    if size != side:
        raise RunError(where, f"{side} px", f"{size} px, as in meta.json", remedy)
    for row in made.manifest:
        index = int(row["source_index"])
        if index >= len(train) or train.names[index] != row["source"]:
            raise RunError(
                where,
                f"{train.names[index]!r} at position {index}" if index < len(train) else f"{len(train)} images",
                f"{row['source']!r} at position {index}, as in the manifest",
                remedy,
            )
    if train.fingerprint() != made.meta["sources_sha256"]:
        raise RunError(where, "other pixels or names", "those of `sources_sha256` in meta.json", remedy)


def report_set(
    made: OutlierSet, train: ImageSet, features: Features, selection: SelectionConfig, inspection: InspectionConfig
) -> dict[str, Any]:
    """All figures of a set: `quality.set_quality` and `fidelity.distances` to the training images.

    Raises:
        RunError: The set was made of other images, or without a reference classifier.
    """
    check_sources(made, train)
    settings = {name: _column(made, name) for name in ("target", "start_fraction", "guidance_weight")}
    verdicts = read_verdicts(made.manifest, made.folder)
    fidelity = distances(features.of(made.images), features.of(train.images), features.name, inspection)
    if features.instead_of:
        fidelity["instead_of"] = features.instead_of
    return {**set_quality(made.images, made.sources, train.images, verdicts, settings, selection), "fidelity": fidelity}


def _column(made: OutlierSet, name: str) -> list[str]:
    return [row[name] for row in made.manifest]


def grids(made: OutlierSet) -> dict[str, dict[str, Any]]:
    """Which outliers to show beside each other: by class pair, by S and by w.

    Returns:
        For each of `class-pair`, `start_fraction` and `guidance_weight` the names of its `rows` and `columns` and
        `index`, for each row the set's positions, -1 where there is no such outlier; `note` says which classes are left
        out where there are too many. A class pair is (source's label, class guidance pointed to), or the class seen by
        the reference classifier where guidance points to none.
    """
    targets, seen = _column(made, "target"), [row.get("predicted_after", "") for row in made.manifest]
    aimed = all(targets)
    pairs = list(zip(_column(made, "source_label"), targets if aimed else seen, strict=True))
    found = {"class-pair": _table(pairs, "towards " if aimed else "seen as ")}
    for name in ("start_fraction", "guidance_weight"):
        found[name] = _strips(
            grouped([float(value) for value in _column(made, name)]), "S = " if name == "start_fraction" else "w = "
        )
    return found


def _table(pairs: Sequence[tuple[str, str]], prefix: str) -> dict[str, Any]:
    """The first outlier of every class pair."""
    first: dict[tuple[str, str], int] = {}
    for position, pair in enumerate(pairs):
        first.setdefault(pair, position)
    whole = [sorted({pair[i] for pair in first}, key=lambda name: (len(name), name)) for i in (0, 1)]
    rows, columns = whole[0][:GRID_ROWS], whole[1][:GRID_COLUMNS]
    cut = [
        f"{len(shown)} of {len(names)} {what}"
        for shown, names, what in zip(
            (rows, columns),
            whole,
            ("source classes", "target classes" if prefix.startswith("towards") else "classes seen"),
            strict=True,
        )
        if len(shown) < len(names)
    ]
    return {
        "note": ", ".join(cut),
        "rows": [f"of {row}" for row in rows],
        "columns": [f"{prefix}{column}" for column in columns] if any(columns) else ["any"],
        "index": [[first.get((row, column), -1) for column in columns] for row in rows],
    }


def _strips(names: Sequence[str], prefix: str) -> dict[str, Any]:
    """A row for every group, its outliers spread over the set."""
    rows = sorted(set(names), key=lambda name: float(name.split(" ")[0]))
    members = [torch.tensor([i for i, name in enumerate(names) if name == row]) for row in rows]
    chosen = [part[spread(len(part), min(GRID_COLUMNS, len(part)))].tolist() for part in members]
    width = max(map(len, chosen))
    return {
        "rows": [f"{prefix}{row}" for row in rows],
        "columns": [""] * width,
        "index": [part + [-1] * (width - len(part)) for part in chosen],
    }
