"""Figures of the pseudo-labels, drawn from a run folder's files alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..artifacts import read_csv, read_tensors

COLOUR = "#2b6cb0"
LOSSES = {
    "SimCLR": "clustering/simclr.csv",
    "SCAN heads": "clustering/scan.csv",
    "SCAN, backbone": "clustering/scan-backbone.csv",
    "self-labelling": "clustering/self-label.csv",
}


def label_figure(folder: Path) -> Figure | None:
    """Cluster sizes and the confidence of the pseudo-labels."""
    path = folder / "labels.csv"
    if not path.exists():
        return None
    rows = read_csv(path)
    labels, confidence = np.array([int(row["label"]) for row in rows]), np.array([float(row["confidence"]) for row in rows])
    figure = Figure(figsize=(6.5, 2.2))
    left, right = figure.subplots(1, 2)
    left.bar(np.arange(labels.max() + 1), np.bincount(labels), color=COLOUR)
    left.set(xlabel="pseudo-label", ylabel="images")
    right.hist(confidence, bins=40, range=(0, 1), color=COLOUR)
    right.set(xlabel="confidence", ylabel="images")
    figure.tight_layout()
    return figure


def cluster_grid(folder: Path) -> Figure | None:
    """A row a cluster: its most confident images on the left, its least confident on the right."""
    path = folder / "clustering" / "examples.safetensors"
    if not path.exists():
        return None
    data = read_tensors(path)
    clusters = sorted({int(name.partition("-")[0]) for name in data})
    blocks = {side: [_strip(data[f"{cluster}-{side}"].numpy()) for cluster in clusters] for side in ("most", "least")}
    figure = Figure(figsize=(7, 0.4 * len(clusters) + 0.5))
    for axes, (side, strips) in zip(figure.subplots(1, 2), blocks.items(), strict=True):
        width = max(strip.shape[1] for strip in strips)
        padded = [np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255) for strip in strips]
        axes.imshow(np.concatenate(padded), interpolation="nearest")
        height = strips[0].shape[0]
        axes.set(title=f"{side} confident", xticks=[], yticks=[(i + 0.5) * height for i in range(len(clusters))])
        axes.set_yticklabels(clusters)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.tight_layout()
    return figure


def _strip(images: np.ndarray) -> np.ndarray:
    """uint8 (n, 3, H, W), n > 0, side by side as (H, n W, 3)."""
    return np.concatenate(list(images.transpose(0, 2, 3, 1)), axis=1)
