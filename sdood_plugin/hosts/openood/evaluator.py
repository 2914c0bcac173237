"""OpenOOD's evaluator on any device, with absent data said in one line before anything runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import UsageError
from ..imglist import check_imglist, is_absent
from .compat import host_settings
from .device import on_device, replaced
from .host import require_host
from .network import SDOODNet

require_host()
from openood.evaluation_api import Evaluator as HostEvaluator  # noqa: E402 - only after the host is on the path
from openood.evaluation_api import datasets as host_datasets  # noqa: E402
from openood.evaluation_api import evaluator as host_evaluator  # noqa: E402
from openood.evaluation_api import postprocessor as host_postprocessor  # noqa: E402
from openood.evaluation_api import preprocessor as host_preprocessor  # noqa: E402

from .postprocessor import SDOODPostprocessor  # noqa: E402

log = logging.getLogger(__name__)


class Evaluator(HostEvaluator):
    """The host's evaluator; the numbers are the host's own on the same inputs.

    Args:
        net: Any OpenOOD network.
        id_name: The host's name of the ID data set.
        data_root: This and the next seven are the host's own, in its order.
        config_root: The folder with postprocessors/*.yml; None is the host's own.
        preprocessor: The images' transform; None is the host's for `id_name`.
        postprocessor_name: One of the host's, or `sdood`.
        postprocessor: In its place, a postprocessor.
        batch_size: Images a batch.
        shuffle: Whether the loaders shuffle.
        num_workers: Processes a loader starts.
        device: Where to work, for stock postprocessors too; None takes the network's device.
        skip_absent: Leave out near and far sets that are not under `data_root` and say their names; otherwise an absent one
            is an error. Absent covariate-shifted sets are left out and said in any case; asking for them is the error.
        download: Let the host download what is absent.

    Raises:
        UsageError: Data or the postprocessor's YAML are absent, an imglist is wrong, or the network does not fit the data set.
    """

    def __init__(
        self,
        net: nn.Module,
        id_name: str,
        data_root: str | Path = "./data",
        config_root: str | Path | None = "./configs",
        preprocessor: Any = None,
        postprocessor_name: str | None = None,
        postprocessor: Any = None,
        batch_size: int = 200,
        shuffle: bool = False,
        num_workers: int = 4,
        *,
        device: torch.device | str | None = None,
        skip_absent: bool = False,
        download: bool = False,
    ) -> None:
        if id_name not in host_datasets.DATA_INFO:
            raise UsageError("id_name", id_name, f"one of {', '.join(host_datasets.DATA_INFO)}", "check the spelling")
        self.device = torch.device(device) if device is not None else next(net.parameters()).device
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError("device", self.device, "a CUDA device", "use device='cpu'")
        info = host_datasets.DATA_INFO[id_name]
        _check_network(net, id_name, info["num_classes"], preprocessor)
        if postprocessor is None and postprocessor_name is not None:
            _check_postprocessor(postprocessor_name, config_root)
        if download:
            host_datasets.data_setup(str(data_root), id_name)
        info = present(info, id_name, Path(data_root), skip_absent)
        loading = {"batch_size": batch_size, "shuffle": shuffle, "num_workers": num_workers}
        known = {**host_postprocessor.postprocessors, "sdood": SDOODPostprocessor}
        with (
            self._host(),
            replaced(host_evaluator, data_setup=lambda *_: None),
            replaced(host_postprocessor, postprocessors=known),
            replaced(host_datasets, DATA_INFO={**host_datasets.DATA_INFO, id_name: info}),
        ):
            super().__init__(
                net.to(self.device),
                id_name,
                str(data_root),
                config_root,
                preprocessor,
                postprocessor_name,
                postprocessor,
                **loading,
            )

    @contextlib.contextmanager
    def _host(self) -> Iterator[None]:
        with on_device(self.device), host_settings():
            yield

    def eval_acc(self, data_name: str = "id") -> float:
        """The host's accuracy in per cent.

        Raises:
            UsageError: `csid` is asked for and no covariate-shifted set is there.
        """
        if data_name == "csid":
            self._require_shifted()
        with self._host():
            return super().eval_acc(data_name)

    def eval_ood(self, fsood: bool = False, progress: bool = True) -> Any:
        """The host's table: FPR@95 with OOD as the positive class, AUROC, AUPR_IN, AUPR_OUT, ACC; in per cent.

        Raises:
            UsageError: `fsood` is asked for and no covariate-shifted set is there.
        """
        if fsood:
            self._require_shifted()
        with self._host():
            return super().eval_ood(fsood, progress)

    def _require_shifted(self) -> None:
        if not self.dataloader_dict["csid"]:
            wanted = ", ".join(host_datasets.DATA_INFO[self.id_name]["csid"]["datasets"])
            raise UsageError(
                f"covariate-shifted sets of {self.id_name}",
                "none under data_root",
                f"at least one of {wanted}" if wanted else "at least one",
                "add it, or evaluate without them: eval_ood() and eval_acc()",
            )

    def _eval_ood(self, id_list: Any, ood_split: str = "near", progress: bool = True) -> np.ndarray:
        if not self.dataloader_dict["ood"][ood_split]:
            return np.full((1, 5), np.nan)  # all of the group's sets were left out: no mean
        return super()._eval_ood(id_list, ood_split, progress)


def _check_network(net: nn.Module, id_name: str, classes: int, preprocessor: Any) -> None:
    found = _classes(net)
    if found not in (None, classes):
        raise UsageError("network", f"{found} classes", f"{classes} as {id_name} has", "load the network of this data set")
    if not isinstance(net, SDOODNet):
        return
    if preprocessor is None and net.normalisation is not None:
        loaders = host_preprocessor.default_preprocessing_dict[id_name]["normalization"]
        if not np.allclose(net.normalisation, loaders):
            raise UsageError(
                "normalisation of the network",
                net.normalisation,
                f"{loaders}, the loaders' of {id_name}",
                f"load it with normalisation={id_name!r}",
            )


def _classes(net: nn.Module) -> int | None:
    """How many classes a host network says it tells apart; None where it does not say."""
    if type(net).__module__ == "openood.networks.bit":  # MOS adds a logit to each group of classes
        return None
    try:
        return len(net.get_fc()[1])  # type: ignore[operator]
    except (AttributeError, TypeError):
        said = getattr(net, "num_classes", None)
        return said if isinstance(said, int) else None


def _check_postprocessor(name: str, config_root: str | Path | None) -> None:
    """The host would fetch an absent YAML from the network; it is an error here."""
    if name not in {*host_postprocessor.postprocessors, "sdood"}:
        raise UsageError("postprocessor_name", name, "a postprocessor of OpenOOD, or sdood", "check the spelling")
    root = Path(host_evaluator.__file__).parents[2] / "configs" if config_root is None else Path(config_root)
    if not (root / "postprocessors" / f"{name}.yml").is_file():
        raise UsageError(
            "config_root",
            root,
            f"a folder with postprocessors/{name}.yml",
            "give the host's configs folder, or configs/openood for sdood",
        )


def present(info: dict[str, Any], id_name: str, data_root: Path, skip_absent: bool) -> dict[str, Any]:
    """The host's description of a data set without the sets that are not there, every imglist checked.

    Raises:
        UsageError: An ID part or the OOD validation set is absent, or an OOD set and it may not be skipped; or a list is wrong.
    """

    def place(part: dict[str, str]) -> tuple[Path, Path]:
        return data_root / part["imglist_path"], data_root / part["data_dir"]

    groups = {"near": info["ood"]["near"], "far": info["ood"]["far"], "csid": info["csid"]}
    absent = {group: [name for name in sets["datasets"] if is_absent(*place(sets[name]))] for group, sets in groups.items()}
    kept = {
        group: {**sets, "datasets": [name for name in sets["datasets"] if name not in absent[group]]}
        for group, sets in groups.items()
    }
    near, far, shifted = ([sets[name] for name in sets["datasets"]] for sets in kept.values())
    for part in (*info["id"].values(), *shifted):
        check_imglist(*place(part), info["num_classes"], ood_allowed=False)
    for part in (info["ood"]["val"], *near, *far):
        check_imglist(*place(part), info["num_classes"])
    unknown = absent["near"] + absent["far"]
    if unknown and not skip_absent:
        raise UsageError(
            f"OOD sets of {id_name}",
            f"no {', '.join(unknown)} under {data_root}",
            "all of the host's sets",
            "add them, give skip_absent=True to leave them out, or download=True to let the host fetch them",
        )
    if left_out := unknown + absent["csid"]:
        log.warning("left out, not under %s: %s", data_root, ", ".join(left_out))
    return {**info, "ood": {**info["ood"], "near": kept["near"], "far": kept["far"]}, "csid": kept["csid"]}
