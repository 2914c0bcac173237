"""A set of images in memory, and the one place where pixels change range."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..artifacts import atomic_path


@dataclass(frozen=True)
class ImageSet:
    """Images of one size with their names and, where known, labels.

    Attributes:
        images: uint8 (N, 3, H, W) RGB.
        names: N paths or names, unique.
        labels: int64 (N,) true labels, -1 where unknown; None when there are none.
        classes: Class names by label, may be empty.
        notes: What was converted on the way in, one line each.
        origins: int64 (N,): pictures of one scan share a number and are held out together; None where each is its own.
    """

    images: torch.Tensor
    names: list[str]
    labels: torch.Tensor | None = None
    classes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    origins: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index: torch.Tensor) -> ImageSet:
        """The images at int64 positions `index`, in that order."""
        labels, origins = (None if values is None else values[index] for values in (self.labels, self.origins))
        return ImageSet(self.images[index], [self.names[i] for i in index.tolist()], labels, self.classes, self.notes, origins)

    def part(self, fraction: float, generator: torch.Generator) -> torch.Tensor:
        """bool (N,): a random share of the images, at least two; pictures of one origin are in it together or not at all."""
        origins = torch.arange(len(self)) if self.origins is None else self.origins
        known, which, sizes = origins.unique(return_inverse=True, return_counts=True)
        order = torch.randperm(len(known), generator=generator)
        wanted = max(2, round(fraction * len(self)))
        before = sizes[order].cumsum(0) - sizes[order]
        chosen = torch.zeros(len(known), dtype=torch.bool)
        chosen[order[before < wanted]] = True
        return chosen[which]

    def limited(self, count: int | None) -> ImageSet:
        """At most `count` images, spread evenly over the set."""
        return self if count is None or count >= len(self) else self.subset(spread(len(self), count))

    def fingerprint(self) -> str:
        """SHA-256 of pixels and names, what caches are keyed by; labels are left out on purpose."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        digest.update("\0".join(self.names).encode())
        return digest.hexdigest()


def spread(total: int, count: int) -> torch.Tensor:
    """int64 positions of `count` items spread evenly over `total`."""
    return torch.arange(count) * total // count


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] to float32 [-1, 1], same shape."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float [-1, 1] to uint8 [0, 255], same shape, clipped and rounded to nearest."""
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def save_png(path: Path, image: torch.Tensor) -> None:
    """Write one uint8 (3, H, W) image, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())).save(temporary, format="PNG")
