"""A host config looked through before anything is written or trained; what the host would stumble over later is one line now."""

from __future__ import annotations

import copy
import math
from typing import Any

from ...errors import UsageError
from ..imglist import check_imglist
from .banks import check_outliers
from .checkpoints import build_network
from .host import require_host
from .postprocessor import SDOODPostprocessor
from .stock_networks import check_stock_network
from .trainer import require_three_heads

require_host()
from openood.datasets import utils as host_loaders  # noqa: E402 - only after the host is on the path
from openood.postprocessors import get_postprocessor  # noqa: E402

SPLITS = ("train", "oe", "val", "test")
_LEARNT = ("train", "val", "test")  # the host counts or learns their classes; it gives outliers none
_TRAINER_KEYS = {"name", "lambda_out"}
_READ_OOD = ("test_ood", "test_ood_aps", "test_ad", "train_ad", "feat_extract_opengan")  # the host's that read `ood_dataset`
_SCORE = ("test_ood", "test_ood_aps", "test_ad", "train_ad", "train_opengan")  # the host's that make a postprocessor
_COUNT_EPOCHS = ("train", "train_oe")
_WANTED_NETWORKS = {  # postprocessors that call what only these networks of the host's have
    "cider": ("cider_net", "npos_net", "palm_net"),
    "conf_branch": ("conf_branch_net",),
    "draem": ("draem",),
    "godin": ("godin_net",),
    "mcd": ("mcd",),
    "npos": ("cider_net", "npos_net", "palm_net"),
    "opengan": ("opengan",),
    "rd4ad": ("rd4ad_net",),
    "rotpred": ("rot_net",),
    "rts": ("rts_net",),
    "t2fnorm": ("t2fnorm_net",),
}


def check_config(config: Any) -> None:
    """Everything that can be wrong before training: lists, classes, keys, checkpoint, outliers.

    Raises:
        UsageError: Something is.
        RunError: The outliers or banks are damaged.
    """
    pipeline = config.pipeline.name
    own = pipeline == "train_sdood"
    _check_dataset(config.dataset, (*SPLITS, "controls") if own else _LEARNT)
    if pipeline in _READ_OOD:
        _check_ood(config.ood_dataset)
    if pipeline in _SCORE:
        _check_postprocessor(config)
    if own:
        _check_train_sdood(config)
    if own or pipeline in _COUNT_EPOCHS:
        _check_number(config.optimizer, "num_epochs", int)
    _check_network(config.network, config.dataset.num_classes, own)
    if config.postprocessor and config.postprocessor.name == "sdood":
        outliers = SDOODPostprocessor(config).outliers
        if outliers is not None:
            check_outliers(outliers)


def _check_dataset(dataset: Any, labelled: tuple[str, ...]) -> None:
    if not dataset or not dataset.split_names:
        raise UsageError("dataset.split_names", dataset and dataset.split_names, "names of splits", "give the data set's YAML")
    _check_number(dataset, "num_classes", int, "dataset")
    for name in dataset.split_names:
        split = dataset.get(name)
        _check_class(f"dataset.{name}", split)
        _check_list(f"dataset.{name}", split, dataset.num_classes, ood_allowed=name not in labelled)


def _check_ood(dataset: Any) -> None:
    if not dataset or not dataset.split_names:
        raise UsageError("ood_dataset", dataset, "split_names and their lists", "give the data set's *_ood.yml")
    _check_number(dataset, "num_classes", int, "ood_dataset")
    _check_class("ood_dataset", dataset)
    for name in dataset.split_names:
        group = dataset.get(name) or {}
        lists = {name: group} if name == "val" else {f"{name}.{each}": group.get(each) for each in group.get("datasets") or ()}
        if not lists:
            raise UsageError(f"ood_dataset.{name}.datasets", None, "names of data sets", "give the YAML that has them")
        for where, part in lists.items():
            _check_list(f"ood_dataset.{where}", part, dataset.num_classes)


def _check_class(where: str, part: Any) -> None:
    name = part.get("dataset_class") if isinstance(part, dict) else None
    if not isinstance(getattr(host_loaders, str(name), None), type):
        raise UsageError(f"{where}.dataset_class", name, "a class of openood.datasets", "use ImglistDataset")


def _check_list(where: str, part: Any, classes: int, *, ood_allowed: bool = True) -> None:
    for key in ("data_dir", "imglist_pth"):
        value = part.get(key) if isinstance(part, dict) else None
        if not isinstance(value, str):
            raise UsageError(f"{where}.{key}", value, "a path", "give the YAML that has it")
    check_imglist(part["imglist_pth"], part["data_dir"], classes, ood_allowed=ood_allowed)


def _check_number(section: Any, name: str, kind: type | tuple[type, ...], where: str = "optimizer") -> None:
    value = section.get(name) if isinstance(section, dict) else None
    if not isinstance(value, kind) or not 0 < value < math.inf:  # type: ignore[operator]
        raise UsageError(
            f"{where}.{name}", repr(value), "a whole number above 0" if kind is int else "a number above 0", "set it in the YAML"
        )


def _check_train_sdood(config: Any) -> None:
    absent = [name for name in SPLITS if name not in config.dataset.split_names]
    unknown = sorted(set(config.trainer) - _TRAINER_KEYS)
    if absent or unknown:
        raise UsageError(
            "dataset.split_names" if absent else "trainer",
            config.dataset.split_names if absent else unknown,
            f"{', '.join(SPLITS)} among them" if absent else f"{', '.join(sorted(_TRAINER_KEYS))} only",
            "use a *_sdood_oe.yml beside the data set's own" if absent else "check the spelling",
        )
    _check_number(config.optimizer, "lr", (int, float))  # YAML reads 1e-3 as text: 1.0e-3


def _check_network(network: Any, classes: int, own: bool) -> None:
    if not network or network.num_classes != classes:
        raise UsageError(
            "network.num_classes",
            network and network.num_classes,
            f"{classes} like dataset.num_classes",
            "use '@{dataset.num_classes}'",
        )
    if own and network.name != "sdood":
        raise UsageError("network.name", network.name, "sdood, the network with three heads", "give networks/sdood_net.yml")
    if network.name != "sdood":
        check_stock_network(network)
    elif network.pretrained:
        net = build_network(type(network)({**network, "num_gpus": 0}), classes)
        if own:
            require_three_heads(net)


def _check_postprocessor(config: Any) -> None:
    name: Any = config.postprocessor and config.postprocessor.name
    wanted = _WANTED_NETWORKS.get(name)
    if wanted and config.network.name not in wanted:
        raise UsageError(
            "postprocessor.name",
            f"{name} on network {config.network.name}",
            f"a network {' or '.join(wanted)}, which it was made for",
            "choose another of the two; POSTPROCESSORS.md says which run on sdood",
        )
    if name == "sdood":
        return
    try:
        get_postprocessor(copy.deepcopy(config))
    except Exception as error:  # the host has no exceptions of its own
        said = "" if error.args == (name,) else f": {type(error).__name__} {error}".splitlines()[0]
        raise UsageError(
            "postprocessor.name",
            f"{name}{said}",
            "sdood, or one that the host can make",
            "give its YAML of configs/postprocessors",
        ) from error
