"""The distance + voting score as an OpenOOD postprocessor; works on any host network that returns features."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...artifacts import read_tensors
from ...config import ScoringConfig
from ...errors import UsageError
from ...outliers.dataset import OutlierSet
from ...scoring.score import Score, fit_score
from ...scoring.storage import load_score
from .host import require_host
from .network import SDOODNet

require_host()
from openood.postprocessors import BasePostprocessor  # noqa: E402 - only after the host is on the path
from openood.utils import comm  # noqa: E402

HYPERPARAMETERS = ("k_distance", "k_vote", "alpha", "normalise")  # the order of set_hyperparam's list
_ARGUMENTS = {"outliers", *HYPERPARAMETERS}


class SDOODPostprocessor(BasePostprocessor):
    """conf = -score(features): the host wants larger = in-distribution, and this is the one place the sign turns.

    `setup` gathers features of the host's ID training images (the bank), of its ID validation images (the distance's
    scale) and of the outliers, and fits the score with the core's `fit_score`. The outliers come from an outlier-set
    folder (images, embedded by the given network; those of every tenth source are kept out of the bank to choose alpha)
    or from a run folder or its `detector` folder (the banks and the calibration saved there; the given network must be
    the one they were made with). Without outliers there are no votes and the score is the distance alone.

    Args:
        config: A host config with a `postprocessor` section, or None for the core's defaults. Its
            `postprocessor_args` are `outliers`, `k_distance`, `k_vote`, `alpha`, `normalise`; absent ones keep the
            default, or what the detector folder was calibrated with; an absent alpha is chosen as the core chooses it.
        outliers: In place of the config's.
        **settings: Hyperparameters in place of the config's.

    Raises:
        UsageError: Unknown or impossible settings.
    """

    def __init__(self, config: Any = None, *, outliers: str | Path | None = None, **settings: Any) -> None:
        super().__init__(config)
        section = config.postprocessor if config is not None and config.postprocessor else {}
        given = {**dict(section.get("postprocessor_args") or {}), **settings}
        unknown = sorted(set(given) - _ARGUMENTS)
        if unknown:
            raise UsageError("postprocessor_args", unknown[0], f"one of {', '.join(sorted(_ARGUMENTS))}", "check the spelling")
        where = outliers or given.pop("outliers", None)
        given.pop("outliers", None)
        self.outliers = str(where) if where else None
        self.settings = {name: value for name, value in given.items() if value is not None}
        self.config_ = dataclasses.replace(ScoringConfig(), **self.settings)
        sweep = dict(section.get("postprocessor_sweep") or {})
        self.args_dict = {name: list(sweep.get(f"{name}_list", [self.get(name)])) for name in HYPERPARAMETERS}
        self.APS_mode = bool(section.get("APS_mode", False))
        self.hyperparam_search_done = False
        self.setup_flag = False
        self.features: dict[str, torch.Tensor] = {}
        self.stored: Score | None = None
        self.score_: Score | None = None

    def get(self, name: str) -> Any:
        """A hyperparameter's value."""
        return getattr(self.config_, name)

    @torch.no_grad()
    def setup(self, net: nn.Module, id_loader_dict: Any, ood_loader_dict: Any = None) -> None:
        """Gather the features and fit the score; once, as the host expects.

        Raises:
            UsageError: A loader, the outliers or the network do not fit.
        """
        if self.setup_flag:
            return
        absent = [name for name in ("train", "val") if name not in id_loader_dict]
        if absent:
            raise UsageError(
                "ID loaders",
                f"no `{absent[0]}`",
                "`train` for the bank and `val` for the distance's scale",
                "add it to the data set",
            )
        net.eval()
        transform = id_loader_dict["val"].dataset.transform_image
        folder = Path(self.outliers) if self.outliers else None
        detector = _detector_folder(folder) if folder is not None else None
        self.features = {"heldout_inside": _loader_features(net, id_loader_dict["val"], transform)}
        nothing = self.features["heldout_inside"][:0]
        self.features |= {"outliers": nothing, "heldout_outliers": nothing}
        if detector is not None:
            self.stored = _stored_score(detector, net, nothing.device)
            self.config_ = dataclasses.replace(self.stored.config, alpha=self.stored.calibration.alpha, **self.settings)
            self.features |= {"inside": self.stored.inside, "outliers": self.stored.outliers}
        else:
            self.features["inside"] = _loader_features(net, id_loader_dict["train"], transform)
            if folder is not None:
                self.features["outliers"], self.features["heldout_outliers"] = _outlier_features(net, folder, transform)
        self._fit()
        self.setup_flag = True

    def _fit(self) -> None:
        if self.stored is not None and self.stored.config.normalise and not self.config_.normalise:
            raise UsageError(
                "normalise",
                False,
                "True: these banks were saved with unit length",
                "give the outlier-set folder in place of the detector folder",
            )
        same = self.stored is not None and all(
            self.get(name) == getattr(self.stored.config, name) for name in ("k_distance", "k_vote", "normalise")
        )
        if same and self.stored is not None and self.config_.alpha is not None:
            calibration = dataclasses.replace(self.stored.calibration, alpha=self.config_.alpha)
            self.score_ = dataclasses.replace(self.stored, calibration=calibration)
        else:
            self.score_ = fit_score(config=self.config_, **self.features)

    @torch.no_grad()
    def postprocess(self, net: nn.Module, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted class int64 (B,) and confidence float (B,), larger = in-distribution.

        Raises:
            UsageError: `setup` has not run.
        """
        if self.score_ is None:
            raise UsageError(
                "postprocessor sdood", "no banks", "`setup` before `postprocess`", "call setup(net, id_loaders, ood_loaders)"
            )
        logits, features = net(data, return_feature=True)
        if self.score_.inside.device != features.device:
            self._move(features.device)
        return logits.argmax(dim=1), -self.score_(features.flatten(1))

    @torch.no_grad()
    def inference(self, net: nn.Module, data_loader: Any, progress: bool = True) -> Any:
        """Predictions int (N,), confidences float (N,) and labels int (N,) of a loader, as numpy arrays, on the net's device."""
        from tqdm import tqdm

        device = next(net.parameters()).device
        columns: tuple[list[torch.Tensor], ...] = ([], [], [])
        for batch in tqdm(data_loader, disable=not progress or not comm.is_main_process()):
            for column, values in zip(columns, (*self.postprocess(net, batch["data"].to(device)), batch["label"]), strict=True):
                column.append(values.cpu())
        predicted, confidence, label = (torch.cat(column).numpy() for column in columns)
        return predicted.astype(int), confidence, label.astype(int)

    def set_hyperparam(self, hyperparam: list[Any]) -> None:
        """Take [k_distance, k_vote, alpha, normalise] and fit again: normalised banks and the scale hang on them.

        Raises:
            UsageError: An impossible value.
        """
        self.config_ = dataclasses.replace(self.config_, **dict(zip(HYPERPARAMETERS, hyperparam, strict=True)))
        if self.features:
            self._fit()

    def get_hyperparam(self) -> list[Any]:
        """[k_distance, k_vote, alpha, normalise] as they are now."""
        return [self.get(name) for name in HYPERPARAMETERS]

    def _move(self, device: torch.device) -> None:
        self.features = {name: values.to(device) for name, values in self.features.items()}
        for name in ("stored", "score_"):
            score = getattr(self, name)
            if score is not None:
                setattr(
                    self, name, dataclasses.replace(score, inside=score.inside.to(device), outliers=score.outliers.to(device))
                )

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled lies on the CPU, so that it loads where there is no GPU."""
        self._move(torch.device("cpu"))
        return self.__dict__


def _detector_folder(folder: Path) -> Path | None:
    """The folder of banks that a run or detector folder stands for; None for an outlier set.

    Raises:
        UsageError: A detector without banks.
    """
    for path in (folder, folder / "detector"):
        if (path / "bank.safetensors").is_file():
            return path
        if (path / "detector.safetensors").is_file():
            raise UsageError(
                f"outliers {folder}",
                "a detector without banks",
                "a run that is calibrated, or an outlier-set folder",
                "run `sdood train-detector` on it, or give its `outliers` folder",
            )
    return None


def _features(net: nn.Module, batches: Any) -> torch.Tensor:
    device = next(net.parameters()).device
    return torch.cat([net(batch.to(device), return_feature=True)[1].flatten(1).float() for batch in batches])


def _loader_features(net: nn.Module, loader: Any, transform: Any) -> torch.Tensor:
    """Features float (N, D) of a loader's images without augmentation: the host's training loaders hold those as `data_aux`."""
    key = "data" if type(loader.dataset.transform_image) is type(transform) else "data_aux"
    return _features(net, (batch[key] for batch in loader))


def _outlier_features(net: nn.Module, folder: Path, transform: Any, batch_size: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (bank, held out) of an outlier set whose images went the way the host's own go; every tenth source is held out."""
    from PIL import Image

    outliers = OutlierSet(folder)
    arrays = outliers.images.permute(0, 2, 3, 1).numpy()
    chunks = (range(start, min(start + batch_size, len(arrays))) for start in range(0, len(arrays), batch_size))
    features = _features(net, (torch.stack([transform(Image.fromarray(arrays[row])) for row in rows]) for rows in chunks))
    heldout = (outliers.sources.unique(return_inverse=True)[1] % 10 == 9).to(features.device)
    return features[~heldout], features[heldout]


def _stored_score(folder: Path, net: nn.Module, device: torch.device) -> Score:
    weights = folder / "detector.safetensors"
    inner = getattr(net, "module", net)
    if weights.is_file() and isinstance(inner, SDOODNet):
        saved = read_tensors(weights)["g_in.weight"].to(inner.fc.weight)
        if saved.shape != inner.fc.weight.shape or not torch.equal(saved, inner.fc.weight):
            raise UsageError(
                f"banks of {folder}",
                "those of another network",
                f"the network in {weights}",
                "load that network, or give the outlier-set folder to embed it with this one",
            )
    return load_score(folder, device)
