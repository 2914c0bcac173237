"""The embedded data: real handwritten digits (meaning) over smooth colour fields (nuisance), 16 x 16 RGB.

The scans are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits". ID are the digits 0 to 5,
near OOD the digits 6 to 9 over fields of the ID classes, far OOD fields without a digit and noise. As in photographs
meaning and background go together: a share rho of a class's images have fields around the class's own hue (the
spurious correlation of Ming, Yin & Li, AAAI 2022).
"""

from __future__ import annotations

import colorsys
import math

import torch
from torch.nn import functional as F

from ..randomness import derive_seed
from .images import ImageSet

SIZE, DIGIT, ID_CLASSES = 16, 12, 6
TEST_SHARE = 0.35
_HUE_SPREAD = 0.05


def draw(split: str, *, rho: float, renders: int, seed: int, left_out: int | None = None) -> ImageSet:
    """Draw one part of the embedded data.

    Args:
        split: `train` or `test` (digits 0 to 5, no scan in both), `near` (6 to 9), `fields` or `noise`.
        rho: Share of images whose field has the hue of the image's own class, in [0, 1].
        renders: Pictures drawn from each scan of `train` (one picture a scan elsewhere).
        seed: Root seed; the split of the scans does not depend on it.
        left_out: For choosing settings without the test scans: this ID digit becomes the near OOD set, and `train`,
            `test` and `near` are all drawn from scans of the original `train`.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "demo", split))
    inside = torch.tensor([digit for digit in range(ID_CLASSES) if digit != left_out])
    if split == "noise":
        images = torch.rand(500, 3, SIZE, SIZE, generator=generator)
        return _pack(images, split, None)
    if split == "fields":
        return _pack(_fields(inside[torch.randint(len(inside), (500,), generator=generator)], generator), split, None)
    scans, digits = _scans(split) if left_out is None else _scans_without(split, left_out)
    origins = None
    if split == "train":
        origins = torch.arange(len(digits)).repeat(renders)
        scans, digits = scans.repeat(renders, 1, 1), digits.repeat(renders)
    count = len(digits)
    elsewhere = inside[torch.randint(len(inside), (count,), generator=generator)]
    own = torch.rand(count, generator=generator) < rho
    hue_class = elsewhere if split == "near" else torch.where(own, digits, elsewhere)
    fields = _fields(hue_class, generator)
    ink = 0.75 + 0.25 * torch.rand(count, 3, 1, 1, generator=generator)
    mask = _place(scans, generator)
    labels = torch.searchsorted(inside, digits) if split in ("train", "test") else torch.full_like(digits, -1)
    classes = [str(digit) for digit in inside.tolist()] if split in ("train", "test") else []
    return _pack(fields * (1 - mask) + ink * mask, split, labels, classes, origins)


def _scans(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scans float32 (N, 8, 8) in [0, 1] and digits int64 (N,) of one split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans, labels = torch.tensor(digits.images, dtype=torch.float32) / 16.0, torch.tensor(digits.target)
    if split == "near":
        chosen = labels >= ID_CLASSES
    else:
        is_test = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < TEST_SHARE
        chosen = (labels < ID_CLASSES) & (is_test == (split == "test"))
    return scans[chosen], labels[chosen].long()


def _scans_without(split: str, left_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scans of `train` split once more: four fifths and a fifth of the other digits, and all of the left-out one."""
    scans, digits = _scans("train")
    is_test = torch.rand(len(digits), generator=torch.Generator().manual_seed(1)) < 0.2
    chosen = digits == left_out if split == "near" else (digits != left_out) & (is_test == (split == "test"))
    return scans[chosen], digits[chosen]


def _place(scans: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Ink masks float32 (N, 1, 16, 16) in [0, 1]: scans enlarged to 12 px at a random place."""
    large = F.interpolate(scans[:, None], size=(DIGIT, DIGIT), mode="bicubic", align_corners=False).clamp(0, 1)
    room = SIZE - DIGIT
    canvas = F.pad(large, (room, room, room, room))
    rows, columns = (torch.randint(room + 1, (len(scans), 1), generator=generator) + torch.arange(SIZE) for _ in range(2))
    picture = torch.arange(len(scans))[:, None, None]
    return canvas[picture, 0, rows[:, :, None], columns[:, None, :]][:, None]


def _fields(hue_class: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Smooth colour fields float32 (N, 3, 16, 16) in [0, 1] around the hue of each class."""
    count = len(hue_class)
    hue = hue_class / ID_CLASSES + _HUE_SPREAD * torch.randn(count, generator=generator)
    saturation, value = (low + 0.3 * torch.rand(count, generator=generator) for low in (0.5, 0.25))
    rows = zip((hue % 1).tolist(), saturation.tolist(), value.tolist(), strict=True)
    colour = torch.tensor([colorsys.hsv_to_rgb(*row) for row in rows])
    bumps = 0.12 * torch.randn(count, 3, 3, 3, generator=generator)
    smooth = F.interpolate(bumps, size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    return (colour[:, :, None, None] + smooth).clamp(0, 1)


def _pack(
    images: torch.Tensor,
    split: str,
    labels: torch.Tensor | None,
    classes: list[str] | None = None,
    origins: torch.Tensor | None = None,
) -> ImageSet:
    digits = max(4, math.ceil(math.log10(len(images) + 1)))
    names = [f"{split}/{i:0{digits}d}.png" for i in range(len(images))]
    return ImageSet((images * 255).round().to(torch.uint8), names, labels, classes or [], origins=origins)
