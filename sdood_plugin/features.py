"""Backbones, images -> features, and the feature matrix of a whole set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from .artifacts import read_tensors
from .backbones import HUB, fitting_weights, is_plain_vit, make_body, require_hub_weights, set_pooling, weights_file
from .data.images import to_unit
from .errors import RunError, UsageError


class Backbone(nn.Module):
    """Any backbone behind one interface: float (B, 3, H, W) in [-1, 1] -> features (B, D).

    Images are bicubically resized to the input size and normalised by the timm model's own mean and standard deviation,
    here and nowhere else, so that ID, OOD and outliers take the same way.

    Args:
        name: `small_cnn`, `resnet18_cifar` (timm's ResNet-18 with a 3 x 3 stem and no pooling, He et al. 2016, section
            4.2), or the name of a timm model.
        pooling: `own` is the model's; `cls` the class token and `mean` the mean token of a transformer.
        input_size: Side in pixels the images are resized to; None is a timm model's own and leaves images as they are
            for the other two. A transformer's position embedding is interpolated to it.
        pretrained: With timm's own pre-trained weights.

    Raises:
        UsageError: timm knows no model of that name, or the model has no such pooling or takes no such input size.
        RunError: Its pre-trained weights could not be had.
    """

    def __init__(self, name: str, *, pooling: str = "own", input_size: int | None = None, pretrained: bool = False) -> None:
        super().__init__()
        self.name, self.pooling = name, pooling
        self.scale: torch.Tensor
        self.offset: torch.Tensor
        self.input_size: int | None
        self.body, self.input_size, mean, std = make_body(name, pretrained)
        set_pooling(name, self.body, pooling)
        self.feature_size: int = int(getattr(self.body, "head_hidden_size", self.body.num_features))  # type: ignore[arg-type]
        self.register_buffer("scale", 0.5 / torch.tensor(std)[:, None, None], persistent=False)
        self.register_buffer(
            "offset", (0.5 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None], persistent=False
        )
        self.frozen: list[nn.Module] = []  # kept in evaluation mode
        self.half_way: int | None = None  # blocks that `frozen_part` runs; None: it only prepares the images
        if input_size is not None:
            self.resize_input(input_size)

    def resize_input(self, side: int) -> None:
        """Take images of `side` pixels from now on; call it after a transformer got its weights.

        Raises:
            UsageError: The model's position embedding cannot be taken to that size.
        """
        body: Any = self.body
        if side != self.input_size and hasattr(body, "set_input_size"):
            with _naming_the_size(self.name, side):
                body.set_input_size(img_size=(side, side))
        self.input_size = side

    def layers(self) -> dict[str, int]:
        """The layer each parameter of the body belongs to, as timm groups them: 0 is the stem, then one a block.

        Raises:
            UsageError: timm does not say it of this model.
        """
        from timm.models import group_parameters

        body: Any = self.body
        if not hasattr(body, "group_matcher"):
            raise UsageError("backbone", self.name, "a model whose blocks timm knows", "set frozen_blocks 0 and layer_decay 1")
        return group_parameters(body, body.group_matcher(coarse=False), reverse=True)

    def freeze(self, blocks: int | Literal["all"]) -> None:
        """Keep the stem and the first `blocks` blocks as they are, in evaluation mode; 0 keeps nothing.

        Raises:
            UsageError: There are not so many blocks.
        """
        if blocks == "all":
            self.requires_grad_(False)
            self.frozen = [self.body]
        elif blocks:
            self._freeze_first(blocks)
        self.train(self.training)

    def _freeze_first(self, blocks: int) -> None:
        layers = self.layers()
        most = max(layers.values())
        if blocks >= most:
            raise UsageError("detector.frozen_blocks", blocks, f"below {most} for {self.name}, or all", "lower it or give all")
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(layers[name] > blocks)
        own = [(part, list(part.parameters())) for part in self.body.modules()]
        self.frozen = [part for part, parameters in own if parameters and not any(p.requires_grad for p in parameters)]
        self.half_way = blocks if is_plain_vit(self.body) else None

    @property
    def has_frozen_part(self) -> bool:
        """Whether `frozen_part` does more than prepare the images: its outputs can be computed once."""
        return self.half_way is not None or self.frozen[:1] == [self.body]

    def train(self, mode: bool = True) -> Backbone:
        """Training mode for all but the frozen parts."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def frozen_part(self, images: torch.Tensor) -> torch.Tensor:
        """Float (B, 3, H, W) images resized, normalised and, where the split is known, through the frozen blocks.

        The split is known of timm's plain vision transformers, whose tokens (B, L, D) it gives, and of a backbone that
        is frozen as a whole, whose features (B, D) it gives.
        """
        if self.input_size is not None and images.shape[-1] != self.input_size:
            images = F.interpolate(images, size=(self.input_size,) * 2, mode="bicubic", align_corners=False, antialias=True)
        images = images * self.scale + self.offset
        if not self.has_frozen_part:
            return images
        body: Any = self.body
        with torch.no_grad():
            if self.half_way is None:
                return body(images)
            extra = body.num_prefix_tokens > 0
            (tokens,) = body.forward_intermediates(
                images,
                indices=[self.half_way - 1],
                return_prefix_tokens=extra,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
            return torch.cat([tokens[1], tokens[0]], dim=1) if extra else tokens

    def trained_part(self, values: torch.Tensor) -> torch.Tensor:
        """Features of what `frozen_part` gave."""
        body: Any = self.body
        if self.half_way is not None:
            return body.forward_head(body.norm(body.blocks[self.half_way :](values)))
        return values if self.has_frozen_part else body(values)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of float (B, 3, H, W) images in [-1, 1]."""
        return self.trained_part(self.frozen_part(images))


def check_backbone(
    name: str,
    weights: str | Path | None = None,
    *,
    pooling: str = "own",
    input_size: int | None = None,
    frozen_blocks: int | Literal["all"] = 0,
    layer_decay: float = 1.0,
) -> None:
    """Make sure, at no cost, that `load_backbone`, `Backbone.freeze`, a forward pass and rates by layer will do.

    Raises:
        UsageError: What they would raise.
    """
    with torch.device("meta"), torch.no_grad():
        backbone = Backbone(name, pooling=pooling)
        if weights == HUB:
            require_hub_weights(name)
        if file := weights_file(weights):
            fitting_weights(read_tensors(file), backbone.body, name, weights)
        if input_size is not None:
            backbone.resize_input(input_size)
        backbone.freeze(frozen_blocks)
        if layer_decay < 1:
            backbone.layers()
        side = backbone.input_size or 32
        with _naming_the_size(name, side):
            backbone.eval()(torch.empty(1, 3, side, side))


@contextlib.contextmanager
def _naming_the_size(name: str, side: int) -> Iterator[None]:
    """What a model says of images of that side, as an error that names the setting."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError("detector.input_size", side, f"a size {name} can take: {error}", "change it, or give null") from error


def load_backbone(name: str, weights: str | Path | None, *, pooling: str = "own", input_size: int | None = None) -> Backbone:
    """A backbone with weights of a safetensors file (keys of the timm model or of `Backbone`), timm's (`hub`) or random ones.

    Raises:
        UsageError: The file's tensors, the pooling or the input size do not fit the model.
        RunError: The hub's weights could not be had.
    """
    backbone = Backbone(name, pooling=pooling, pretrained=weights == HUB)
    if file := weights_file(weights):
        backbone.body.load_state_dict(fitting_weights(read_tensors(file), backbone.body, name, weights))
    if input_size is not None:
        backbone.resize_input(input_size)
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


def require_finite(features: torch.Tensor, name: Callable[[int], str]) -> None:
    """Make sure that the features (N, D) of N images are numbers.

    Args:
        features: What `extract` gives.
        name: The name of the image at a row.

    Raises:
        RunError: They are not; the first such image is named.
    """
    broken = (~torch.isfinite(features).all(dim=1)).nonzero()[:, 0].tolist()
    if broken:
        raise RunError(
            f"features of image {name(broken[0])}",
            f"NaN or infinity ({len(broken)} of {len(features)} images)",
            "finite numbers",
            "look at that image; if all are so, train the detector again",
        )
