"""A run folder with its configuration, its images and its splits: what every stage is given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .clustering.labels import PseudoLabels, read_labels
from .config import DetectorConfig, RunConfig
from .data.images import ImageSet
from .data.sources import load_images
from .errors import RunError
from .randomness import derive_seed
from .training import Job, make_accelerator, resolve_precision


@dataclass
class Context:
    """A run folder with its configuration and, loaded when first needed, its images."""

    config: RunConfig
    folder: Path

    @cached_property
    def accelerator(self) -> Any:
        """Device, precision and processes."""
        return make_accelerator(self.config)

    @property
    def precision(self) -> str:
        """`float32` or `bf16`: what `auto` is on this device."""
        return resolve_precision(self.config.precision, self.accelerator.device.type == "cuda")

    @cached_property
    def _split(self) -> tuple[ImageSet, ImageSet | None]:
        """Training images and ID test images; without a test set a fifth of the training images becomes one."""
        data, seed = self.config.data, self.config.seed
        train = load_images(data.train, data, seed)
        if data.test is not None:
            return train, self._checked(load_images(data.test, data, seed), "data.test", train)
        if not data.ood:
            return train, None
        if len(train) < 10:
            raise RunError(
                "training images", len(train), "10 or more, a fifth of them for testing", "give more images or data.test"
            )
        test = train.part(0.2, torch.Generator().manual_seed(derive_seed(seed, "test-split")))
        return train.subset((~test).nonzero()[:, 0]), train.subset(test.nonzero()[:, 0])

    @staticmethod
    def _checked(images: ImageSet, name: str, train: ImageSet) -> ImageSet:
        if images.images.shape[1:] != train.images.shape[1:]:
            raise RunError(
                f"images of {name}",
                f"{images.images.shape[3]} x {images.images.shape[2]}",
                f"{train.images.shape[3]} x {train.images.shape[2]} like the training images",
                "give --data.image_size",
            )
        return images

    @property
    def train(self) -> ImageSet:
        """The unlabelled in-distribution images; their true labels, if any, serve the report only."""
        return self._split[0]

    @property
    def test(self) -> ImageSet | None:
        """The in-distribution test images; None when there is no OOD set to test against."""
        return self._split[1]

    @cached_property
    def ood(self) -> dict[str, ImageSet]:
        """The OOD test sets by name."""
        data = self.config.data
        return {
            ood.name: self._checked(load_images(ood.images, data, self.config.seed), f"data.ood {ood.name}", self.train)
            for ood in data.ood
        }

    @cached_property
    def heldout(self) -> torch.Tensor:
        """bool (N,): images kept from the diffusion model's and the networks' training, for alpha and the threshold."""
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "heldout"))
        mask = self.train.part(self.config.data.heldout_fraction, generator)
        if int((~mask).sum()) < 2:
            raise RunError("training images", len(self.train), "4 or more", "give more images")
        return mask

    @cached_property
    def train_fingerprint(self) -> str:
        """Hash of the training images."""
        return self.train.fingerprint()

    @cached_property
    def test_fingerprint(self) -> list[str]:
        """Hashes of all test images."""
        return [*([self.test.fingerprint()] if self.test else []), *(images.fingerprint() for images in self.ood.values())]

    @cached_property
    def labels(self) -> PseudoLabels:
        """The pseudo-labels of labels.csv."""
        return self.with_enough_images(read_labels(self.folder / "labels.csv", self.train))

    def with_enough_images(self, labels: PseudoLabels) -> PseudoLabels:
        """The labels, after making sure that no class has fewer images than the k whose distances are summed.

        Raises:
            RunError: A class with fewer images that are not held out than scoring.k_distance.
        """
        k = self.config.scoring.k_distance
        sizes = torch.bincount(labels.labels[~self.heldout], minlength=labels.classes).tolist()
        small = [(name, size) for name, size in enumerate(sizes) if size < k]
        if small:
            name, size = small[0]
            raise RunError(
                f"class {name}",
                f"{size} image{'' if size == 1 else 's'} not held out ({len(small)} classes of {labels.classes} so small)",
                f"scoring.k_distance = {k} or more",
                "lower --clustering.clusters or --scoring.k_distance, or give more images of it",
            )
        return labels

    @property
    def clustered_weights(self) -> str | None:
        """What the clustering ended with, where its backbone is the detector's: a file or `hub`; None where it has none."""
        clustering = self.config.clustering
        if clustering.method == "given" or clustering.backbone != self.config.detector.backbone:
            return None
        if clustering.leaves_backbone:
            return str(self.folder / "clustering" / "backbone.safetensors")
        return clustering.weights

    @property
    def detector(self) -> DetectorConfig:
        """The detector's settings, with the weights that null stands for."""
        own = self.config.detector
        return own if own.weights is not None else dataclasses.replace(own, weights=self.clustered_weights)

    def seed(self, stage: str) -> int:
        """The seed of one stage."""
        return derive_seed(self.config.seed, stage)

    def job(self, folder: Path, key: str, stage: str) -> Job:
        """What a training of a stage is given."""
        return Job(self.accelerator, folder, self.seed(stage), key, self.config.checkpoint_seconds)

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process
