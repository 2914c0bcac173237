"""What the postprocessor is fitted on: features of the host's loaders, outliers embedded by a network, or saved banks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from ...artifacts import read_tensors
from ...errors import UsageError
from ...outliers.dataset import OutlierSet
from ...scoring.score import Score
from ...scoring.storage import load_score
from .network import SDOODNet


def open_outliers(where: str | None, net: nn.Module) -> Score | OutlierSet | None:
    """The banks of a run or detector folder, on the network's device, or an outlier set with its images read.

    Everything that may be wrong with the folder is found here, before the host's images are embedded.

    Raises:
        UsageError: A detector without banks, or banks of another network.
        RunError: The folder is neither, or is damaged.
    """
    if where is None:
        return None
    folder = Path(where)
    detector = _detector_folder(folder)
    if detector is not None:
        return _stored_score(detector, net)
    outliers = OutlierSet(folder)
    _ = outliers.images
    return outliers


def check_outliers(where: str) -> None:
    """What of a folder can be wrong whatever the network: every image of an outlier set, the banks of a detector.

    Raises:
        UsageError: There is no such folder, or its detector has no banks.
        RunError: The folder is neither, or is damaged.
    """
    folder = Path(where)
    if not folder.is_dir():
        raise UsageError(
            "postprocessor_args.outliers", where, "an outlier-set folder, a run folder or its detector folder", "check the path"
        )
    detector = _detector_folder(folder)
    if detector is None:
        OutlierSet(folder).verify()
    else:
        load_score(detector)


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


def joined(parts: list[torch.Tensor], what: str) -> torch.Tensor:
    """The batches of a loader as one tensor.

    Raises:
        UsageError: There are none.
    """
    if not parts:
        raise UsageError(what, "no images", "at least one", "check its list")
    return torch.cat(parts)


def transform_of(loader: Any) -> Any:
    """What a loader makes of an image, that of a `Subset` being its data set's; None where the data set does not say."""
    dataset = loader.dataset
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return getattr(dataset, "transform_image", None)


def _features(net: nn.Module, batches: Any, what: str) -> torch.Tensor:
    device = next(net.parameters()).device
    return joined([net(batch.to(device), return_feature=True)[1].flatten(1).float() for batch in batches], what)


def loader_features(net: nn.Module, loader: Any, transform: Any, what: str) -> torch.Tensor:
    """Features float (N, D) of a loader's images without augmentation: the host's training loaders hold those as `data_aux`."""
    key = "data" if type(transform_of(loader)) is type(transform) else "data_aux"
    return _features(net, (batch[key] for batch in loader), what)


def outlier_features(net: nn.Module, outliers: OutlierSet, transform: Any, batch_size: int = 200) -> dict[str, torch.Tensor]:
    """What `fit_score` is given of outliers whose images went the way the host's own go; every tenth source is held out."""
    from PIL import Image

    arrays = outliers.images.permute(0, 2, 3, 1).numpy()
    chunks = (range(start, min(start + batch_size, len(arrays))) for start in range(0, len(arrays), batch_size))
    images = (torch.stack([transform(Image.fromarray(arrays[row])) for row in rows]) for rows in chunks)
    features = _features(net, images, f"outliers {outliers.folder}")
    classes = outliers.labels.to(features.device)
    heldout = (outliers.sources.unique(return_inverse=True)[1] % 10 == 9).to(features.device)
    bank = {"outliers": features[~heldout], "outlier_classes": classes[~heldout]}
    return bank | {"heldout_outliers": features[heldout], "heldout_classes": classes[heldout]}


def _stored_score(folder: Path, net: nn.Module) -> Score:
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
    return load_score(folder, next(net.parameters()).device)
