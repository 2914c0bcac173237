"""Batches that hold ID images, controls and outliers together, drawn from pools that lie on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from accelerate import Accelerator

from ..config import DetectorConfig
from ..data.images import to_unit
from ..errors import RunError, UsageError
from ..features import Backbone
from ..randomness import step_generator
from ..training import share


class Labelled(NamedTuple):
    """Images and their pseudo-labels."""

    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,)


class Part(NamedTuple):
    """A pool and how many of its rows each batch holds."""

    inputs: torch.Tensor  # uint8 (N, 3, H, W), or float16 (N, ...) of `frozen_outputs`
    labels: torch.Tensor  # int64 (N,)
    per_batch: int
    is_outlier: bool


class Batches:
    """The batch of any step, without the steps before.

    Args:
        parts: The pools, on the accelerator's device.
        seed: Of the training.
        accelerator: Says which share of a batch is this process's.
    """

    def __init__(self, parts: Sequence[Part], seed: int, accelerator: Accelerator) -> None:
        self.parts, self._accelerator = parts, accelerator
        self._passes = [
            Passes(len(part.labels), part.per_batch, seed, number, accelerator.device) for number, part in enumerate(parts)
        ]
        self.has_outliers = any(part.is_outlier for part in parts)

    def draw(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs (B, ...), labels int64 (B,) and whether each is an outlier, bool (B,)."""
        rows = [share(passes.rows(step), self._accelerator) for passes in self._passes]
        chosen = list(zip(self.parts, rows, strict=True))
        inputs = torch.cat([part.inputs[own] for part, own in chosen])
        labels = torch.cat([part.labels[own] for part, own in chosen])
        flags = torch.cat([torch.full_like(own, part.is_outlier, dtype=torch.bool) for part, own in chosen])
        return inputs, labels, flags


class Passes:
    """Shuffled passes over the rows of a pool, `count` rows a step."""

    def __init__(self, total: int, count: int, seed: int, part: int, device: torch.device) -> None:
        self._total, self._count = total, count

        @lru_cache(maxsize=2)
        def order(epoch: int) -> torch.Tensor:
            return torch.randperm(total, generator=step_generator(seed, f"order-{part}", epoch, device), device=device)

        self._order = order

    def rows(self, step: int) -> torch.Tensor:
        """int64 (count,) rows of one step."""
        first, last = step * self._count, (step + 1) * self._count
        passes = range(first // self._total, (last - 1) // self._total + 1)
        starts = [(epoch, epoch * self._total) for epoch in passes]
        return torch.cat([self._order(epoch)[max(first - start, 0) : last - start] for epoch, start in starts])


def make_parts(
    inside: Labelled, controls: Labelled | None, outliers: Labelled | None, batch_size: int, ratios: tuple[float, float]
) -> list[Part]:
    """The pools of a training on the CPU: ID images, then controls and outliers where there are any and are wanted.

    Args:
        inside: In-distribution images.
        controls: Count as in-distribution.
        outliers: Count as outliers.
        batch_size: In-distribution images a step, all of them where they are fewer.
        ratios: Controls and outliers a step, as shares of `batch_size`; above 0 it is at least one.
    """
    batch_size = min(batch_size, len(inside.images))
    parts = [Part(*inside, batch_size, False)]
    for extra, ratio, is_outlier in ((controls, ratios[0], False), (outliers, ratios[1], True)):
        if extra is not None and len(extra.images) and ratio > 0:
            parts.append(Part(*extra, _per_batch(batch_size, ratio), is_outlier))
    return parts


def _per_batch(batch_size: int, ratio: float) -> int:
    return max(1, round(ratio * batch_size))


def require_even_shares(config: DetectorConfig, images: int, processes: int, *, controls: bool, outliers: bool) -> None:
    """Make sure that the processes' shares of every step are of one size: the mean of their losses is the batch's then.

    Args:
        config: The detector's settings.
        images: In-distribution images to train on.
        processes: That share a step.
        controls: Whether there are any.
        outliers: Whether there are any.

    Raises:
        UsageError: The images, controls or outliers of a step are no multiple of the processes.
    """
    batch_size = min(config.batch_size, images)
    counts = {"detector.batch_size": batch_size}
    for name, there, ratio in (("control", controls, config.control_ratio), ("outlier", outliers, config.outlier_ratio)):
        if there and ratio > 0:
            counts[f"{name}s a step, of detector.{name}_ratio"] = _per_batch(batch_size, ratio)
    for name, count in counts.items():
        if count % processes:
            raise UsageError(
                name,
                count,
                f"a multiple of the {processes} processes, whose shares count alike",
                "change it or the number of processes",
            )


def frozen_outputs(
    backbone: Backbone, parts: Sequence[Part], accelerator: Accelerator, *, limit_gib: float, batch_size: int = 128
) -> list[Part] | None:
    """The parts with what the frozen blocks make of their images, float16 on the device; None where that exceeds a limit.

    Args:
        backbone: With a frozen part, on the accelerator's device.
        parts: Pools of uint8 images.
        accelerator: Device and precision.
        limit_gib: The limit, for all parts together.
        batch_size: Images at once.

    Raises:
        RunError: An output is NaN, or infinite in float16.
    """

    def outputs(images: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            return backbone.frozen_part(to_unit(images.to(accelerator.device))).half()

    one = outputs(parts[0].inputs[:1])
    if one.nbytes * sum(len(part.labels) for part in parts) > limit_gib * 2**30:
        return None
    cached, finite = [], torch.ones((), dtype=torch.bool, device=one.device)
    for part in parts:
        pool = one.new_empty(len(part.labels), *one.shape[1:])
        for start in range(0, len(pool), batch_size):
            made = outputs(part.inputs[start : start + batch_size])
            finite &= made.isfinite().all()
            pool[start : start + batch_size] = made
        cached.append(part._replace(inputs=pool))
    if not finite:
        raise RunError(
            f"what the frozen blocks of {backbone.name} make of the images",
            "NaN, or more than float16 holds",
            f"at most {torch.finfo(torch.float16).max:.0f}",
            "give --detector.cache_gib 0, which computes it in every step, or other weights",
        )
    return cached
