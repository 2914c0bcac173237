"""From a run folder to a decision: the trained network and its fitted score as one object.

detector = Detector.load("runs/mine")
images = detector.load_images("new")
scores, is_ood = detector.decide(images)
for name, score, flag in zip(images.names, scores, is_ood): ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .artifacts import write_csv
from .config import DataConfig, ImagesConfig
from .data import sources
from .data.images import ImageSet
from .detector.network import ThreeHeadNet, load_network
from .errors import RunError, UsageError
from .features import evaluating, extract, require_finite
from .scoring.heads import head_scores
from .scoring.score import Score
from .scoring.storage import load_score
from .scoring.threshold import Threshold


class Verdicts(NamedTuple):
    """Everything the detector has to say of B images; float (B,) each, larger = more OOD but for `p_value`."""

    score: torch.Tensor  # distance + alpha votes, float64 as its two parts are
    p_value: torch.Tensor  # share of held-out in-distribution images at least as OOD, float64
    distance: torch.Tensor  # in units of its held-out median
    votes: torch.Tensor  # outliers among the nearest neighbours
    g_bin: torch.Tensor  # the binary head's probability of an outlier
    msp: torch.Tensor  # minus the largest class probability of g_in
    energy: torch.Tensor  # minus the log of g_in's summed exponentials
    g_out: torch.Tensor  # the same of g_out


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
        if not all((place / name).exists() for name in ("detector.safetensors", "bank.safetensors", "score.json")):
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
        return self.fitted.threshold.value

    def threshold_at(self, false_alarm_rate: float) -> Threshold:
        """The threshold at another false-alarm rate, with the 95 % interval of the rate it will really have.

        Raises:
            UsageError: A rate that is not between 0 and 1.
        """
        if not 0 < false_alarm_rate < 1:
            raise UsageError("false_alarm_rate", false_alarm_rate, "above 0 and below 1", "give a share such as 0.05")
        return self.fitted.threshold_at(false_alarm_rate)

    def verdicts(self, images: torch.Tensor | ImageSet, batch_size: int = 256) -> Verdicts:
        """Score, p-value and what each part of the detector says, on the CPU.

        Args:
            images: uint8 (B, 3, H, W), or what `load_images` gives.
            batch_size: Images in the network at once.

        Raises:
            UsageError: Images of another type or size than the detector was trained on.
            RunError: Features that are not finite; the image is named.
        """
        pixels, names = (images.images, images.names) if isinstance(images, ImageSet) else (images, None)
        features = extract(self.network.backbone, self._checked(pixels), device=self.device, batch_size=batch_size)
        return self.verdicts_of(features, names)

    def verdicts_of(self, features: torch.Tensor, names: list[str] | None = None) -> Verdicts:
        """What `verdicts` says, of the network's features float (B, D) on the detector's device.

        Args:
            features: What `extract` gives of the network's backbone.
            names: Of the images, for errors.

        Raises:
            RunError: Features that are not finite; the image is named.
        """
        require_finite(features, lambda row: names[row] if names else str(row))
        distance, votes = self.fitted.terms(features)
        with evaluating(self.network):
            own = head_scores(*(head(features) for head in (self.network.g_bin, self.network.g_in, self.network.g_out)))
        score = self.fitted.combined(distance, votes)
        return Verdicts(*(part.cpu() for part in (score, self.fitted.p_values(score), distance, votes, *own.values())))

    def score(self, images: torch.Tensor | ImageSet, batch_size: int = 256) -> torch.Tensor:
        """Scores float (B,) of uint8 (B, 3, H, W) images; larger = more OOD. Raises what `verdicts` raises."""
        return self.verdicts(images, batch_size).score

    def decide(self, images: torch.Tensor | ImageSet, false_alarm_rate: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores float (B,), is_ood bool (B,)); at the calibrated false-alarm rate unless another one is given."""
        threshold = self.threshold if false_alarm_rate is None else self.threshold_at(false_alarm_rate).value
        scores = self.score(images)
        return scores, scores > threshold

    def stream(self, batches: Iterable[torch.Tensor | ImageSet | Sequence[torch.Tensor]]) -> Iterator[Verdicts]:
        """Verdicts batch by batch, for more images than memory holds.

        Args:
            batches: Image batches as `verdicts` takes them, or a DataLoader whose batches have the images first.
        """
        for batch in batches:
            yield self.verdicts(batch[0] if isinstance(batch, Sequence) else batch)

    def load_images(self, path: str | Path, root: str | None = None) -> ImageSet:
        """Images from a folder, imglist, CIFAR batches or .npz, resized as in training."""
        return sources.load_images(ImagesConfig(str(path), root), DataConfig(image_size=self.image_size), seed=0)

    def _checked(self, images: torch.Tensor) -> torch.Tensor:
        size, given = self.image_size, isinstance(images, torch.Tensor)
        if not given or images.dtype != torch.uint8 or images.shape[1:] != (3, size, size) or not len(images):
            raise UsageError(
                "images",
                f"{images.dtype} {tuple(images.shape)}" if given else type(images).__name__,
                f"uint8 tensor (N, 3, {size}, {size}), N > 0",
                "read them with detector.load_images",
            )
        return images


def score_folder(run_folder: Path, images: str, csv: Path) -> str:
    """Write one line an image, most OOD first; says how many were called OOD, and how often that is a false alarm.

    Raises:
        RunError: The run has no detector, or the images cannot be read.
    """
    detector = Detector.load(run_folder, "cuda" if torch.cuda.is_available() else "cpu")
    found = detector.load_images(images)
    verdicts = detector.verdicts(found)
    is_ood = (verdicts.score > detector.threshold).tolist()
    values = torch.stack([part.double() for part in verdicts], dim=1).tolist()
    order = verdicts.score.argsort(descending=True, stable=True).tolist()
    rows = ([found.names[i], int(is_ood[i]), *(f"{value:.6g}" for value in values[i])] for i in order)
    write_csv(csv, ("path", "called_ood", *Verdicts._fields), rows)
    low, high = 100 * detector.fitted.threshold.low, 100 * detector.fitted.threshold.high
    return (
        f"{sum(is_ood)} of {len(found)} images called OOD (score above {detector.threshold:.4g}); of in-distribution images "
        f"{low:.2g} to {high:.2g} % would be (95 % interval from {detector.fitted.calibration.heldout[0]} held-out images)\n{csv}"
    )
