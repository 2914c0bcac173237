"""An outlier set on disk, read back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..artifacts import read_csv, read_json
from ..errors import RunError


def read_images(folder: Path, files: list[str]) -> torch.Tensor:
    """uint8 (N, 3, H, W) of RGB files below `folder`, all of one size.

    Raises:
        RunError: A file is absent, broken, of another size, or its path leaves the folder.
    """

    def read(file: str) -> np.ndarray:
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise RunError(f"file name in {folder}", repr(file), "a path inside the folder", "do not use this outlier set")
        try:
            with Image.open(folder / file) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise RunError(f"image {folder / file}", error, "a readable, whole PNG", "generate the outlier set again") from error

    if not files:
        raise RunError(f"folder {folder}", "no images", "an outlier set with images", "generate it again")
    with ThreadPoolExecutor() as pool:
        arrays = list(pool.map(read, files))
    odd = next((file for file, array in zip(files, arrays, strict=True) if array.shape != arrays[0].shape), None)
    if odd is not None:
        raise RunError(f"image {folder / odd}", "another size than the first image", "one size", "generate the outlier set again")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


class OutlierSet(Dataset):
    """The outliers of a folder written by `sdood generate`, in memory.

    An item is (image uint8 (3, H, W), source pseudo-label, source index). Whole columns are attributes.

    Attributes:
        images: uint8 (N, 3, H, W).
        labels: int64 (N,), each outlier's SOURCE pseudo-label.
        sources: int64 (N,), index of the source image.
        manifest: The manifest's rows, strings by column name.
        meta: The settings the set was made with.

    Raises:
        RunError: The folder is no finished outlier set, or manifest and images disagree.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta = read_json(self.folder / "meta.json")
        self.manifest = read_csv(self.folder / "manifest.csv")
        missing = [name for name in ("file", "source_label", "source_index") if self.manifest and name not in self.manifest[0]]
        if "count" not in self.meta or missing:
            raise RunError(
                f"outlier set {self.folder}",
                f"no {(missing or ['count'])[0]}",
                "meta.json and manifest.csv of `sdood generate`",
                "generate it again",
            )
        if len(self.manifest) != self.meta["count"]:
            raise RunError(
                f"manifest in {self.folder}",
                f"{len(self.manifest)} rows",
                f"{self.meta['count']} as in meta.json",
                "generate it again",
            )
        self.images = read_images(self.folder, [row["file"] for row in self.manifest])
        self.labels = torch.tensor([int(row["source_label"]) for row in self.manifest], dtype=torch.int64)
        self.sources = torch.tensor([int(row["source_index"]) for row in self.manifest], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        return self.images[index], int(self.labels[index]), int(self.sources[index])
