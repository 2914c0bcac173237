"""Pseudo-labels as a file: one row an image, read back and checked against the images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..artifacts import read_csv, write_csv, write_text
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


def write_imglist(path: Path, images: ImageSet, labels: torch.Tensor) -> None:
    """Write `name label` lines, what OpenOOD reads; nothing where a name holds a blank, which an imglist cannot say."""
    if not any(any(letter.isspace() for letter in name) for name in images.names):
        write_text(path, "".join(f"{name} {label}\n" for name, label in zip(images.names, labels.tolist(), strict=True)))


def example_rows(labels: PseudoLabels, count: int = 8, clusters: int = 20) -> dict[str, torch.Tensor]:
    """Which images show a cluster: int64 rows of the most and of the least confident ones of each, most confident first.

    Returns:
        `c-most` and `c-least` for each cluster c below `clusters`.
    """
    order = labels.confidence.argsort(descending=True, stable=True)
    found = {}
    for cluster in range(min(labels.classes, clusters)):
        rows = order[labels.labels[order] == cluster]
        found[f"{cluster}-most"], found[f"{cluster}-least"] = rows[:count], rows[-count:]
    return found


def read_labels(path: Path, images: ImageSet) -> PseudoLabels:
    """Labels from a file, one for every image.

    Args:
        path: A CSV with a `label` column and a `path` or `index` column (`confidence` may be there), an imglist (.txt) of
            `path label` lines, or an .npy of integers (N,) in the order of the images.
        images: The images they are for.

    Raises:
        RunError: Labels are missing, doubled, unknown or no integers, or they are not 0 .. C - 1.
    """
    if path.suffix == ".npy":
        labels = _read_npy(path, len(images))
        return PseudoLabels(labels, torch.ones(len(images)), check_labels(labels, str(path)))
    rows = _read_imglist(path) if path.suffix == ".txt" else read_csv(path)
    columns = set(rows[0]) if rows else set()
    if "label" not in columns or not columns & {"path", "index"}:
        raise RunError(f"labels {path}", f"columns {sorted(columns)}", "`label` and `path` or `index`", "add a header line")
    found = _by_image(rows, images, path, "path" if "path" in columns else "index")
    try:
        labels = torch.tensor([int(row["label"]) for row in found], dtype=torch.int64)
        confidence = torch.tensor([float(row.get("confidence") or 1.0) for row in found])
    except (TypeError, ValueError) as error:  # None where a row is short
        raise RunError(f"labels {path}", error, "integer labels", "mend that row") from error
    return PseudoLabels(labels, confidence, check_labels(labels, str(path)))


def _by_image(rows: list[dict[str, str]], images: ImageSet, path: Path, column: str) -> list[dict[str, str]]:
    """The rows in the order of the images."""
    names = images.names if column == "path" else [str(i) for i in range(len(images))]
    found: dict[str, dict[str, str]] = {}
    first = 1 if path.suffix == ".txt" else 2
    for number, row in enumerate(rows, first):
        name = row[column]
        if name in found:
            raise RunError(f"labels {path} line {number}", repr(name), "each image once", "remove the second row")
        found[name] = row
    absent = [name for name in names if name not in found]
    if absent or len(found) != len(names):
        what = f"no row for {absent[0]!r}" if absent else f"{len(found) - len(names)} rows for images that are not there"
        raise RunError(
            f"labels {path}", what, f"one row for each of {len(names)} images", "make the labels from the same image list"
        )
    return [found[name] for name in names]


def _read_imglist(path: Path) -> list[dict[str, str]]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError as error:
        raise RunError(f"labels {path}", "nothing there", "an imglist", "check the path") from error
    except ValueError as error:
        raise RunError(f"labels {path}", error, "a text file of `path label` lines", "give an imglist") from error
    parts = [line.strip().rpartition(" ") for line in lines if line.strip()]
    return [{"path": name, "label": label} for name, _, label in parts]


def _read_npy(path: Path, count: int) -> torch.Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise RunError(f"labels {path}", "nothing there", "an .npy file", "check the path") from error
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"labels {path}", error, "a whole .npy of integers", "save it again with np.save") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.shape != (count,):
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an .npz"
        raise RunError(f"labels {path}", what, f"integers ({count},)", "save one label an image, in the images' order")
    return torch.from_numpy(array.astype(np.int64))


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
            "class folders, an imglist with labels or a file of labels",
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
