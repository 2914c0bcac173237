"""What is found out about each outlier when it is made: distances in pixels and a reference classifier's verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..data.images import to_unit
from ..neighbours import Bank
from .quality import pixel_distance, small

Judge = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # uint8 images -> features (B, D), probabilities (B, C)
VERDICTS = (
    "own_confidence_before",
    "own_confidence_after",
    "predicted_after",
    "confidence_after",
    "distance_to_source",
    "nearest_train_index",
    "nearest_train_distance",
)


class Referee:
    """Compares outliers with their sources and with all training images, and asks a judge about them.

    Args:
        train: uint8 (N, 3, H, W), the images the outliers are made of.
        judge: A classifier trained on in-distribution training images only; without one its columns stay empty.
        device: Where distances are computed.
    """

    def __init__(self, train: torch.Tensor, judge: Judge | None, device: torch.device) -> None:
        self._train, self._judge, self._device = train, judge, device
        self._bank = Bank(torch.cat([small(part.to(device)) for part in train.split(4096)]))

    def __call__(self, made: torch.Tensor, sources: torch.Tensor, labels: torch.Tensor) -> Mapping[str, list[str]]:
        """Columns of the manifest, numbers as text.

        `own_confidence_before` and `_after` are P(pseudo-label | source) and P(pseudo-label | outlier); `predicted_after`
        and `confidence_after` the class seen in the outlier and its probability. Distances are root mean square
        differences of pixels, images in [-1, 1]; the nearest training image is the nearest among all images averaged
        down to 16 px at most, the distance to it that of whole images.

        Args:
            made: uint8 (B, 3, H, W) outliers.
            sources: int64 (B,), their sources among the training images.
            labels: int64 (B,), their sources' pseudo-labels.
        """
        made, own = made.to(self._device), self._train[sources].to(self._device)
        index = self._bank.nearest(small(made), 1)[1][:, 0].cpu()
        near = self._train[index].to(self._device)
        columns: dict[str, list[str]] = {name: [""] * len(made) for name in VERDICTS}
        columns["distance_to_source"] = _text(pixel_distance(to_unit(made), to_unit(own)))
        columns["nearest_train_index"] = [str(position) for position in index.tolist()]
        columns["nearest_train_distance"] = _text(pixel_distance(to_unit(made), to_unit(near)))
        if self._judge is not None:
            rows = torch.arange(len(made))
            before, after = (self._judge(images)[1].float().cpu() for images in (own, made))
            confidence, seen = after.max(dim=1)
            columns["own_confidence_before"] = _text(before[rows, labels])
            columns["own_confidence_after"] = _text(after[rows, labels])
            columns["predicted_after"] = [str(name) for name in seen.tolist()]
            columns["confidence_after"] = _text(confidence)
        return columns


def _text(values: torch.Tensor) -> list[str]:
    return [f"{value:.6f}" for value in values.tolist()]
