"""Augmentation of a whole batch at once, on its device, from an explicit generator.

Libraries of augmentations draw from the global generator or once a batch; here every image has its own draw and the
draw is the caller's, so that a resumed training sees the same views.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

_YIQ = [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]  # luma first


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


def resized_crop(
    images: torch.Tensor, generator: torch.Generator, *, area: tuple[float, float], ratio: float = 4 / 3
) -> torch.Tensor:
    """Cut a rectangle out of each image and stretch it over the whole.

    Args:
        images: float (B, 3, H, W).
        generator: Source of randomness, on the images' device.
        area: Range of the rectangle's share of the image.
        ratio: Largest ratio of its sides, either way; the side that would stick out is cut.
    """
    count, device = len(images), images.device
    draw = torch.rand(4, count, generator=generator, device=device)
    size = (area[0] + (area[1] - area[0]) * draw[0]).sqrt()
    stretch = ratio ** (draw[1] - 0.5)
    width, height = (size * stretch).clamp_max(1), (size / stretch).clamp_max(1)
    nothing = torch.zeros_like(width)
    left, top = (1 - width) * (2 * draw[2] - 1), (1 - height) * (2 * draw[3] - 1)
    theta = torch.stack([width, nothing, left, nothing, height, top], dim=1).reshape(count, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="reflection", align_corners=False)


def jitter(
    images: torch.Tensor,
    generator: torch.Generator,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    probability: float = 1.0,
) -> torch.Tensor:
    """Random brightness, contrast, saturation and hue, each image its own; what SimCLR calls colour distortion.

    Args:
        images: float (B, 3, H, W) in [-1, 1].
        generator: Source of randomness, on the images' device.
        brightness, contrast, saturation: Factors are drawn from 1 - value .. 1 + value.
        hue: Largest turn, as a share of the colour circle (of the YIQ plane).
        probability: How likely an image is touched at all.
    """
    count, device = len(images), images.device
    draw = torch.rand(5, count, generator=generator, device=device)
    bright, contrasted, coloured = (1 + most * (2 * draw[i] - 1) for i, most in enumerate((brightness, contrast, saturation)))
    angle = 2 * math.pi * hue * (2 * draw[3] - 1)
    to_yiq = images.new_tensor(_YIQ)
    turn = torch.zeros(count, 3, 3, device=device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = coloured * angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -coloured * angle.sin(), coloured * angle.sin()
    colours = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    light = (images + 1) * bright[:, None, None, None]
    mean = (light * to_yiq[0][:, None, None]).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
    spread = torch.einsum("bij,bjhw->bihw", colours * contrasted[:, None, None], light - mean)
    chosen = draw[4] < probability
    return torch.where(chosen[:, None, None, None], (spread + mean - 1).clamp(-1, 1), images)


def erase(images: torch.Tensor, generator: torch.Generator, *, side: float) -> torch.Tensor:
    """Cutout (DeVries & Taylor, 2017): grey a square of each image, its centre anywhere; `side` is a share of the image's."""
    count, device = len(images), images.device
    centre = torch.rand(2, count, 1, generator=generator, device=device)
    inside = [
        ((torch.arange(length, device=device) + 0.5) / length - centre[axis]).abs() < side / 2
        for axis, length in enumerate(images.shape[2:])
    ]
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(square, 0.0)


def contrastive_view(images: torch.Tensor, generator: torch.Generator, kind: str) -> torch.Tensor:
    """One random view for SimCLR of float (B, 3, H, W) images in [-1, 1]; `kind` is `digits` or `natural`."""
    if kind == "digits":
        views = affine(images, generator, shift=0.12, scale=(0.75, 1.25), turn=0.3)
        return grey(mix_colours(views, generator, strength=0.7), generator, 0.5)
    views = flip(resized_crop(images, generator, area=(0.2, 1.0)), generator)
    views = jitter(views, generator, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8)
    return grey(views, generator, 0.2)


def strong_view(images: torch.Tensor, generator: torch.Generator, kind: str) -> torch.Tensor:
    """One strongly changed view of float (B, 3, H, W) images in [-1, 1] that keeps their class; `digits` or `natural`."""
    if kind == "digits":
        views = affine(images, generator, shift=0.15, scale=(0.75, 1.25), turn=0.4)
        return erase(mix_colours(views, generator, strength=0.7), generator, side=0.25)
    turned = affine(images, generator, shift=0.1, scale=(0.9, 1.1), turn=0.5)
    views = flip(resized_crop(turned, generator, area=(0.4, 1.0)), generator)
    views = jitter(views, generator, brightness=0.6, contrast=0.6, saturation=0.6, hue=0.1, probability=0.8)
    return erase(views, generator, side=0.5)


def shift_and_flip(images: torch.Tensor, generator: torch.Generator, *, shift: float) -> torch.Tensor:
    """Move each image by whole pixels, edges reflected, and mirror it with probability one half: pixels stay what they are.

    The crop and flip usual on CIFAR, as one gather for the batch.

    Args:
        images: (B, 3, H, W) of any type.
        generator: Source of randomness, on the images' device.
        shift: Largest shift as a share of the side, rounded to pixels.
    """
    count, device = len(images), images.device
    mirrored = torch.rand(count, generator=generator, device=device) < 0.5

    def places(side: int) -> torch.Tensor:
        most = round(shift * side)
        moved = torch.randint(-most, most + 1, (count, 1), generator=generator, device=device)
        at = (torch.arange(side, device=device) + moved).abs()
        return torch.where(at < side, at, 2 * (side - 1) - at)

    rows, columns = places(images.shape[2]), places(images.shape[3])
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(count, device=device)[:, None, None]
    return images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def training_view(images: torch.Tensor, generator: torch.Generator, kind: str) -> torch.Tensor:
    """One random view for supervised training of uint8 (B, 3, H, W) images; `digits` (gives floats), `natural` or `none`."""
    if kind == "none":
        return images
    if kind == "digits":
        return affine(images.float(), generator, shift=0.1, scale=(0.9, 1.1), turn=0.1)
    return shift_and_flip(images, generator, shift=0.125)
