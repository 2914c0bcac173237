"""The networks behind `features.Backbone`: our small one, timm's, and which weights and poolings fit them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import RunError, UsageError

HUB = "hub"  # in place of a file of weights: timm's own pre-trained ones
RANDOM = "random"  # in place of a file of weights
OWN = ("small_cnn", "resnet18_cifar")  # the names that are not timm's
_CLASSIFIERS = ("head", "head_dist", "fc", "classifier")  # what a classifier is called where timm does not say it of the model


class SmallCNN(nn.Module):
    """Three stages of two 3 x 3 convolutions for images of 16 to 32 px; float (B, 3, H, W) -> (B, 128)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, out in enumerate((width, 2 * width, 4 * width)):
            for _ in range(2):
                layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
            if stage < 2:
                layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.num_features = channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features of the last stage."""
        return self.layers(images).mean(dim=(2, 3))

    @staticmethod
    def group_matcher(coarse: bool = False) -> Callable[[str], int]:
        """timm's way to say which block a parameter belongs to: here its stage, the first one being the stem."""
        return lambda name: int(name.split(".")[1]) // 7  # a stage is two of convolution, norm and ReLU, and a pooling


def weights_file(weights: str | Path | None) -> Path | None:
    """The file that `weights` names; None where they are `hub`, `random` or null."""
    return None if weights in (None, HUB, RANDOM) else Path(str(weights))


def require_hub_weights(name: str) -> None:
    """Make sure that timm has weights for a network; nothing is downloaded.

    Raises:
        UsageError: It has none.
    """
    import timm

    if name in OWN or (timm.is_model(name) and not timm.models.is_model_pretrained(name)):
        raise UsageError(
            "weights", HUB, f"a safetensors file for {name}", "give one, or the name of a timm model that has weights"
        )


def make_body(name: str, pretrained: bool = False) -> tuple[nn.Module, int | None, tuple[float, ...], tuple[float, ...]]:
    """A network without a classifier, its input side (None: any), and the mean and deviation its images want.

    Raises:
        UsageError: timm knows no model of that name, or has no weights for it.
        RunError: The weights could not be had.
    """
    if pretrained:
        require_hub_weights(name)
    if name in OWN:
        return SmallCNN() if name == "small_cnn" else _resnet18_cifar(), None, (0.5,) * 3, (0.5,) * 3
    return _timm(name, pretrained)


def _resnet18_cifar() -> nn.Module:
    import timm

    model = timm.create_model("resnet18", num_classes=0)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, int, tuple[float, ...], tuple[float, ...]]:
    import timm

    architecture, dot, _ = name.partition(".")
    tagged = timm.list_models(f"{architecture}.*", include_tags=True) if dot else []
    if not timm.is_model(name) or (dot and name not in tagged):
        near = tagged[:5] or timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise UsageError(
            "backbone",
            name,
            f"small_cnn, resnet18_cifar or a timm model such as {near or ['vit_tiny_patch16_224']}",
            "check the name",
        )
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError) as error:  # of many kinds, no connection among them
        if not pretrained:
            raise
        raise RunError(
            f"weights of {name} from the hub",
            f"{type(error).__name__}: {error}",
            "a connection, or a copy in the cache",
            "download them elsewhere and give the safetensors file",
        ) from error
    settings = timm.data.resolve_data_config({}, model=model)
    return model, settings["input_size"][-1], settings["mean"], settings["std"]


def is_plain_vit(body: nn.Module) -> bool:
    """Whether `forward_intermediates`, `blocks`, `norm` and `forward_head` are all there is to its forward pass."""
    from timm.models.vision_transformer import VisionTransformer

    return type(body) is VisionTransformer  # its subclasses take other ways through their blocks


def set_pooling(name: str, body: Any, pooling: str) -> None:
    """Choose the class token or the mean token; timm's `forward_head` then gives it.

    Raises:
        UsageError: The model has no such token, or its `forward_head` is not known to give it.
    """
    if pooling == "own":
        return
    from timm.models import beit, eva, vision_transformer

    known = (vision_transformer.VisionTransformer, beit.Beit, eva.Eva)  # relatives average two tokens, or pool anew
    if type(body) not in known or (pooling == "cls" and body.cls_token is None):
        raise UsageError(
            "detector.pooling",
            pooling,
            f"own for {name}",
            "cls and mean are for timm's VisionTransformer, Beit and Eva, cls where they have the token",
        )
    body.reset_classifier(0, "token" if pooling == "cls" else "avg")


def fitting_weights(tensors: dict[str, torch.Tensor], body: nn.Module, name: str, file: object) -> dict[str, torch.Tensor]:
    """Those of a file's tensors that are the body's, with or without the prefix `body.`.

    Left out are those of a classifier, and of a pooling that the body was given another for.

    Raises:
        UsageError: One is absent, has another shape, or is of nothing the body has; the message counts them.
    """
    wanted = body.state_dict()
    prefix = "" if tensors.keys() & wanted.keys() else "body."  # which some of timm's own names begin with
    own = {key.removeprefix(prefix): value for key, value in tensors.items()}
    kept = {key: value for key, value in own.items() if key in wanted}
    misfit = [key for key, value in kept.items() if value.shape != wanted[key].shape]
    cases = [
        [f"no {key}" for key in sorted(set(wanted) - set(kept))],
        [f"{key} of shape {tuple(kept[key].shape)}, not {tuple(wanted[key].shape)}" for key in misfit],
        [f"{key}, which it has not" for key in sorted(_foreign(set(own) - set(kept), body, name))],
    ]
    for found in cases:
        if found:
            raise UsageError(
                f"weights {file}",
                f"{found[0]} ({len(found)} such of {len(wanted)} tensors)",
                f"every tensor of {name} and no other",
                "give the weights of this backbone",
            )
    return kept


def _foreign(keys: set[str], body: nn.Module, name: str) -> set[str]:
    """Those of the keys that neither a classifier of this network nor timm's whole model of that name has."""
    said: Any = getattr(body, "pretrained_cfg", {}).get("classifier") or ()
    layers = (*_CLASSIFIERS, *((said,) if isinstance(said, str) else said))
    keys = {key for key in keys if not key.startswith(tuple(f"{layer}." for layer in layers))}
    if not keys or name in OWN:
        return keys
    import timm

    with torch.device("meta"):
        return keys - timm.create_model(name).state_dict().keys()
