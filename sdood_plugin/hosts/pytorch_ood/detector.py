"""The detector: distance + voting score behind the host's interface."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_ood.api import DetectorInfo, FeaturesDetector, ModelNotSetException, RequiresFittingException, Task
from pytorch_ood.utils import is_known
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...config import ScoringConfig
from ...detector.network import load_network
from ...errors import RunError, UsageError
from ...randomness import derive_seed
from ...scoring.score import Score, fit_score
from ...scoring.storage import load_score, save_score
from .loss import outlier_target
from .paper import PAPER

log = logging.getLogger(__name__)

_DEFAULT = ScoringConfig()


class SDOOD(FeaturesDetector):
    """Distance to the ID features plus votes of the generated outliers, larger = more OOD (METHOD section 5).

        score(z) = sum of the k_distance smallest ||z - z_id||^2 / median of the same over held-out ID samples
                   + alpha * number of outliers among the k_vote nearest of ID samples and outliers together

    `fit` takes ID samples and, with targets < 0, the outliers in one loader. A share of both is held out and joins no
    bank: it gives the median and alpha. Without outliers the score is the distance alone. The encoder is called as it
    is, as everywhere in this library: put it into evaluation mode, and keep the held-out samples from its training if
    it was trained on the same images (`SDOOD.from_run` has done that).

    A fitted detector has `requires_fit = False`, so that `GridSearch(detector, fit_loader=None, ...)` tunes it with its
    outliers; given a detector that is not fitted, the host's GridSearch drops every target < 0 before fitting.

    Attributes:
        score_: The fitted `Score` with its banks and calibration; None before `fit`.
    """

    info = DetectorInfo(paper=PAPER, tasks={Task.CLASSIFICATION})
    requires_fit = True
    hyperparameter_space = {
        "k_distance": [1, 2, 5, 10],
        "k_vote": [1, 5, 10, 20],
        "alpha": [0.0, 0.1, 1.0, 10.0],
        "normalise": [True, False],
    }

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        k_distance: int = _DEFAULT.k_distance,
        k_vote: int = _DEFAULT.k_vote,
        alpha: float | None = _DEFAULT.alpha,
        normalise: bool = _DEFAULT.normalise,
        heldout_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        """Store the settings; nothing is checked before `fit`.

        Args:
            encoder: Maps inputs to features (B, D); None for `fit_features` and `predict_features` alone.
            k_distance: ID neighbours whose squared distances are summed.
            k_vote: Neighbours of both banks that vote.
            alpha: Weight of a vote; None chooses it on held-out samples.
            normalise: Scale features to unit length.
            heldout_fraction: Share of the fitted samples, in (0, 1), that is held out.
            seed: Decides which; no global generator is touched.
        """
        self.encoder = encoder
        self.k_distance = k_distance
        self.k_vote = k_vote
        self.alpha = alpha
        self.normalise = normalise
        self.heldout_fraction = heldout_fraction
        self.seed = seed
        self.image_size: int | None = None  # of the run's images; `from_run` sets it
        self.score_: Score | None = None
        self._chosen: float | None = None  # what alpha None stands for in a loaded score
        self._fitted: tuple[Tensor, ...] | None = None  # features of ID and outliers, those held out, both outliers' targets

    def fit(self, data_loader: DataLoader) -> SDOOD:
        """Encode every batch (x, y) of the loader and fit.

        Raises:
            ModelNotSetException: There is no encoder.
            UsageError: See `fit_features`.
        """
        if self.encoder is None:
            raise ModelNotSetException()
        if self.device is None:
            log.warning("No device set. Will use 'cpu'.")
            self.to("cpu")
        features, targets = [], []
        for x, y in data_loader:
            features.append(self._encode(x))
            targets.append(y)
        if not targets:
            raise UsageError("data_loader", "no batches", "batches (x, y)", "check the data set")
        return self.fit_features(torch.cat(features), torch.cat(targets))

    def fit_features(self, x: Tensor, y: Tensor, *, heldout: Tensor | None = None) -> SDOOD:
        """Fit on features.

        Args:
            x: float (N, D).
            y: (N,), below 0 for outliers: `outlier_target` of their source's class, or -1 where that is not known. Where all
                are known and of several classes, alpha is chosen on outliers whose own class the bank lacks; held-out controls,
                against which `sdood run` chooses it too, have no place here. Which class an ID sample has does not matter.
            heldout: bool (N,), the samples to hold out; None draws `heldout_fraction` of both kinds by `seed`.

        Raises:
            UsageError: No ID samples, too few of them, shapes that do not fit, or a k larger than its bank.
        """
        if x.dim() != 2 or y.shape != x.shape[:1]:
            raise UsageError(
                "features and labels", f"shapes {tuple(x.shape)} and {tuple(y.shape)}", "(N, D) and (N,)", "flatten the features"
            )
        inside = is_known(y)
        if not inside.any():
            raise UsageError(
                "labels",
                f"{len(y)} below 0 and none of 0 or more",
                "in-distribution samples",
                "add the ID training set to the loader",
            )
        device = self.device or x.device
        x, y, inside = x.detach().to(device), y.to(device), inside.to(device)
        kept_out = self._draw(inside) if heldout is None else heldout.to(device)
        if kept_out.shape != y.shape or kept_out.dtype != torch.bool:
            raise UsageError(
                "heldout", f"{kept_out.dtype} {tuple(kept_out.shape)}", f"bool ({len(y)},)", "give one flag a sample"
            )
        parts = tuple(x[group & chosen] for chosen in (~kept_out, kept_out) for group in (inside, ~inside))
        parts += y[~inside & ~kept_out], y[~inside & kept_out]
        if not len(parts[0]) or not len(parts[2]):
            raise UsageError(
                "ID samples",
                f"{len(parts[0])} to compare with and {len(parts[2])} held out",
                "some of both",
                "fit on more samples or change heldout_fraction",
            )
        if len(parts[1]) and not len(parts[3]) and self.alpha is None:
            log.warning("No outlier is held out to choose alpha by: the votes count nothing. Fit on more outliers or set alpha.")
        self.score_, self._fitted = self._score(parts), parts
        self.requires_fit = False
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Scores, float (B,), of inputs that the encoder takes; larger = more OOD.

        Raises:
            ModelNotSetException: There is no encoder.
            RequiresFittingException: `fit` was not called.
        """
        if self.encoder is None:
            raise ModelNotSetException()
        if self.score_ is None:
            raise RequiresFittingException()
        return self.predict_features(self._encode(x))

    def predict_features(self, x: Tensor) -> Tensor:
        """Scores, float (B,), of features (B, D); larger = more OOD.

        Raises:
            RequiresFittingException: `fit` was not called.
            UsageError: Features of another width than the bank's, or not finite.
        """
        if self.score_ is None:
            raise RequiresFittingException()
        if x.dim() != 2:
            raise UsageError("features", f"shape {tuple(x.shape)}", "(B, D)", "flatten them")
        return self.score_(x.detach().to(self.score_.inside.device))

    def to(self, device: str | torch.device) -> SDOOD:
        """Move encoder and banks."""
        super().to(device)
        if self.score_ is not None:
            banks = {name: getattr(self.score_, name).to(device) for name in ("inside", "outliers")}
            self.score_ = dataclasses.replace(self.score_, **banks)
        if self._fitted is not None:
            self._fitted = tuple(part.to(device) for part in self._fitted)
        return self

    def set_hyperparameters(self, **kwargs: Any) -> SDOOD:
        """Change settings by name; a fitted detector is calibrated again on the features it was fitted on.

        A loaded detector (`load`, `from_run`) has not got those features: its alpha alone can change, and with it the
        threshold and p-values of `score_`.

        Raises:
            UsageError: Another setting of a loaded detector, or a value that is out of range.
        """
        before = self.get_hyperparameters()
        try:
            super().set_hyperparameters(**kwargs)
            if self.score_ is not None and self.get_hyperparameters() != before:
                self.score_ = self._reweighted(before, self.score_) if self._fitted is None else self._score(self._fitted)
        except Exception:
            for name, value in before.items():
                setattr(self, name, value)
            raise
        return self

    def save(self, folder: str | Path) -> None:
        """Write banks, settings and calibration, not the encoder, as `sdood train-detector` does.

        Raises:
            RequiresFittingException: `fit` was not called.
        """
        if self.score_ is None:
            raise RequiresFittingException()
        save_score(Path(folder), self.score_)

    @classmethod
    def load(cls, folder: str | Path, encoder: Callable[[Tensor], Tensor] | None = None) -> SDOOD:
        """The detector of `save`, or the banks of `RUN/detector`, with the encoder they were made with.

        Raises:
            RunError: The folder holds no banks.
            UsageError: The encoder says its width (`feature_size` or `num_features`) and it is not the banks'.
        """
        for name in ("bank.safetensors", "score.json"):
            if not (Path(folder) / name).is_file():
                raise RunError(
                    f"detector folder {folder}",
                    f"no {name}",
                    "bank.safetensors and score.json",
                    "give the folder of SDOOD.save or RUN/detector",
                )
        score = load_score(Path(folder))
        width = getattr(encoder, "feature_size", getattr(encoder, "num_features", None))
        if isinstance(width, int) and width != score.inside.shape[1]:
            raise UsageError(
                "encoder",
                f"features of width {width}",
                f"{score.inside.shape[1]} as in the bank of {folder}",
                "use the backbone the bank was made with",
            )
        config = score.config
        detector = cls(encoder, config.k_distance, config.k_vote, config.alpha, config.normalise)
        detector.score_, detector.requires_fit = score, False
        detector._chosen = score.calibration.alpha if config.alpha is None else None
        return detector

    @classmethod
    def from_run(cls, run_folder: str | Path) -> SDOOD:
        """The detector of a finished `sdood run`: its backbone, banks and calibration, on the CPU.

        It takes float (B, 3, H, W) in [-1, 1]: give `network_input` to the data sets as transform, with `size` set to
        the detector's `image_size` where theirs is another.

        Raises:
            RunError: The run has no detector, or its weights do not fit the backbone they name.
        """
        folder = Path(run_folder) / "detector"
        if not (folder / "detector.safetensors").is_file():
            raise RunError(
                f"run folder {run_folder}",
                "no detector/detector.safetensors",
                "a finished run",
                "run `sdood run` or `sdood train-detector` on it",
            )
        network = load_network(folder / "detector.safetensors")
        detector = cls.load(folder, network.backbone)
        detector.image_size = network.image_size
        return detector

    def __deepcopy__(self, memo: dict[int, Any]) -> SDOOD:
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled lies on the CPU, so that it loads where there is no GPU; the detector itself stays where it is."""
        return self.__dict__ if self.device in (None, torch.device("cpu")) else copy.deepcopy(self).to("cpu").__dict__

    def _encode(self, x: Tensor) -> Tensor:
        assert self.encoder is not None
        weights = self.encoder.parameters() if isinstance(self.encoder, nn.Module) else iter(())
        weight = next(weights, None)
        if weight is not None and weight.is_floating_point() and x.is_floating_point():
            x = x.to(weight.dtype)
        with torch.no_grad():
            features = self.encoder(x if self.device is None else x.to(self.device))
        if not isinstance(features, Tensor):
            raise UsageError(
                "encoder output",
                type(features).__name__,
                "a tensor (B, D)",
                "give the part that makes features, as `network.backbone`",
            )
        return features.flatten(start_dim=1)

    def _draw(self, inside: Tensor) -> Tensor:
        """bool (N,): of ID samples two at least, of outliers one at least where there are two."""
        if not 0 < self.heldout_fraction < 1:
            raise UsageError("heldout_fraction", self.heldout_fraction, "above 0 and below 1", "give a share such as 0.1")
        chosen = torch.zeros_like(inside)
        for name, group, least in (("heldout", inside, 2), ("heldout-outliers", ~inside, 1)):
            rows = group.nonzero()[:, 0].cpu()
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(derive_seed(self.seed, name)))
            count = max(least, round(self.heldout_fraction * len(rows))) if len(rows) > 1 else 0
            chosen[rows[order[:count]].to(inside.device)] = True
        return chosen

    def _reweighted(self, before: dict[str, Any], score: Score) -> Score:
        """A loaded score under this alpha.

        Args:
            before: The settings that it has.
            score: The score.

        Raises:
            UsageError: Another setting changed, or alpha is to be chosen.
        """
        changed = {name: value for name, value in self.get_hyperparameters().items() if value != before[name]}
        alpha = self._chosen if self.alpha is None else self.alpha
        if changed.keys() != {"alpha"} or alpha is None:
            raise UsageError(
                "hyperparameters of a loaded detector",
                changed,
                "those it was fitted with, or another alpha alone",
                "fit a new detector with these",
            )
        return score.with_alpha(_plain(alpha))

    def _score(self, parts: tuple[Tensor, ...]) -> Score:
        inside, outliers = len(parts[0]), len(parts[1])
        limits = {"k_distance": (inside, "the ID bank")}
        if outliers:
            limits["k_vote"] = (inside + outliers, "both banks together")
        for name, (limit, bank) in limits.items():
            if getattr(self, name) > limit:
                raise UsageError(
                    name,
                    getattr(self, name),
                    f"at most {limit}, the size of {bank} without the held-out samples",
                    f"lower {name} or fit on more samples",
                )
        kept, kept_outliers, heldout, heldout_outliers, classes, heldout_classes = parts
        config = ScoringConfig(**{name: _plain(getattr(self, name)) for name in ("k_distance", "k_vote", "normalise", "alpha")})
        kinds = {"outlier_classes": outlier_target(classes), "heldout_classes": outlier_target(heldout_classes)}
        return fit_score(kept, kept_outliers, heldout, heldout_outliers, config, **kinds)


def _plain(value: Any) -> Any:
    """Python's number in place of numpy's, which a search over numpy's ranges gives."""
    return value.item() if isinstance(value, np.generic) else value
