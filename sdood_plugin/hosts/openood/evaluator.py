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
from .compat import host_settings
from .device import on_device, replaced
from .host import require_host
from .imglist import check_imglist
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
        device: Where to work, for stock postprocessors too; None takes the network's device.
        skip_absent: Leave out OOD sets that are not under `data_root` and say their names; otherwise an absent one is an
            error.
        download: Let the host download what is absent.
        **arguments: The host's own: data_root, config_root, preprocessor, postprocessor_name, postprocessor, batch_size,
            shuffle, num_workers. `postprocessor_name` may be `sdood`.

    Raises:
        UsageError: Data or the postprocessor's YAML are absent, an imglist is wrong, or the network does not fit the data set.
    """

    def __init__(
        self,
        net: nn.Module,
        id_name: str,
        *,
        device: torch.device | str | None = None,
        skip_absent: bool = False,
        download: bool = False,
        **arguments: Any,
    ) -> None:
        if id_name not in host_datasets.DATA_INFO:
            raise UsageError("id_name", id_name, f"one of {', '.join(host_datasets.DATA_INFO)}", "check the spelling")
        self.device = torch.device(device) if device is not None else next(net.parameters()).device
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError("device", self.device, "a CUDA device", "use device='cpu'")
        info = host_datasets.DATA_INFO[id_name]
        _check_network(net, id_name, info["num_classes"], arguments.get("preprocessor"))
        _check_postprocessor(arguments)
        data_root = Path(arguments.get("data_root", "./data"))
        if not download:
            info = present(info, id_name, data_root, skip_absent)
        nothing = (lambda *_: None) if not download else host_evaluator.data_setup
        known = {**host_postprocessor.postprocessors, "sdood": SDOODPostprocessor}
        with (
            self._host(),
            replaced(host_evaluator, data_setup=nothing),
            replaced(host_postprocessor, postprocessors=known),
            replaced(host_datasets, DATA_INFO={**host_datasets.DATA_INFO, id_name: info}),
        ):
            super().__init__(net.to(self.device), id_name, **arguments)

    @contextlib.contextmanager
    def _host(self) -> Iterator[None]:
        with on_device(self.device), host_settings():
            yield

    def eval_acc(self, data_name: str = "id") -> float:
        """The host's accuracy in per cent."""
        with self._host():
            return super().eval_acc(data_name)

    def eval_ood(self, fsood: bool = False, progress: bool = True) -> Any:
        """The host's table: FPR@95 with OOD as the positive class, AUROC, AUPR_IN, AUPR_OUT, ACC; in per cent."""
        with self._host():
            return super().eval_ood(fsood, progress)

    def _eval_ood(self, id_list: Any, ood_split: str = "near", progress: bool = True) -> np.ndarray:
        if not self.dataloader_dict["ood"][ood_split]:
            return np.full((1, 5), np.nan)  # all of the group's sets were left out: no mean
        return super()._eval_ood(id_list, ood_split, progress)


def _check_network(net: nn.Module, id_name: str, classes: int, preprocessor: Any) -> None:
    if not isinstance(net, SDOODNet):
        return
    if net.classes != classes:
        raise UsageError("network", f"{net.classes} classes", f"{classes} as {id_name} has", "load the network of this data set")
    if preprocessor is None and net.normalisation is not None:
        loaders = host_preprocessor.default_preprocessing_dict[id_name]["normalization"]
        if not np.allclose(net.normalisation, loaders):
            raise UsageError(
                "normalisation of the network",
                net.normalisation,
                f"{loaders}, the loaders' of {id_name}",
                f"load it with normalisation={id_name!r}",
            )


def _check_postprocessor(arguments: dict[str, Any]) -> None:
    """The host would fetch an absent YAML from the network; it is an error here."""
    name = arguments.get("postprocessor_name")
    if arguments.get("postprocessor") is not None or name is None:
        return
    if name not in {*host_postprocessor.postprocessors, "sdood"}:
        raise UsageError("postprocessor_name", name, "a postprocessor of OpenOOD, or sdood", "check the spelling")
    root = arguments.get("config_root", "./configs")
    root = Path(host_evaluator.__file__).parents[2] / "configs" if root is None else Path(root)
    if not (root / "postprocessors" / f"{name}.yml").is_file():
        raise UsageError(
            "config_root",
            root,
            f"a folder with postprocessors/{name}.yml",
            "give the host's configs folder, or configs/openood for sdood",
        )


def present(info: dict[str, Any], id_name: str, data_root: Path, skip_absent: bool) -> dict[str, Any]:
    """The host's description of a data set without the OOD sets that are not there, every imglist checked.

    Raises:
        UsageError: An ID part or the OOD validation set is absent, or an OOD set and it may not be skipped; or a list is wrong.
    """
    classes, absent = info["num_classes"], []

    def there(part: dict[str, str]) -> bool:
        return (data_root / part["imglist_path"]).is_file()

    def check(part: dict[str, str]) -> None:
        check_imglist(data_root / part["imglist_path"], data_root / part["data_dir"], classes)

    for part in (*info["id"].values(), info["ood"]["val"]):
        check(part)
    ood: dict[str, Any] = {"val": info["ood"]["val"]}
    for group in ("near", "far"):
        kept = [name for name in info["ood"][group]["datasets"] if there(info["ood"][group][name])]
        absent += [name for name in info["ood"][group]["datasets"] if name not in kept]
        for name in kept:
            check(info["ood"][group][name])
        ood[group] = {**info["ood"][group], "datasets": kept}
    if absent and not skip_absent:
        raise UsageError(
            f"OOD sets of {id_name}",
            f"no {', '.join(absent)} under {data_root}",
            "all of the host's sets",
            "add them, give skip_absent=True to leave them out, or download=True to let the host fetch them",
        )
    if absent:
        log.warning("left out, not under %s: %s", data_root, ", ".join(absent))
    shifted = [name for name in info["csid"]["datasets"] if there(info["csid"][name])]
    return {**info, "ood": ood, "csid": {**info["csid"], "datasets": shifted}}
