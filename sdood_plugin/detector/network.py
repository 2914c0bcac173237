"""The three-head network: one backbone f, heads g_bin (ID or outlier), g_in and g_out (which class)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..artifacts import read_tensors, write_tensors
from ..errors import RunError
from ..features import Backbone


class Heads(NamedTuple):
    """What the network says of B images."""

    features: torch.Tensor  # float (B, D)
    binary: torch.Tensor  # float (B, 2) logits of g_bin; class 1 is outlier
    inside: torch.Tensor  # float (B, C) logits of g_in
    outside: torch.Tensor  # float (B, C) logits of g_out


class ThreeHeadNet(nn.Module):
    """Backbone and heads; float (B, 3, H, W) images in [-1, 1] -> `Heads`.

    Args:
        backbone: f.
        classes: C.
        image_size: Side in pixels of the images it is trained on; any side works, this is what `Detector` asks for.
    """

    def __init__(self, backbone: Backbone, classes: int, image_size: int = 32) -> None:
        super().__init__()
        self.backbone = backbone
        self.classes = classes
        self.image_size = image_size
        self.g_bin = nn.Linear(backbone.feature_size, 2)
        self.g_in = nn.Linear(backbone.feature_size, classes)
        self.g_out = nn.Linear(backbone.feature_size, classes)

    def forward(self, inputs: torch.Tensor, half_way: bool = False) -> Heads:
        """Features and the logits of all heads, of images or, `half_way`, of what `Backbone.frozen_part` made of them."""
        features = self.backbone.trained_part(inputs) if half_way else self.backbone(inputs)
        return Heads(features, self.g_bin(features), self.g_in(features), self.g_out(features))


def save_network(path: Path, network: ThreeHeadNet) -> None:
    """Write weights and what is needed to build the network again as one safetensors file."""
    backbone = network.backbone
    info = {
        "backbone": backbone.name,
        "pooling": backbone.pooling,
        "input_size": str(backbone.input_size or ""),
        "classes": str(network.classes),
        "image_size": str(network.image_size),
    }
    write_tensors(path, network.state_dict(), info)


def load_network(path: Path) -> ThreeHeadNet:
    """The network of `save_network`, in evaluation mode on the CPU.

    Raises:
        RunError: The file is absent, broken or not of a three-head network.
    """
    from safetensors import safe_open

    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        info = file.metadata() or {}
    if not {"backbone", "pooling", "input_size", "classes", "image_size"} <= info.keys():
        raise RunError(
            f"file {path}", f"metadata {sorted(info)}", "a network written by `sdood train-detector`", "give detector.safetensors"
        )
    input_size = int(info["input_size"]) if info["input_size"] else None
    backbone = Backbone(info["backbone"], pooling=info["pooling"], input_size=input_size)
    network = ThreeHeadNet(backbone, int(info["classes"]), int(info["image_size"]))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(
            f"weights in {path}",
            str(error).splitlines()[-1].strip(),
            f"tensors of {info['backbone']} with {info['classes']} classes",
            "train the detector again",
        ) from error
    return network.eval()
