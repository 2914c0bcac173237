"""The distance + voting score as an OpenOOD postprocessor; works on any host network that returns features."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...config import ScoringConfig
from ...errors import UsageError
from ...outliers.dataset import OutlierSet
from ...scoring.score import Score, fit_score
from .banks import joined, loader_features, open_outliers, outlier_features, transform_of
from .host import require_host

require_host()
from openood.postprocessors import BasePostprocessor  # noqa: E402 - only after the host is on the path
from openood.utils import comm  # noqa: E402

log = logging.getLogger(__name__)

HYPERPARAMETERS = ("k_distance", "k_vote", "alpha", "normalise")  # the order of set_hyperparam's list
_ARGUMENTS = {"outliers", *HYPERPARAMETERS}


class SDOODPostprocessor(BasePostprocessor):
    """conf = -score(features): the host wants larger = in-distribution, and this is the one place the sign turns.

    `setup` gathers features of the host's ID training images (the bank), of its ID validation images (the distance's
    scale) and of the outliers, and fits the score with the core's `fit_score`. The outliers come from an outlier-set
    folder (images, embedded by the given network; those of every tenth source are kept out of the bank to choose alpha, without
    the controls that `sdood run` has for it)
    or from a run folder or its `detector` folder (the banks and the calibration saved there; the given network must be
    the one they were made with). Without outliers there are no votes and the score is the distance alone.

    Args:
        config: A host config with a `postprocessor` section, or None for the core's defaults. Its
            `postprocessor_args` are `outliers`, `k_distance`, `k_vote`, `alpha`, `normalise`; absent ones keep the
            default, or what the detector folder was calibrated with; an absent alpha is chosen as the core chooses it.
            Its `postprocessor_sweep` lists values for the host's parameter search; what it leaves out keeps its value.
        outliers: In place of the config's.
        **settings: Hyperparameters in place of the config's.

    Raises:
        UsageError: Unknown or impossible settings.
    """

    def __init__(self, config: Any = None, *, outliers: str | Path | None = None, **settings: Any) -> None:
        super().__init__(config)
        section = config.postprocessor if config is not None and config.postprocessor else {}
        given = {**dict(section.get("postprocessor_args") or {}), **settings}
        _require_known("postprocessor_args", given, _ARGUMENTS)
        where = outliers or given.pop("outliers", None)
        given.pop("outliers", None)
        self.outliers = str(where) if where else None
        self.settings = {name: value for name, value in given.items() if value is not None}
        self.config_ = dataclasses.replace(ScoringConfig(), **self.settings)
        self.sweep = _sweep(section.get("postprocessor_sweep"))
        self.APS_mode = bool(section.get("APS_mode", False))
        self.hyperparam_search_done = False
        self.setup_flag = False
        self.features: dict[str, torch.Tensor] = {}
        self.stored: Score | None = None
        self.score_: Score | None = None

    def get(self, name: str) -> Any:
        """A hyperparameter's value."""
        return getattr(self.config_, name)

    @property
    def args_dict(self) -> dict[str, list[Any]]:
        """What the host's parameter search tries: a sweep's values, else the present one, after `setup` that of a run folder."""
        return {name: list(self.sweep.get(f"{name}_list", [self.get(name)])) for name in HYPERPARAMETERS}

    @torch.no_grad()
    def setup(self, net: nn.Module, id_loader_dict: Any, ood_loader_dict: Any = None) -> None:
        """Gather the features and fit the score; once, as the host expects.

        Raises:
            UsageError: A loader, the outliers or the network do not fit.
            RunError: The outliers' folder is damaged.
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
        self._gather(net, id_loader_dict)
        self.score_ = self._fit(self.config_)
        self.setup_flag = True

    def _gather(self, net: nn.Module, id_loader_dict: Any) -> None:
        transform = transform_of(id_loader_dict["val"])
        opened = open_outliers(self.outliers, net)
        if isinstance(opened, OutlierSet) and transform is None:
            raise UsageError(
                "ID loader `val`",
                f"a {type(id_loader_dict['val'].dataset).__name__} without transform_image",
                "a data set that says what it makes of an image, for the outliers' images",
                "use the host's ImglistDataset",
            )
        heldout = loader_features(net, id_loader_dict["val"], transform, "ID loader `val`")
        self.features = {"heldout_inside": heldout, "outliers": heldout[:0], "heldout_outliers": heldout[:0]}
        if isinstance(opened, Score):
            self.stored = opened
            self.config_ = dataclasses.replace(opened.config, **{"alpha": opened.calibration.alpha, **self.settings})
            self.features |= {"inside": opened.inside, "outliers": opened.outliers}
            return
        self.features["inside"] = loader_features(net, id_loader_dict["train"], transform, "ID loader `train`")
        if opened is None:
            return
        self.features |= outlier_features(net, opened, transform)
        if not len(self.features["heldout_outliers"]) and self.config_.alpha is None:
            log.warning("%s: fewer than 10 sources, none is held out to choose alpha by: the votes count nothing", opened.folder)

    def _fit(self, config: ScoringConfig) -> Score:
        if self.stored is None:
            return fit_score(config=config, **self.features)
        if self.stored.config.normalise and not config.normalise:
            raise UsageError(
                "normalise",
                False,
                "True: these banks were saved with unit length",
                "give the outlier-set folder in place of the detector folder",
            )
        same = all(getattr(config, name) == getattr(self.stored.config, name) for name in ("k_distance", "k_vote", "normalise"))
        if same and config.alpha is not None:
            return self.stored.with_alpha(config.alpha)
        return fit_score(config=config, **self.features)

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
            self.__dict__.update(self._tensors(features.device))
        return logits.argmax(dim=1), -self.score_(features.flatten(1))

    @torch.no_grad()
    def inference(self, net: nn.Module, data_loader: Any, progress: bool = True) -> Any:
        """Predictions int (N,), confidences float (N,) and labels int (N,) of a loader, as numpy arrays, on the net's device.

        Raises:
            UsageError: The loader is empty, or `setup` has not run.
        """
        from tqdm import tqdm

        device = next(net.parameters()).device
        columns: tuple[list[torch.Tensor], ...] = ([], [], [])
        for batch in tqdm(data_loader, disable=not progress or not comm.is_main_process()):
            for column, values in zip(columns, (*self.postprocess(net, batch["data"].to(device)), batch["label"]), strict=True):
                column.append(values.cpu())
        predicted, confidence, label = (joined(column, "loader").numpy() for column in columns)
        return predicted.astype(int), confidence, label.astype(int)

    def set_hyperparam(self, hyperparam: list[Any]) -> None:
        """Take [k_distance, k_vote, alpha, normalise] and fit again: normalised banks and the scale hang on them.

        None keeps the present value. A value that fails changes nothing; before `setup` the values wait for it.

        Raises:
            UsageError: An impossible value.
        """
        given = {name: value for name, value in zip(HYPERPARAMETERS, hyperparam, strict=True) if value is not None}
        config = dataclasses.replace(self.config_, **given)
        if self.setup_flag:
            self.score_ = self._fit(config)
        self.config_, self.settings = config, {**self.settings, **given}

    def get_hyperparam(self) -> list[Any]:
        """[k_distance, k_vote, alpha, normalise] as they are now."""
        return [self.get(name) for name in HYPERPARAMETERS]

    def _tensors(self, device: torch.device) -> dict[str, Any]:
        """The attributes that hold tensors, on a device."""
        scores = {name: score for name in ("stored", "score_") if (score := getattr(self, name)) is not None}
        return {"features": {name: values.to(device) for name, values in self.features.items()}} | {
            name: dataclasses.replace(score, inside=score.inside.to(device), outliers=score.outliers.to(device))
            for name, score in scores.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled lies on the CPU, so that it loads where there is no GPU; the postprocessor itself stays where it is."""
        return {**self.__dict__, **self._tensors(torch.device("cpu"))}


def _require_known(what: str, given: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UsageError(what, unknown[0], f"one of {', '.join(sorted(known))}", "check the spelling")


def _sweep(given: Any) -> dict[str, list[Any]]:
    """The lists of a `postprocessor_sweep` by name, those that are null left out."""
    sweep = {name: values for name, values in dict(given or {}).items() if values is not None}
    _require_known("postprocessor_sweep", sweep, [f"{name}_list" for name in HYPERPARAMETERS])
    for name, values in sweep.items():
        if not isinstance(values, (list, tuple)) or not values or None in values:
            raise UsageError(f"postprocessor_sweep.{name}", values, "a list of values", "leave it out to keep what is set")
    return sweep
