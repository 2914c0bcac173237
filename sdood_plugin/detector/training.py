"""Training of the detector; without outliers the same code is plain cross-entropy training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from ..config import DetectorConfig
from ..data.augment import training_view
from ..data.images import to_unit
from ..features import load_backbone
from ..randomness import derive_seed, step_generator
from ..training import place, share, train_steps, warmup_cosine
from .loss import three_head_loss
from .network import Heads, ThreeHeadNet

Loss = Callable[[Heads, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]  # (heads, labels, is_outlier) -> losses


class Labelled(NamedTuple):
    """Images and their pseudo-labels."""

    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,)

    def to(self, device: torch.device) -> Labelled:
        """The same on a device."""
        return Labelled(self.images.to(device), self.labels.to(device))


def train_detector(
    inside: Labelled,
    outliers: Labelled | None,
    controls: Labelled | None,
    config: DetectorConfig,
    *,
    classes: int,
    accelerator: Accelerator,
    seed: int,
    folder: Path,
    key: str,
    checkpoint_seconds: float,
    name: str = "detector",
    loss: Loss | None = None,
) -> tuple[ThreeHeadNet, dict[str, list[float]]]:
    """Train the three heads on batches that hold ID images, controls (as ID) and outliers together.

    Args:
        inside: In-distribution images.
        outliers: Outliers with their sources' labels; None trains g_in alone by cross-entropy.
        controls: Same-class reconstructions that count as ID, so that "was denoised" does not give outliers away.
        config: The detector's settings.
        classes: C.
        accelerator: Device, precision and processes.
        seed: Seed of this stage.
        folder: Where the checkpoint goes.
        key: What the training depends on.
        checkpoint_seconds: How often to write a checkpoint.
        name: Name on the progress bar.
        loss: Replaces the three-head loss.

    Returns:
        The network in evaluation mode on the accelerator's device, and each step's losses.
    """
    device = accelerator.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "detector-init"))
        network = ThreeHeadNet(load_backbone(config.backbone, config.weights), classes, inside.images.shape[-1])
    network = place(network, device)
    batch_size = min(config.batch_size, len(inside.images))
    per_epoch = len(inside.images) // batch_size
    parts = [(inside.to(device), batch_size, False)]
    for extra, ratio, flag in ((controls, config.control_ratio, False), (outliers, config.outlier_ratio, True)):
        if extra is not None and len(extra.images) and round(ratio * batch_size):
            parts.append((extra.to(device), round(ratio * batch_size), flag))
    has_outliers = parts[-1][2]
    steps = config.epochs * per_epoch
    if config.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            network.parameters(), lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = warmup_cosine(optimizer, steps)
    wrapped = accelerator.prepare(network)

    def losses(heads: Heads, labels: torch.Tensor, flags: torch.Tensor) -> dict[str, torch.Tensor]:
        if loss is not None:
            return loss(heads, labels, flags)
        if has_outliers:
            return three_head_loss(heads, labels, flags, config.lambda_out)
        return {"loss": F.cross_entropy(heads.inside.float(), labels)}

    def step(index: int) -> dict[str, torch.Tensor]:
        generator = step_generator(seed, "detector", index, device)
        images, labels, flags = [], [], []
        for number, (part, count, flag) in enumerate(parts):
            chosen = share(_rows(len(part.images), count, index, seed, number, device), accelerator)
            images.append(part.images[chosen])
            labels.append(part.labels[chosen])
            flags.append(torch.full((len(chosen),), flag, device=device))
        views = training_view(to_unit(torch.cat(images)), generator, config.augmentation)
        with accelerator.autocast():
            heads = wrapped(views.contiguous(memory_format=torch.channels_last))
        values = losses(heads, torch.cat(labels), torch.cat(flags))
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(values["loss"])
        optimizer.step()
        schedule.step()
        return values

    history = train_steps(
        step,
        steps,
        {"network": network, "optimizer": optimizer, "schedule": schedule},
        accelerator=accelerator,
        checkpoint=folder / "checkpoint.pt",
        key=key,
        checkpoint_seconds=checkpoint_seconds,
        name=name,
    )
    return network.eval(), history


def _rows(total: int, count: int, step: int, seed: int, part: int, device: torch.device) -> torch.Tensor:
    """int64 (count,) rows of a set for one step: shuffled passes over it, computable for any step without the ones before."""
    positions = torch.arange(step * count, (step + 1) * count, device=device)
    rows = torch.empty_like(positions)
    for epoch in range(int(positions[0]) // total, int(positions[-1]) // total + 1):
        order = torch.randperm(total, generator=step_generator(seed, f"order-{part}", epoch, device), device=device)
        within = positions // total == epoch
        rows[within] = order[positions[within] % total]
    return rows
