"""How far a set of images is from the training images, in the space of a named feature extractor.

The figures are torch-fidelity's: Frechet distance (Heusel et al., NeurIPS 2017), kernel distance (Binkowski et al., ICLR
2018), precision and recall (Kynkaanniemi et al., NeurIPS 2019). They are called FID and KID only where the features are
those of the Inception network of the FID paper.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
from torch.nn import functional as F

from ..config import InspectionConfig
from ..data.images import to_unit
from ..errors import UsageError
from ..features import extract, load_backbone

log = logging.getLogger(__name__)
INCEPTION = "Inception-v3 (FID)"


class Features(NamedTuple):
    """A feature extractor and the name its figures are reported under; uint8 (N, 3, H, W) -> float (N, D)."""

    name: str
    of: Callable[[torch.Tensor], torch.Tensor]
    instead_of: str = ""  # what was asked for and could not be had


def pixel_features(images: torch.Tensor) -> torch.Tensor:
    """float (N, 192): pixels in [-1, 1], averaged down to 8 x 8."""
    return torch.cat([F.adaptive_avg_pool2d(to_unit(part), 8).flatten(1) for part in images.split(4096)])


def load_features(config: InspectionConfig, device: torch.device, reference: Features | None = None) -> Features:
    """The extractor that `config` names.

    Args:
        config: `features` and `weights`.
        device: Where to compute.
        reference: The run's reference network; None outside a run.

    Returns:
        The extractor. Where the Inception weights are neither given nor can be downloaded it is the reference network,
        or pixels where there is none: its name and `instead_of` say so.

    Raises:
        UsageError: `weights` is no file, or does not fit; or `reference` outside a run.
    """
    substitute = reference or Features("pixels averaged to 8 x 8", pixel_features)
    if config.features == "pixels":
        return Features("pixels averaged to 8 x 8", pixel_features)
    if config.features == "reference":
        if reference is None:
            raise UsageError(
                "inspection.features", "reference", "features that need no run", "give `inception`, `pixels` or a timm model"
            )
        return reference
    if config.features != "inception":
        backbone = load_backbone(config.features, config.weights).to(device)
        return Features(
            f"{config.features} ({Path(str(config.weights)).name})", lambda images: extract(backbone, images, device=device)
        )
    try:
        network = _inception(config.weights).to(device)
    except (URLError, ConnectionError, TimeoutError) as error:
        log.warning("no Inception weights (%s): distances are taken over %s and are no FID", error, substitute.name)
        return substitute._replace(instead_of=INCEPTION)
    return Features(INCEPTION, lambda images: _inception_features(network, images, device))


def _inception(weights: str | None) -> Any:
    from torch_fidelity import FeatureExtractorInceptionV3

    if weights is not None:
        remedy = "give torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        try:  # torch-fidelity itself would load any pickle
            torch.load(weights, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UsageError("inspection.weights", f"{weights} ({str(error).splitlines()[0]})", "a state dict", remedy) from error
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights, verbose=False)
    except RuntimeError as error:
        raise UsageError(
            "inspection.weights", weights, "weights of the FID Inception network", "give torch-fidelity's"
        ) from error


def _inception_features(network: Any, images: torch.Tensor, device: torch.device, batch_size: int = 64) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([network(part.to(device))[0].float() for part in images.split(batch_size)])


def distances(made: torch.Tensor, real: torch.Tensor, features: str, config: InspectionConfig) -> dict[str, Any]:
    """Frechet and kernel distance, precision and recall of a set against the training images.

    Args:
        made: float (N, D) features of the set.
        real: float (M, D) features of the training images.
        features: The extractor's name.
        config: Subsets of the kernel distance, neighbours of precision and recall.

    Returns:
        `features`; `fid`, `kid`, `kid_std` for Inception features, else `fd`, `kd`, `kd_std`; `precision`: share of the set
        within the real images' neighbourhoods, `recall`: the converse (per cent). Precision and recall are left out where
        there are no more than k images. The set's own size bounds all of them: state it.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    first, second = made.double().cpu(), real.double().cpu()
    smallest = min(len(first), len(second))
    found: dict[str, Any] = {"features": features, "n_real": len(second)}
    if smallest < 2:
        return found  # no covariance
    statistics = [fid_features_to_statistics(values) for values in (first, second)]
    frechet, kernel = ("fid", "kid") if features == INCEPTION else ("fd", "kd")
    found[frechet] = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    size = min(config.kernel_subset_size, smallest)
    subsets = config.kernel_subsets if size < max(len(first), len(second)) else 1  # they would all be the whole sets
    values = kid_features_to_metric(first, second, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    found |= {kernel: values[KEY_METRIC_KID_MEAN], f"{kernel}_std": values[KEY_METRIC_KID_STD]}
    if smallest > config.neighbours:
        both = made.double(), real.double()  # every image is compared with every other: where the features lie
        shares = prc_features_to_metric(*both, prc_neighborhood=config.neighbours, save_cpu_ram=True, verbose=False)
        found |= {"precision": 100 * shares[KEY_METRIC_PRECISION], "recall": 100 * shares[KEY_METRIC_RECALL]}
    return found
