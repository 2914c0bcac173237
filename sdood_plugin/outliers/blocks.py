"""Which outliers are to be made, in which batches, with which S and w: the same for any split of the work.

The last bits of a convolution depend on an image's place in the batch and on the size of the batch (and on which
machines, nobody says). So an outlier has one block and one place in it, and thereby one value; processes and shards
take whole blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..config import OutliersConfig
from ..config.outliers import bounds
from ..data.images import spread
from ..randomness import uniform

START_LEVELS = 16  # values a range of S is rounded to, so that a block can have one
SOURCES_A_FOLDER = 1000
_COPY_STRIDE = 1 << 32  # identity of copy c of source i is i + c * 2^32: more copies never change the first ones
_SETTINGS_DRAW = -1  # the draw that S and w come from; draw 0 picks classes, noise takes those after it


class Block(NamedTuple):
    """Outliers that are always denoised together."""

    jobs: torch.Tensor  # int64 (at most batch_size, 2): source index and copy
    start_fraction: float  # their S / T


def jobs(count: int, config: OutliersConfig) -> torch.Tensor:
    """int64 (J, 2): source index and copy of every outlier to be made of `count` images, one copy after the other."""
    sources = torch.arange(count) if config.sources is None or config.sources >= count else spread(count, config.sources)
    return torch.cartesian_prod(torch.arange(config.per_source), sources).reshape(-1, 2).flip(1)


def blocks(count: int, config: OutliersConfig, seed: int) -> list[Block]:
    """All jobs of `count` images in their blocks, one copy after the other: also the order of the manifest."""
    todo = jobs(count, config)
    copies = todo.split(max(1, len(todo) // config.per_source))
    return [block for copy in copies for block in in_blocks(copy, config, seed)]


def in_blocks(todo: torch.Tensor, config: OutliersConfig, seed: int) -> list[Block]:
    """Jobs int64 (J, 2) by ascending S, in blocks of one S."""
    starts = start_fractions(config, seed, identities(todo))
    return [Block(rows, start) for start in starts.unique().tolist() for rows in todo[starts == start].split(config.batch_size)]


def identities(todo: torch.Tensor) -> torch.Tensor:
    """int64 (B,), what the random numbers of jobs (B, 2) are drawn by."""
    return todo[:, 0] + todo[:, 1] * _COPY_STRIDE


def start_fractions(config: OutliersConfig, seed: int, identity: torch.Tensor) -> torch.Tensor:
    """float64 (B,): S / T of each outlier, the configured one or drawn from the levels of the range."""
    low, high = bounds(config.start_fraction)
    if low == high:
        return torch.full(identity.shape, low, dtype=torch.float64, device=identity.device)
    level = (uniform(seed, identity, _SETTINGS_DRAW, 2)[:, 0] * START_LEVELS).floor()
    return low + (high - low) * (level / (START_LEVELS - 1))


def guidance_weights(config: OutliersConfig, seed: int, identity: torch.Tensor) -> float | torch.Tensor:
    """The configured w, or float32 (B,) drawn uniformly from the range, each outlier's own."""
    low, high = bounds(config.guidance_weight)
    if low == high:
        return low
    return (low + (high - low) * uniform(seed, identity, _SETTINGS_DRAW, 2)[:, 1]).float()


def file_name(source: int, copy: int, suffix: str = "png") -> str:
    """Where an outlier lies in its set: a folder for every 1,000 sources."""
    return f"images/{source // SOURCES_A_FOLDER:04d}/{source:07d}_{copy}.{suffix}"
