"""Networks from files: our safetensors, the host recorder's checkpoints of ours, and stock OpenOOD ResNet-18s."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...detector.network import ThreeHeadNet, load_network
from ...errors import UsageError
from ...features import Backbone, load_backbone
from .network import AbsentHead, Normalisation, SDOODNet


def load_detector(path: str | Path, normalisation: str | Normalisation | None = "cifar10") -> SDOODNet:
    """Our network from a run folder, its `detector` folder or a .safetensors file, in evaluation mode on the CPU.

    Args:
        path: Where it is.
        normalisation: What the host's loaders normalise by.
    """
    path = Path(path)
    files = [path, path / "detector.safetensors", path / "detector" / "detector.safetensors"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UsageError(
            "detector",
            path,
            "a run folder, a detector folder or a .safetensors file",
            "check the path or run `sdood train-detector`",
        )
    return SDOODNet(load_network(file), normalisation).eval()


def load_checkpoint(
    path: str | Path,
    classes: int,
    *,
    backbone: str = "resnet18_cifar",
    pooling: str = "own",
    input_size: int | None = None,
    normalisation: str | Normalisation | None = "cifar10",
) -> SDOODNet:
    """Any checkpoint the host's user may have, in evaluation mode on the CPU.

    A stock OpenOOD ResNet-18 32x32 is timm's ResNet-18 with another name for the shortcuts, so it becomes a
    `resnet18_cifar`; its `fc` becomes g_in, g_bin and g_out are absent and say so when used.

    Args:
        path: Our .safetensors (or run folder), the host recorder's `best.ckpt` of our network, or a stock ResNet-18.
        classes: C, checked against the checkpoint's.
        backbone: The backbone a `best.ckpt` of ours was trained with; the file does not say it.
        pooling: As `backbone`.
        input_size: As `backbone`.
        normalisation: What the host's loaders normalise by; stock checkpoints ignore it.

    Raises:
        UsageError: The file is absent or no checkpoint, is of another backbone or of another number of classes.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        net = load_detector(path, normalisation)
        _check_classes(path, net.classes, classes)
        return net
    tensors = {key.removeprefix("module."): value for key, value in read_state(path).items()}
    if any(key.startswith("network.") for key in tensors):
        network = ThreeHeadNet(load_backbone(backbone, None, pooling=pooling, input_size=input_size), classes)
        own = {key.removeprefix("network."): value for key, value in tensors.items()}
        _check_classes(path, len(own.get("g_in.weight", ())), classes)
        _load(network, own, path, backbone)
        return SDOODNet(network, normalisation).eval()
    return _stock(path, tensors, classes)


def _stock(path: Path, tensors: dict[str, torch.Tensor], classes: int) -> SDOODNet:
    if "fc.weight" not in tensors or "conv1.weight" not in tensors:
        raise UsageError(
            f"checkpoint {path}",
            f"tensors such as {', '.join(sorted(tensors)[:2])}",
            "those of OpenOOD's ResNet18_32x32 or of our network",
            "give the checkpoint of this backbone",
        )
    _check_classes(path, len(tensors["fc.weight"]), classes)
    network = ThreeHeadNet(Backbone("resnet18_cifar"), classes)
    renamed = {key.replace(".shortcut.", ".downsample."): value for key, value in tensors.items()}
    own = {
        f"g_in.{key.removeprefix('fc.')}" if key.startswith("fc.") else f"backbone.body.{key}": value
        for key, value in renamed.items()
    }
    for name in ("g_bin", "g_out"):
        setattr(network, name, AbsentHead(name, str(path)))
    _load(network, own, path, "OpenOOD's ResNet18_32x32")
    return SDOODNet(network, None).eval()


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, by the names they have there, on the CPU.

    Raises:
        UsageError: The file is absent or no state dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError("checkpoint", path, "a file", "check the path") from error
    except Exception as error:  # noqa: BLE001 - of a file that is no checkpoint torch.load may raise anything
        raise UsageError(
            f"checkpoint {path}",
            (str(error) or type(error).__name__).splitlines()[0],
            "a state dict that loads with weights_only",
            "save it again as a state dict",
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        raise UsageError(
            f"checkpoint {path}",
            type(content).__name__,
            "a state dict, tensors by name",
            "give the file the host's recorder writes (best.ckpt)",
        )
    return dict(content)


def _check_classes(path: Path, found: int, wanted: int) -> None:
    if found != wanted:
        raise UsageError(
            f"checkpoint {path}", f"{found} classes", f"{wanted} as the data set has", "give the checkpoint of this data set"
        )


def _load(network: ThreeHeadNet, tensors: dict[str, torch.Tensor], path: Path, name: str) -> None:
    check_state(network.state_dict(), tensors, path, name)
    network.load_state_dict(tensors)


def check_state(wanted: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], path: Path, name: str) -> None:
    """Make sure that a file's tensors are those of a network, no fewer and no more, in name and shape.

    Raises:
        UsageError: They are not.
    """
    wrong = next((key for key in wanted if key not in tensors or tensors[key].shape != wanted[key].shape), None)
    wrong = wrong or next((key for key in tensors if key not in wanted), None)
    if wrong is not None:
        found = f"{wrong} of shape {tuple(tensors[wrong].shape)}" if wrong in tensors else f"no {wrong}"
        shape = f" with {tuple(wanted[wrong].shape)}" if wrong in tensors and wrong in wanted else ""
        raise UsageError(f"checkpoint {path}", found, f"the tensors of {name}{shape}", "give the checkpoint of this backbone")


def build_network(config: Any, classes: int) -> SDOODNet:
    """The network of a YAML's `network` section, as the host's `get_network` would make it.

    Args:
        config: The section: backbone, normalization_type, pretrained, checkpoint, num_gpus; and pooling, input_size and
            weights, as of a detector, where it has them.
        classes: C.

    Raises:
        UsageError: As `load_checkpoint` and `features.load_backbone`; and where the checkpoint says its backbone and the
            section names another one.
        RunError: There are no such weights.
    """
    normalisation, name = str(config.normalization_type), str(config.backbone)
    form: dict[str, Any] = {"pooling": config.get("pooling") or "own", "input_size": config.get("input_size") or None}
    if config.pretrained:
        net = load_checkpoint(str(config.checkpoint), classes, backbone=name, normalisation=normalisation, **form)
        found = net.network.backbone.name
        if found != name:
            raise UsageError("network.backbone", name, f"{found} as in {config.checkpoint}", f"set it to {found}")
    else:
        net = SDOODNet(ThreeHeadNet(load_backbone(name, config.get("weights") or None, **form), classes), normalisation)
    if config.num_gpus > 0:
        net = net.cuda()
    if config.num_gpus > 1:
        device = next(net.parameters()).device
        own = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(net, device_ids=own)  # type: ignore[return-value]
    return net
