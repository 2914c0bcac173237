"""Work on a set of images divided among processes, and losses over the whole batch of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..features import extract
from ..neighbours import nearest

if TYPE_CHECKING:
    from accelerate import Accelerator


def divided(count: int, work: Callable[[torch.Tensor], torch.Tensor], accelerator: Accelerator) -> torch.Tensor:
    """`work(rows)` for all of 0 .. count - 1, each process doing one stretch of them.

    Args:
        count: Number of rows, N.
        work: Maps int64 (B,) rows on the CPU to (B, ...) on the device.
        accelerator: The processes.

    Returns:
        (N, ...), the same on every process.
    """
    share = -(-count // accelerator.num_processes)
    rows = (torch.arange(share) + accelerator.process_index * share) % count  # the last stretch is filled up from the start
    return accelerator.gather(work(rows))[:count]  # type: ignore[no-any-return]


def extract_all(model: nn.Module, images: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """float (N, D): `features.extract` divided among the processes."""
    return divided(len(images), lambda rows: extract(model, images[rows], device=accelerator.device), accelerator)


def mine_neighbours(features: torch.Tensor, k: int, accelerator: Accelerator) -> torch.Tensor:
    """The k nearest other images of each image.

    Args:
        features: float (N, D), the same on every process; compared as they are.
        k: Neighbours, below N.
        accelerator: The processes the search is divided among.

    Returns:
        int64 (N, k), nearest first, equal distances by position; never the image itself.
    """

    def search(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(features.device)
        found = nearest(features[rows], features, k + 1)[1]
        own = found == rows[:, None]
        own[:, -1] |= ~own.any(dim=1)  # k + 1 copies of an image that come before it: any of them may go
        return found[~own].reshape(len(rows), k)

    return divided(len(features), search, accelerator)


def whole_batch(mine: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """This process's rows, through which gradients flow, among the rows of all processes, through which none do.

    A loss of the result, times the number of processes, has after the processes' gradients are averaged the gradient that
    one process would have had.

    Args:
        mine: float (B, ...), of one size on all processes.
        accelerator: The processes.

    Returns:
        float (processes * B, ...), the same rows in the same order on every process.
    """
    if accelerator.num_processes == 1:
        return mine
    parts = list(accelerator.gather(mine.detach()).chunk(accelerator.num_processes))
    parts[accelerator.process_index] = mine
    return torch.cat(parts)
