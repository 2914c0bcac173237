"""The full path of SCAN: clustering and self-labelling through the backbone, under strong augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from ..config import ClusteringConfig
from ..data.augment import strong_view
from ..training import Descent, Job, share, train_steps
from .pool import ImagePool, compiled
from .processes import extract_all, whole_batch
from .scan import scan_loss
from .self_label import Confident, confident_images, report_clusters, self_label_loss

WEIGHT_DECAY = 1e-4


def predict(net: nn.Module, images: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """float (N, C) cluster probabilities of uint8 images as they are, the same on every process."""
    if accelerator.num_processes > 1:
        broadcast(list(net.buffers()))  # each process has seen other images
    with accelerator.autocast():
        return extract_all(net, images, accelerator).softmax(dim=1)


def scan_through_backbone(
    net: nn.Module,
    images: torch.Tensor,
    neighbours: torch.Tensor,
    config: ClusteringConfig,
    job: Job,
) -> dict[str, list[float]]:
    """Train backbone and head by SCAN's loss; an image and its neighbour are each seen in a strong view.

    Args:
        net: Images (B, 3, H, W) in [-1, 1] to logits (B, C), on the device; trained in place.
        images: uint8 (N, 3, H, W).
        neighbours: int64 (N, K), of the pretext; they stay what they are.
        config: Epochs, learning rate, batch size, entropy weight, kind of augmentation.
        job: What it runs on, its seed and where it is resumed from.

    Returns:
        The loss a step.
    """
    pool, neighbours = ImagePool(images, job.device), neighbours.to(job.device)
    batch_size = _batch_size(config, len(images), job.accelerator)
    steps = config.finetune_epochs * max(1, len(images) // batch_size)
    descend = _descent(net, config, steps, job.accelerator)
    network = compiled(descend.wrapped, job.device)

    def step(index: int) -> dict[str, torch.Tensor]:
        generator = job.generator("scan-finetune", index)
        order = torch.randperm(len(pool), generator=generator, device=job.device)[:batch_size]
        picks = torch.randint(neighbours.shape[1], (batch_size,), generator=generator, device=job.device)
        rows = torch.cat([share(order, job.accelerator), share(neighbours[order, picks], job.accelerator)])
        logits = _logits(network, pool[rows], generator, config, job.accelerator)
        first, second = (whole_batch(part, job.accelerator) for part in logits.chunk(2))
        loss = scan_loss(first[None], second[None], config.entropy_weight)[0]
        descend(loss * job.accelerator.num_processes)
        return {"loss": loss}

    return train_steps(
        step,
        steps,
        descend.state,
        job,
        name="SCAN",
        checkpoint="checkpoint-finetune.pt",
    )


class _Teachers:
    """The confident images of the epoch; part of a checkpoint, for they are those of the epoch's first step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.confident, self.notes = device, Confident(*[torch.empty(0)] * 3), list[str]()

    def state_dict(self) -> dict[str, Any]:
        return {**self.confident._asdict(), "notes": self.notes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.confident = Confident(*(state[name].to(self.device) for name in Confident._fields))
        self.notes = list(state["notes"])


def self_label_through_backbone(
    net: nn.Module,
    images: torch.Tensor,
    config: ClusteringConfig,
    job: Job,
) -> tuple[dict[str, list[float]], list[str]]:
    """Train backbone and head on strong views of the confident images, which are chosen anew each epoch from plain views.

    The arguments are those of `scan_through_backbone`. The paper chooses in each batch, by the network in training mode.

    Returns:
        By step the loss and the share of images that are confident; and what befell clusters, a line each.

    Raises:
        RunError: A cluster has lost its last image, or no image is confident.
    """
    pool, teachers = ImagePool(images, job.device), _Teachers(job.device)
    batch_size = _batch_size(config, len(images), job.accelerator)
    epoch_steps = max(1, len(images) // batch_size)
    descend = _descent(net, config, config.self_label_epochs * epoch_steps, job.accelerator)
    network = compiled(descend.wrapped, job.device)

    def step(index: int) -> dict[str, torch.Tensor]:
        if index % epoch_steps == 0:
            teachers.confident = confident_images(predict(net, images, job.accelerator), config.self_label_threshold)
            teachers.notes += report_clusters(teachers.confident, index // epoch_steps)
        rows, labels, weights = teachers.confident
        generator = job.generator("self-label", index)
        chosen = share(torch.randint(len(rows), (batch_size,), generator=generator, device=rows.device), job.accelerator)
        logits = _logits(network, pool[rows[chosen]], generator, config, job.accelerator)
        loss = self_label_loss(logits, labels[chosen], weights)
        descend(loss)
        return {"loss": loss, "confident": torch.tensor(len(rows) / len(images))}

    history = train_steps(
        step,
        config.self_label_epochs * epoch_steps,
        {**descend.state, "teachers": teachers},
        job,
        name="self-labelling",
        checkpoint="checkpoint-self-label.pt",
    )
    return history, teachers.notes


def _descent(net: nn.Module, config: ClusteringConfig, steps: int, accelerator: Accelerator) -> Descent:
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.finetune_lr, weight_decay=WEIGHT_DECAY)
    return Descent(net, optimizer, steps, accelerator)


def _batch_size(config: ClusteringConfig, images: int, accelerator: Accelerator) -> int:
    return min(config.finetune_batch_size, images) // accelerator.num_processes * accelerator.num_processes


def _logits(
    network: nn.Module, batch: torch.Tensor, generator: torch.Generator, config: ClusteringConfig, accelerator: Accelerator
) -> torch.Tensor:
    views = strong_view(batch, generator, config.augmentation).contiguous(memory_format=torch.channels_last)
    with accelerator.autocast():
        return network(views)  # type: ignore[no-any-return]
