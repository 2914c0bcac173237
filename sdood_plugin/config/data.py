"""The images of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .check import require, require_types

Group = Literal["near", "far"]


@dataclass(frozen=True)
class ImagesConfig:
    """Where a set of images is.

    Args:
        path: A folder of images (one subfolder a class if there are subfolders), an OpenOOD imglist (.txt), a folder
            of CIFAR-10 / CIFAR-100 python batches, an .npz with `images` uint8 (N, H, W, 3) and optionally `labels`,
            or `demo`, the embedded data (a folder of that name is `./demo`).
        root: Folder the paths of an imglist are relative to.
        split: Which part of CIFAR batches or of the embedded data (`train`, `test`, `near`, `fields`, `noise`).
        limit: Use this many images at most, spread evenly over the set.
    """

    path: str
    root: str | None = None
    split: Literal["train", "test", "near", "fields", "noise"] = "train"
    limit: int | None = None

    def __post_init__(self) -> None:
        require_types("{} of an image set", self)
        require(bool(self.path), "path of an image set", repr(self.path), "a folder, an imglist, CIFAR batches or an .npz")
        require(self.limit is None or self.limit > 0, "limit of an image set", self.limit, "a number above 0, or null for all")


@dataclass(frozen=True)
class OODConfig:
    """One out-of-distribution test set.

    Args:
        name: Its name in tables.
        group: `near` (shares the look of ID) or `far`.
        images: Where it is.
    """

    name: str
    group: Group
    images: ImagesConfig

    def __post_init__(self) -> None:
        require_types("{} in data.ood", self)
        require(
            self.name != "id" and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", self.name) is not None,
            "name in data.ood",
            repr(self.name),
            "letters, digits and . _ + -, not `id`: it names files",
        )


@dataclass(frozen=True)
class DataConfig:
    """The images of a run.

    Args:
        train: Unlabelled in-distribution images.
        test: In-distribution test images; null holds a fifth of `train` out for testing when there are OOD sets.
        ood: OOD test sets; they are only ever scored. A later configuration's replace an earlier one's, all together.
        image_size: Side in pixels all images are resized and centre-cropped to; null keeps the images' own size,
            which must then be one and the same.
        heldout_fraction: Share of `train` kept from the diffusion model's and the detector's training, for alpha and the
            threshold; the clustering sees all of `train`.
        demo_rho: Embedded data only: how strongly background colour goes with class (0 independent, 1 always).
        demo_renders: Embedded data only: pictures drawn from each scan.
        demo_left_out: Embedded data only: this ID digit (0 to 5) becomes the near OOD set and no test scan is used, for
            choosing settings.
    """

    train: ImagesConfig = ImagesConfig("demo")
    test: ImagesConfig | None = None
    ood: tuple[OODConfig, ...] = ()  # the command line would fill up the items of a list from those of an earlier one
    image_size: int | None = 32
    heldout_fraction: float = 0.1
    demo_rho: float = 0.95
    demo_renders: int = 4
    demo_left_out: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.ood, list):
            object.__setattr__(self, "ood", tuple(self.ood))
        require_types("data.{}", self)
        require(self.image_size is None or 8 <= self.image_size <= 1024, "data.image_size", self.image_size, "8 to 1024, or null")
        require(0 < self.heldout_fraction < 1, "data.heldout_fraction", self.heldout_fraction, "a fraction above 0 and below 1")
        require(0 <= self.demo_rho <= 1, "data.demo_rho", self.demo_rho, "0 to 1")
        require(self.demo_renders > 0, "data.demo_renders", self.demo_renders, "a number above 0")
        require(
            self.demo_left_out is None or 0 <= self.demo_left_out <= 5,
            "data.demo_left_out",
            self.demo_left_out,
            "0 to 5, or null",
        )
        names = [ood.name for ood in self.ood]
        require(len(set(names)) == len(names), "names in data.ood", names, "a different name for each set")
