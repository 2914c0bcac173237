"""All images within reach of the device, and a network made fast there."""

from __future__ import annotations

import torch
from torch import nn

from ..data.images import to_unit

MEMORY_SHARE = 0.4  # of a GPU's free memory; the rest is for the network


class ImagePool:
    """Batches of float (B, 3, H, W) in [-1, 1] from uint8 (N, 3, H, W): the whole set lies on the device where it fits.

    Args:
        images: uint8 (N, 3, H, W).
        device: Where batches are wanted.
    """

    def __init__(self, images: torch.Tensor, device: torch.device) -> None:
        self.device = device
        fits = device.type != "cuda" or images.nbytes < MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
        self.images = images.to(device) if fits else images.pin_memory()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """The images at int64 (B,) rows."""
        return to_unit(self.images[rows.to(self.images.device)].to(self.device, non_blocking=True))


def compiled(wrapped: nn.Module, device: torch.device) -> nn.Module:
    """The network compiled on a GPU, where that has paid for itself after a minute; on a CPU as it is."""
    return torch.compile(wrapped) if device.type == "cuda" else wrapped  # type: ignore[return-value]
