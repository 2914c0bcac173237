"""What an outlier set is made of and how: everything its bytes depend on."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cached_property
from importlib import metadata
from typing import Any

import torch

from ..artifacts import value_hash
from ..config import DiffusionConfig, OutliersConfig, key_dict
from ..config.outliers import bounds
from ..data.images import ImageSet
from ..diffusion.guidance import wrong_classes
from .blocks import Block, blocks, file_name, guidance_weights, identities

_PACKAGES = ("sdood_plugin", "torch", "diffusers", "Pillow")  # what rounds, and what encodes


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an outlier set is made of and how.

    Attributes:
        sources: Source images; they are the training images too.
        labels: int64 (N,) their pseudo-labels.
        classes: C.
        config: What to make of them.
        diffusion: The diffusion model's settings.
        seed: Seed of the outlier set.
        unet_sha256: Hash of the diffusion model's weights.
        reference_sha256: Hash of the reference classifier's weights; empty without one.
        heldout: bool (N,): sources that diffusion model and reference classifier were not trained on; None if unknown.
        precision: What the U-Net computes in, `float32` or `bf16`.
        origin: What else meta.json tells of labels, models and images; no outlier depends on it but through the above.
    """

    sources: ImageSet
    labels: torch.Tensor
    classes: int
    config: OutliersConfig
    diffusion: DiffusionConfig
    seed: int
    unet_sha256: str
    reference_sha256: str = ""
    heldout: torch.Tensor | None = None
    precision: str = "float32"
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What meta.json says, `key` first: the hash of all that the images depend on."""
        config = {name: value for name, value in dataclasses.asdict(self.config).items() if name != "controls"}
        images = {
            "classes": self.classes,
            "seed": self.seed,
            "image_size": self.sources.images.shape[-1],
            "config": config,
            "diffusion": key_dict(self.diffusion),
            "unet_sha256": self.unet_sha256,
            "sources_sha256": self.sources.fingerprint(),
            "labels_sha256": hashlib.sha256(self.labels.contiguous().numpy().tobytes()).hexdigest(),
            "versions": {name: metadata.version(name) for name in _PACKAGES},
        }
        if self.precision != "float32":
            images["precision"] = self.precision
        counts = {"training_images": len(self.sources)}
        if self.heldout is not None:
            counts["heldout_images"] = int(self.heldout.sum())
        return {"key": value_hash(images), **images, "reference_sha256": self.reference_sha256, **counts, **self.origin}

    @property
    def key(self) -> str:
        """Sets of the same key have the same images."""
        return self.meta["key"]

    @property
    def reference(self) -> str:
        """The reference classifier by the first digits of its hash, as the manifest names it."""
        return self.reference_sha256[:12]

    @cached_property
    def blocks(self) -> list[Block]:
        """All blocks, in the order of the manifest."""
        return blocks(len(self.sources), self.config, self.seed)

    @cached_property
    def batch_size(self) -> int:
        """What every block is padded to, since other shapes may take other kernels, which round differently.

        Under a range of S a block holds far less than `config.batch_size` where the sources are few.
        """
        low, high = bounds(self.config.start_fraction)
        return self.config.batch_size if low == high else max(len(block.jobs) for block in self.blocks)

    def files(self, block: Block) -> list[str]:
        """The block's file names."""
        return [file_name(source, copy, self.config.format) for source, copy in block.jobs.tolist()]

    def columns(self, block: Block) -> dict[str, list[Any]]:
        """The manifest's columns of a block that are known before its images are made."""
        config, count, chosen = self.config, len(block.jobs), block.jobs[:, 0]
        own, identity = self.labels[chosen], identities(block.jobs)
        wrong = wrong_classes(own, self.classes, seed=self.seed, index=identity)
        weights = guidance_weights(config, self.seed, identity)
        first, second = _targets(config.mode, own, wrong)
        return {
            "file": self.files(block),
            "source_index": chosen.tolist(),
            "copy": block.jobs[:, 1].tolist(),
            "source": [self.sources.names[source] for source in chosen.tolist()],
            "source_label": own.tolist(),
            "heldout": [""] * count if self.heldout is None else self.heldout[chosen].int().tolist(),
            "target": first,
            "target2": second,
            "mode": [config.mode] * count,
            "guidance_weight": [
                f"{w:.6g}" for w in (weights.tolist() if isinstance(weights, torch.Tensor) else [weights] * count)
            ],
            "start_fraction": [f"{block.start_fraction:.6g}"] * count,
            "sampler": [config.sampler] * count,
            "sampling_steps": [config.sampling_steps] * count,
            "seed": [self.seed] * count,
            "reference": [self.reference] * count,
        }


def _targets(mode: str, own: torch.Tensor, wrong: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """The classes guidance pointed to; empty where a mode has none."""
    empty = [""] * len(own)
    if mode == "away":
        return empty, empty
    if mode == "same":
        return own.tolist(), empty
    second = {"blend": wrong[:, 1].tolist(), "blend-own": own.tolist()}
    return wrong[:, 0].tolist(), second.get(mode, empty)
