"""Backbones, images -> features, and the feature matrix of a whole set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from .artifacts import read_tensors
from .data.images import to_unit
from .errors import UsageError


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


class Backbone(nn.Module):
    """Any backbone behind one interface: float (B, 3, H, W) in [-1, 1] -> features (B, D).

    A timm model gets its images bicubically resized to its own input size and normalised by its own mean and standard
    deviation, here and nowhere else, so that ID, OOD and outliers take the same way.

    Args:
        name: `small_cnn`, `resnet18_cifar` (timm's ResNet-18 with a 3 x 3 stem and no pooling, He et al. 2016, section
            4.2), or the name of a timm model.

    Raises:
        UsageError: timm knows no model of that name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.input_size: int | None = None
        self.scale: torch.Tensor
        self.offset: torch.Tensor
        mean: tuple[float, ...] = (0.5,) * 3
        std: tuple[float, ...] = (0.5,) * 3
        if name == "small_cnn":
            self.body: nn.Module = SmallCNN()
        elif name == "resnet18_cifar":
            self.body = _resnet18_cifar()
        else:
            self.body, self.input_size, mean, std = _timm(name)
        self.feature_size: int = int(self.body.num_features)  # type: ignore[arg-type]
        self.register_buffer("scale", 0.5 / torch.tensor(std)[:, None, None], persistent=False)
        self.register_buffer(
            "offset", (0.5 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None], persistent=False
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of float (B, 3, H, W) images in [-1, 1]."""
        if self.input_size is not None and images.shape[-1] != self.input_size:
            images = F.interpolate(images, size=(self.input_size,) * 2, mode="bicubic", align_corners=False, antialias=True)
        return self.body(images * self.scale + self.offset)


def _resnet18_cifar() -> nn.Module:
    import timm

    model = timm.create_model("resnet18", num_classes=0)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def check_backbone(name: str) -> None:
    """Make sure that there is a backbone of this name.

    Raises:
        UsageError: timm knows no model of that name.
    """
    if name in ("small_cnn", "resnet18_cifar"):
        return
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise UsageError(
            "backbone",
            name,
            f"small_cnn, resnet18_cifar or a timm model such as {near or ['vit_tiny_patch16_224']}",
            "check the name",
        )


def _timm(name: str) -> tuple[nn.Module, int, tuple[float, ...], tuple[float, ...]]:
    import timm

    check_backbone(name)
    model = timm.create_model(name, num_classes=0)
    settings = timm.data.resolve_data_config({}, model=model)
    return model, settings["input_size"][-1], settings["mean"], settings["std"]


def load_backbone(name: str, weights: str | Path | None) -> Backbone:
    """A backbone with weights from a safetensors file (keys of the timm model or of `Backbone`), or random ones.

    Raises:
        UsageError: The file's tensors do not fit the model.
    """
    backbone = Backbone(name)
    if weights is None:
        return backbone
    tensors = read_tensors(Path(weights))
    own = {key.removeprefix("body."): value for key, value in tensors.items()}
    wanted = backbone.body.state_dict()
    kept = {key: value for key, value in own.items() if key in wanted}
    absent = sorted(set(wanted) - set(kept))
    misfit = [key for key, value in kept.items() if value.shape != wanted[key].shape]
    if absent or misfit:
        raise UsageError(
            f"weights {weights}",
            f"no {absent[0]}" if absent else f"{misfit[0]} of shape {tuple(kept[misfit[0]].shape)}",
            f"every tensor of {name}",
            "give the weights of this backbone",
        )
    backbone.body.load_state_dict(kept)
    return backbone


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, each submodule's own mode restored afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def extract(model: nn.Module, images: torch.Tensor, *, device: torch.device, batch_size: int = 256) -> torch.Tensor:
    """Apply `model` in evaluation mode to a whole set.

    Args:
        model: Maps float (B, 3, H, W) in [-1, 1] to (B, D).
        images: uint8 (N, 3, H, W).
        device: Where to compute; the model is expected there.
        batch_size: Images at once; results do not depend on it beyond rounding.

    Returns:
        float32 (N, D) on `device`.
    """
    with evaluating(model):
        parts = [
            model(to_unit(images[start : start + batch_size].to(device))).float() for start in range(0, len(images), batch_size)
        ]
    return torch.cat(parts)
