"""The outlier set as one of the host's data sets, and the transform the networks of a run expect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pytorch_ood.api import DatasetInfo, Role, Task
from torchvision.datasets import VisionDataset

from ...data.images import to_unit
from ...outliers.dataset import OutlierSet
from .loss import outlier_target
from .paper import PAPER


def network_input(image: Image.Image, size: int | None = None) -> torch.Tensor:
    """What a network of `sdood run` expects: float (3, H, W) in [-1, 1]; use it as `transform`.

    Args:
        image: Any PIL image; converted to RGB.
        size: Side in pixels to fit the image to, bicubically, as `data.image_size` does; None leaves it as it is.
    """
    rgb = image.convert("RGB")
    if size is not None and rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size), method=Image.Resampling.BICUBIC)
    return to_unit(torch.from_numpy(np.array(rgb)).permute(2, 0, 1))


class SDOutliers(VisionDataset):
    """The outliers of a folder written by `sdood generate` (RUN/outliers); items are (PIL image, -1) before transforms.

    Made for the host's losses that take outliers (OutlierExposureLoss, EnergyRegularizedLoss, ...), and for `SDOOD.fit`.
    """

    info = DatasetInfo(
        task=Task.CLASSIFICATION,
        roles={Role.AUXILIARY_OUTLIERS},
        paper=PAPER,
        license="that of the images the outliers were made of",
    )

    def __init__(
        self,
        folder: str | Path,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        source_labels: bool = False,
    ) -> None:
        """Read the whole set into memory.

        Args:
            folder: The outlier set.
            transform: Applied to the PIL image.
            target_transform: Applied to the target.
            source_labels: Give `outlier_target(pseudo-label of the source)` instead of -1.

        Raises:
            RunError: The folder is no finished outlier set, or manifest and images disagree.
        """
        super().__init__(str(folder), transform=transform, target_transform=target_transform)
        self.outliers = OutlierSet(folder)
        _ = self.outliers.images  # from here on in memory, and a damaged file is found now
        self.source_labels = source_labels

    def __len__(self) -> int:
        return len(self.outliers)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        pixels, label, _ = self.outliers[index]
        image: Any = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        target: Any = outlier_target(label) if self.source_labels else -1
        if self.transform is not None:
            image = self.transform(image)
        return image, target if self.target_transform is None else self.target_transform(target)
