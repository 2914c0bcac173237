"""Pseudo-labels as a file: one row an image, read back and checked against the images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from ..artifacts import read_csv, write_csv
from ..data.images import ImageSet
from ..errors import RunError, UsageError


class PseudoLabels(NamedTuple):
    """What the clustering stage hands on.

    `labels` int64 (N,) in 0 .. C - 1; `confidence` float (N,) in [0, 1]; `classes` is C.
    """

    labels: torch.Tensor
    confidence: torch.Tensor
    classes: int


def write_labels(path: Path, images: ImageSet, labels: torch.Tensor, confidence: torch.Tensor) -> None:
    """Write labels.csv: index, path, label, confidence."""
    rows = zip(range(len(images)), images.names, labels.tolist(), (f"{value:.4f}" for value in confidence.tolist()), strict=True)
    write_csv(path, ("index", "path", "label", "confidence"), rows)


def read_labels(path: Path, images: ImageSet) -> PseudoLabels:
    """Labels from a CSV with a `label` column and a `path` or `index` column, one row for every image.

    Raises:
        RunError: Rows are missing, doubled, unknown or no integers, or the labels are not 0 .. C - 1.
    """
    rows = read_csv(path)
    columns = set(rows[0]) if rows else set()
    if "label" not in columns or not columns & {"path", "index"}:
        raise RunError(f"labels {path}", f"columns {sorted(columns)}", "`label` and `path` or `index`", "add a header line")
    by_path = "path" in columns
    names = images.names if by_path else [str(i) for i in range(len(images))]
    found: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, 2):
        name = row["path" if by_path else "index"]
        if name in found:
            raise RunError(f"labels {path} line {number}", repr(name), "each image once", "remove the second row")
        found[name] = row
    absent = [name for name in names if name not in found]
    if absent or len(found) != len(names):
        what = f"no row for {absent[0]!r}" if absent else f"{len(found) - len(names)} rows for images that are not there"
        raise RunError(
            f"labels {path}", what, f"one row for each of {len(names)} images", "make the labels from the same image list"
        )
    try:
        labels = torch.tensor([int(found[name]["label"]) for name in names], dtype=torch.int64)
        confidence = torch.tensor([float(found[name].get("confidence") or 1.0) for name in names])
    except (TypeError, ValueError) as error:  # None where a row is short
        raise RunError(f"labels {path}", error, "integer labels", "mend that row") from error
    return PseudoLabels(labels, confidence, check_labels(labels, str(path)))


def given_labels(images: ImageSet, path: str | None) -> PseudoLabels:
    """Labels from elsewhere: a CSV, or the image set's own.

    Raises:
        UsageError: There are none.
    """
    if path is not None:
        return read_labels(Path(path), images)
    if images.labels is None:
        raise UsageError(
            "clustering.method",
            "given, but the images carry no labels",
            "class folders, an imglist with labels or a CSV",
            "give --clustering.labels FILE or use --clustering.method scan",
        )
    return PseudoLabels(images.labels, torch.ones(len(images)), check_labels(images.labels, "the image set"))


def check_labels(labels: torch.Tensor, where: str, classes: int | None = None) -> int:
    """C, after making sure that every class of 0 .. C - 1 has an image.

    Raises:
        RunError: Negative labels, fewer than two classes, or a class without images.
    """
    low, high = int(labels.min()), int(labels.max())
    if classes is None and high >= len(labels):
        raise RunError(
            f"labels of {where}", f"label {high} for {len(labels)} images", "0 to C - 1 without gaps", "number the classes from 0"
        )
    classes = high + 1 if classes is None else classes
    if low < 0 or high >= classes:
        raise RunError(
            f"labels of {where}", f"labels {low} to {high}", f"0 to {classes - 1}", "every training image needs a class"
        )
    if classes < 2:
        raise RunError(
            f"labels of {where}",
            "one class",
            "2 classes or more: a wrong class must exist",
            "use --clustering.method scan with --clustering.clusters of 2 or more",
        )
    empty = (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist()
    if empty:
        raise RunError(
            f"labels of {where}",
            f"no image of class {empty[0]} ({len(empty)} classes of {classes} are empty)",
            "images in every class",
            "lower --clustering.clusters or give more images",
        )
    return classes
