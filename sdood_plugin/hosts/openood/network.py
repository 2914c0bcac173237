"""The three-head network as an OpenOOD network.

OpenOOD's loaders give (x - mean) / std of x in [0, 1]; our backbones want 2 x - 1. The adapter turns the one into the
other in its first line, so loaders stay as they are; it must be told the loaders' mean and standard deviation by the
host's own name (`cifar10`, `cifar100`, `imagenet`, ...), or `half` where they have none and use 0.5, that is [-1, 1].
A stock OpenOOD checkpoint was trained on the loaders' numbers themselves and gets them untouched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from ...backbones import SmallCNN
from ...detector.network import Heads, ThreeHeadNet
from ...errors import UsageError
from ...features import Backbone

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of the channels of x in [0, 1]
HALF: Normalisation = ((0.5,) * 3, (0.5,) * 3)
HALF_NAMES = ("half", "mnist")  # 0.5 is what the host makes of any name it has no numbers for; `mnist` is one its own YAMLs use


class AbsentHead(nn.Module):
    """Stands where a checkpoint brought no head; any use of it says so."""

    def __init__(self, name: str, source: str) -> None:
        super().__init__()
        self.name, self.source = name, source

    def forward(self, features: torch.Tensor) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(
            f"head {self.name}",
            f"none in {self.source}",
            "a three-head network",
            "train one with the TrainSDOOD pipeline or `sdood train-detector`",
        )


class SDOODNet(nn.Module):
    """A `ThreeHeadNet` with OpenOOD's network interface; plain forward gives the C logits of g_in.

    Args:
        network: Backbone and heads.
        normalisation: What the host's loaders normalise by; a host name or (mean, standard deviation). None hands the
            loaders' numbers on as they are, for networks that were trained on them.
    """

    scale: torch.Tensor  # what `unit` multiplies by, float (3, 1, 1)
    offset: torch.Tensor  # and adds

    def __init__(self, network: ThreeHeadNet, normalisation: str | Normalisation | None) -> None:
        super().__init__()
        self.network = network
        self.classes = network.classes
        self.feature_size = network.backbone.feature_size
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.normalisation = host_normalisation(normalisation) if isinstance(normalisation, str) else normalisation
        mean, std = (torch.tensor(values)[:, None, None] for values in self.normalisation or HALF)
        self.register_buffer("scale", 2 * std, persistent=False)
        self.register_buffer("offset", 2 * mean - 1, persistent=False)

    def unit(self, data: torch.Tensor) -> torch.Tensor:
        """What the backbone takes, float (B, 3, H, W): [-1, 1] made of the loaders' data, in the network's dtype."""
        return (data * self.scale + self.offset).to(self.scale.dtype)

    def forward(
        self, x: torch.Tensor, return_feature: bool = False, return_feature_list: bool = False, return_heads: bool = False
    ) -> Any:
        """Logits float (B, C) of g_in for the loaders' images float (B, 3, H, W).

        With `return_feature` also features (B, D); with `return_feature_list` also the maps of the five stages, the last
        one pooled to (B, D, 1, 1); with `return_heads` a `Heads` instead, for training.
        """
        if return_heads:
            return self.heads(x)
        if return_feature_list and not return_feature:
            with self._captured() as maps:
                features = self.network.backbone(self.unit(x))
            return self.fc(features), [*maps[:-1], self.avgpool(maps[-1])]
        features = self.network.backbone(self.unit(x))
        logits = self.fc(features)
        return (logits, features) if return_feature else logits

    def heads(self, x: torch.Tensor) -> Heads:
        """Features and the logits of all three heads.

        Raises:
            UsageError: The network came from a stock checkpoint, which has no g_bin and no g_out.
        """
        return self.network(self.unit(x))

    def forward_threshold(self, x: torch.Tensor, threshold: float) -> torch.Tensor:
        """Logits of features clipped from above (ReAct)."""
        return self.fc(self.network.backbone(self.unit(x)).clip(max=threshold))

    def intermediate_forward(self, x: torch.Tensor, layer_index: int) -> torch.Tensor:
        """The map after stage 1 to 4.

        Raises:
            UsageError: Another stage.
        """
        if layer_index not in (1, 2, 3, 4):
            raise UsageError("layer_index", layer_index, "1, 2, 3 or 4", "choose one of them")
        with self._captured() as maps:
            self.network.backbone(self.unit(x))
        return maps[layer_index]

    @contextlib.contextmanager
    def _captured(self) -> Iterator[list[torch.Tensor]]:
        """The outputs of the stages of one forward pass, caught by hooks so that there is one path through the backbone."""
        maps: list[torch.Tensor] = []
        hooks = [
            stage.register_forward_hook(lambda module, inputs, output: maps.append(output))
            for stage in stage_ends(self.network.backbone)
        ]
        try:
            yield maps
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def fc(self) -> nn.Linear:
        """g_in, by the name stock postprocessors know."""
        return self.network.g_in

    @property
    def layer4(self) -> nn.Module:
        """What lies between the last two stages, by the name RankFeat knows."""
        body = self.network.backbone.body
        return body.layers[17:20] if isinstance(body, SmallCNN) else body.layer4  # type: ignore[return-value]

    def get_fc(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight float32 (C, D) and bias float32 (C,) of g_in as numpy arrays."""
        return self.fc.weight.detach().cpu().float().numpy(), self.fc.bias.detach().cpu().float().numpy()

    def get_fc_layer(self) -> nn.Linear:
        """g_in."""
        return self.fc


def host_normalisation(name: str) -> Normalisation:
    """Mean and standard deviation the host's loaders use for a data set of that name.

    Raises:
        UsageError: The host has no such name: it would take 0.5 without a word.
    """
    from .host import require_host

    require_host()
    from openood.preprocessors.transform import normalization_dict

    if name in HALF_NAMES:
        return HALF
    if name not in normalization_dict:
        known = ", ".join((*normalization_dict, *HALF_NAMES))
        raise UsageError("normalisation", name, f"one of {known}", "give what the loaders' data set is normalised by")
    mean, std = normalization_dict[name]
    return tuple(mean), tuple(std)


def stage_ends(backbone: Backbone) -> list[nn.Module]:
    """The five modules whose outputs are OpenOOD's feature list: stem and four stages.

    Raises:
        UsageError: The backbone has no four convolutional stages (a vision transformer, say).
    """
    body = backbone.body
    if isinstance(body, SmallCNN):
        return [body.layers[end] for end in (2, 5, 12, 16, 19)]
    names = ("maxpool", "layer1", "layer2", "layer3", "layer4")
    if not all(hasattr(body, name) for name in names):
        raise UsageError(
            "feature maps",
            backbone.name,
            "small_cnn, resnet18_cifar or a timm ResNet",
            "use a postprocessor that needs logits and features only",
        )
    return [getattr(body, name) for name in names]
