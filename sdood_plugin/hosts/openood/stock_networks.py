"""The host's own networks, built once on the CPU before it builds them, and their checkpoints compared with them.

The host loads with `strict=False` and drops an `fc` that does not fit, so a file of another network leaves it untrained
without a word.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import SdoodError, UsageError
from .checkpoints import build_network, check_state, read_state
from .device import on_device, replaced
from .host import require_host

require_host()
from openood.networks import utils as host_networks  # noqa: E402 - only after the host is on the path

_FETCHED = ("wide_resnet_50_2",)  # building it downloads its weights
_PARTLY = ("dsvdd", "resnet18_256x256")  # the host's YAMLs give these an autoencoder's file and one of 1000 classes


def check_stock_network(section: Any) -> None:
    """Build the network of a YAML's `network` section as the host would, backbones too; all random states stay as they are.

    Raises:
        UsageError: The host has no such network or cannot build it, or a checkpoint of it is absent or another network's.
    """
    if section.name in _FETCHED:
        return
    stock, benchmark = host_networks.get_network, torch.backends.cudnn.benchmark

    def built(part: Any) -> Any:
        plain = {**part, "num_gpus": 0}
        if part.name == "sdood":
            return build_network(type(part)(plain), part.num_classes)
        net = stock(type(part)({**plain, "pretrained": False}))
        if part.pretrained:
            _check_checkpoint(part, net)
        return net

    try:
        with torch.random.fork_rng(devices=[], device_type="cpu"), on_device("cpu"), replaced(host_networks, get_network=built):
            built(copy.deepcopy(section))  # the host writes into it
    except SdoodError:
        raise
    except Exception as error:  # the host has no exceptions of its own
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError("network", f"{section.name}: {said}", "a network that the host can build", "check its YAML") from error
    finally:
        torch.backends.cudnn.benchmark = benchmark


def _check_checkpoint(section: Any, net: Any) -> None:
    given = section.checkpoint
    if isinstance(net, dict):
        if not isinstance(given, list) or len(given) != len(net):
            raise UsageError(
                "network.checkpoint", given, f"a list of one file each for {', '.join(net)}", "write none to skip one"
            )
        for (name, part), file in zip(net.items(), given, strict=True):
            if file not in (None, "none"):
                _check_file(Path(file), part, f"{section.name}'s {name}")
    elif section.name == "bit" and not section.normal_load:  # numpy's format
        if not Path(str(given)).is_file():
            raise UsageError("checkpoint", given, "a file", "check the path")
    elif section.name != "vit":  # whose weights the host does not load
        _check_file(Path(str(given)), net, section.name)


def _check_file(path: Path, net: nn.Module, name: str) -> None:
    """What a file brings against what a network has; files older than BatchNorm's count of batches may lack that."""
    found, wanted = read_state(path), net.state_dict()
    if name in _PARTLY and any(key in found for key in wanted):
        return
    wanted = {key: value for key, value in wanted.items() if key in found or not key.endswith(".num_batches_tracked")}
    check_state(wanted, found, path, name)
