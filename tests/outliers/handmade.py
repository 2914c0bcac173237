"""An outlier set whose manifest says what a test wants it to say."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch

from sdood_plugin.artifacts import value_hash
from sdood_plugin.config import DiffusionConfig, OutliersConfig
from sdood_plugin.data.images import ImageSet
from sdood_plugin.outliers.files import encode
from sdood_plugin.outliers.manifest import COLUMNS, write_lists
from sdood_plugin.outliers.writer import make_folders, store


def write_set(folder: Path, images: torch.Tensor, sources: ImageSet | None = None, **columns) -> Path:
    """Write uint8 (N, 3, H, W) images as a set; columns not given are those of a copy each of N sources of class 0."""
    count = len(images)
    filled = {
        "source_index": list(range(count)),
        "copy": [0] * count,
        "source_label": [0] * count,
        "mode": ["other"] * count,
        "target": [1] * count,
        "guidance_weight": [2] * count,
        "start_fraction": [0.2] * count,
        "predicted_after": [0] * count,
        "confidence_after": [0.95] * count,
        "nearest_train_distance": [0.1] * count,
        **columns,
    }
    filled.setdefault("source", [f"{index}.png" for index in filled["source_index"]])
    names = [f"images/{row // 4:04d}/{row:07d}_0.png" for row in range(count)]
    data = [encode(image, "png") for image in images]
    make_folders(folder, names)
    for name, content in zip(names, data, strict=True):
        store(folder, name, content)
    filled |= {"file": names, "sha256": [hashlib.sha256(content).hexdigest() for content in data]}
    rows = [[filled[name][row] if name in filled else "" for name in COLUMNS] for row in range(count)]
    meta = {
        "key": value_hash(filled),
        "classes": 3,
        "seed": 0,
        "image_size": images.shape[-1],
        "config": dataclasses.asdict(OutliersConfig(mode=filled["mode"][0])),
        "diffusion": dataclasses.asdict(DiffusionConfig()),
        "unet_sha256": "no U-Net",
        "reference_sha256": "a reference",
        "sources_sha256": "" if sources is None else sources.fingerprint(),
        "labels_sha256": "",
        "versions": {"sdood_plugin": "0"},
    }
    write_lists(folder, rows, COLUMNS, meta)
    return folder
