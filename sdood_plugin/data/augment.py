"""Augmentation of a whole batch at once, on its device, from an explicit generator.

Libraries of augmentations draw from the global generator or once a batch; here every image has its own draw and the
draw is the caller's, so that a resumed training sees the same views.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def affine(
    images: torch.Tensor, generator: torch.Generator, *, shift: float, scale: tuple[float, float], turn: float
) -> torch.Tensor:
    """Shift, scale and turn each image, edges reflected.

    Args:
        images: float (B, 3, H, W).
        generator: Source of randomness, on the images' device.
        shift: Largest shift as a share of the side.
        scale: Range of the enlargement (below 1 shrinks).
        turn: Largest angle in radians.
    """
    count, device = len(images), images.device
    draw = torch.rand(4, count, generator=generator, device=device) * 2 - 1
    factor = 1.0 / (scale[0] + (scale[1] - scale[0]) * (draw[2] + 1) / 2)
    angle = draw[3] * turn
    cos, sin = factor * torch.cos(angle), factor * torch.sin(angle)
    theta = torch.stack([cos, -sin, 2 * shift * draw[0], sin, cos, 2 * shift * draw[1]], dim=1).reshape(count, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="reflection", align_corners=False)


def flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each float (B, 3, H, W) image left to right with probability one half."""
    chosen = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def grey(images: torch.Tensor, generator: torch.Generator, probability: float) -> torch.Tensor:
    """Replace each float (B, 3, H, W) image by its luma with the given probability."""
    luma = (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)
    chosen = torch.rand(len(images), generator=generator, device=images.device) < probability
    return torch.where(chosen[:, None, None, None], luma.expand_as(images), images)


def mix_colours(images: torch.Tensor, generator: torch.Generator, *, strength: float) -> torch.Tensor:
    """Multiply each image's channels by a random matrix and add a random colour: what a colour is stops mattering.

    Args:
        images: float (B, 3, H, W) in [-1, 1].
        generator: Source of randomness, on the images' device.
        strength: 0 leaves the image, 1 is a wholly random mixture.
    """
    count, device = len(images), images.device
    random = torch.randn(count, 3, 3, generator=generator, device=device) / 3**0.5
    matrix = (1 - strength) * torch.eye(3, device=device) + strength * random
    offset = strength * 0.5 * torch.randn(count, 3, 1, 1, generator=generator, device=device)
    return torch.einsum("bij,bjhw->bihw", matrix, images) + offset


def jitter(
    images: torch.Tensor, generator: torch.Generator, *, brightness: float, contrast: float, colour: float
) -> torch.Tensor:
    """Random brightness, contrast and channel gains, each image its own; float (B, 3, H, W) in [-1, 1]."""
    count, device = len(images), images.device
    draw = torch.rand(3, count, 1, 1, 1, generator=generator, device=device) * 2 - 1
    gains = 1 + colour * (torch.rand(count, 3, 1, 1, generator=generator, device=device) * 2 - 1)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (((images - mean) * (1 + contrast * draw[0]) + mean + brightness * draw[1]) * gains).clamp(-1, 1)


def contrastive_view(images: torch.Tensor, generator: torch.Generator, kind: str) -> torch.Tensor:
    """One random view for SimCLR of float (B, 3, H, W) images in [-1, 1]; `kind` is `digits` or `natural`."""
    if kind == "digits":
        views = affine(images, generator, shift=0.12, scale=(0.75, 1.25), turn=0.3)
        return grey(mix_colours(views, generator, strength=0.7), generator, 0.5)
    views = flip(affine(images, generator, shift=0.25, scale=(1.0, 2.0), turn=0.0), generator)
    return grey(jitter(views, generator, brightness=0.4, contrast=0.4, colour=0.4), generator, 0.2)


def training_view(images: torch.Tensor, generator: torch.Generator, kind: str) -> torch.Tensor:
    """One random view for supervised training of float (B, 3, H, W) images; `digits`, `natural` or `none`."""
    if kind == "none":
        return images
    if kind == "digits":
        return affine(images, generator, shift=0.1, scale=(0.9, 1.1), turn=0.1)
    return flip(affine(images, generator, shift=0.125, scale=(1.0, 1.0), turn=0.0), generator)
