"""Which outliers are used, and what they are measured with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .check import require, require_positive, require_types

Kind = Literal["stay", "flip", "ambiguous"]
KINDS: tuple[Kind, ...] = ("stay", "flip", "ambiguous")


@dataclass(frozen=True)
class SelectionConfig:
    """Which outliers the detector is trained on, by what the manifest says of each; `sdood select` takes the same settings.

    Args:
        keep: Kinds to keep: `stay` (the reference classifier still says the source's class), `flip` (it is confident of
            another class), `ambiguous` (neither).
        flip_confidence: Above this confidence another class is a flip.
        duplicate_distance: Drop outliers nearer than this to a training image (root mean square pixel difference, images
            in [-1, 1]; 0.02 is two and a half grey levels); null keeps them.
    """

    keep: list[Kind] = field(default_factory=lambda: list(KINDS))
    flip_confidence: float = 0.9
    duplicate_distance: float | None = None

    def __post_init__(self) -> None:
        require_types("selection.{}", self)
        require(
            bool(self.keep) and len(set(self.keep)) == len(self.keep),
            "selection.keep",
            self.keep,
            f"one or more of {', '.join(KINDS)}, each once",
        )
        require(0 <= self.flip_confidence < 1, "selection.flip_confidence", self.flip_confidence, "0 or more and below 1")
        require(
            self.duplicate_distance is None or 0 < self.duplicate_distance < math.inf,
            "selection.duplicate_distance",
            self.duplicate_distance,
            "above 0, or null to keep duplicates",
        )

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever dropped."""
        return set(self.keep) == set(KINDS) and self.duplicate_distance is None


@dataclass(frozen=True)
class InspectionConfig:
    """The features the outlier set's distances to the training images are taken of.

    Args:
        features: `reference` (the run's network trained by cross-entropy), `inception` (FID and KID proper), `pixels`
            (averaged down to 8 x 8), or the name of a timm model.
        weights: The features' weights: torch-fidelity's .pth for `inception`, which downloads it where this is null; a
            safetensors file for a timm model.
        kernel_subsets: Subsets the kernel distance is averaged over (torch-fidelity's own default is 100).
        kernel_subset_size: Images in each, at most.
        neighbours: k of precision and recall.
    """

    features: str = "reference"
    weights: str | None = None
    kernel_subsets: int = 100
    kernel_subset_size: int = 1000
    neighbours: int = 3

    def __post_init__(self) -> None:
        require_types("inspection.{}", self)
        require(bool(self.features), "inspection.features", repr(self.features), "reference, inception, pixels or a timm model")
        require_positive("inspection", self, "kernel_subsets", "kernel_subset_size", "neighbours")
        ours = self.features in ("reference", "pixels")
        require(
            not (ours and self.weights is not None),
            "inspection.weights",
            self.weights,
            f"null: {self.features} needs none",
            "name inspection.features `inception` or a timm model",
        )
        require(
            self.features in ("reference", "pixels", "inception") or self.weights is not None,
            "inspection.weights",
            None,
            f"a safetensors file for {self.features}: distances of random features say nothing",
            "give --inspection.weights",
        )
