"""From a run folder to a decision: the trained network and its fitted score as one object."""

from __future__ import annotations

from pathlib import Path

import torch

from .config import DataConfig, ImagesConfig
from .data import sources
from .data.images import ImageSet
from .detector.network import ThreeHeadNet, load_network
from .errors import RunError, UsageError
from .features import extract
from .scoring.score import Score
from .scoring.storage import load_score


class Detector:
    """A trained OOD detector.

    Args:
        network: The three-head network.
        score: The fitted score.
        image_size: Side in pixels of the images it was trained on.
        device: Where it computes.
    """

    def __init__(self, network: ThreeHeadNet, score: Score, image_size: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.fitted = score
        self.image_size = image_size

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> Detector:
        """The detector of a run folder.

        Raises:
            RunError: The folder holds no trained detector.
        """
        place = Path(folder) / "detector"
        if not (place / "detector.safetensors").exists():
            raise RunError(
                f"run folder {folder}",
                "no detector",
                "a folder where `sdood run` or `sdood train-detector` has finished",
                "run it first",
            )
        network = load_network(place / "detector.safetensors")
        return cls(network, load_score(place, device), network.image_size, device)

    @property
    def threshold(self) -> float:
        """The score above which an image is called OOD, chosen on held-out in-distribution images."""
        return self.fitted.calibration.threshold

    def score(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """Scores float (N,) of uint8 (N, 3, H, W) images; larger = more OOD.

        Raises:
            UsageError: Images of another type or size than the detector was trained on.
        """
        size = self.image_size
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise UsageError(
                "images",
                f"{images.dtype} {tuple(images.shape)}",
                f"uint8 (N, 3, {size}, {size})",
                "read them with detector.load_images",
            )
        return self.fitted(extract(self.network.backbone, images, device=self.device, batch_size=batch_size)).cpu()

    def decide(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores float (N,), is_ood bool (N,)) of uint8 (N, 3, H, W) images."""
        scores = self.score(images)
        return scores, scores > self.threshold

    def load_images(self, path: str | Path, root: str | None = None) -> ImageSet:
        """Images from a folder, imglist, CIFAR batches or .npz, resized as in training."""
        return sources.load_images(ImagesConfig(str(path), root), DataConfig(image_size=self.image_size), seed=0)
