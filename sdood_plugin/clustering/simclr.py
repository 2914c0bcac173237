"""SimCLR (Chen et al., ICML 2020): a backbone trained to recognise two views of the same unlabelled image."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from ..config import ClusteringConfig
from ..data.augment import contrastive_view
from ..data.images import to_unit
from ..features import Backbone
from ..randomness import derive_seed, step_generator
from ..training import place, share, train_steps, warmup_cosine

PROJECTION = 64


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Normalised temperature-scaled cross-entropy (SimCLR, equation 1), the mean over all 2B views.

    Args:
        first, second: float (B, D), projections of two views of the same B images; any length, normalised here.
        temperature: Divides the cosine similarities.
    """
    views = F.normalize(torch.cat([first, second]).float(), dim=1)
    count = len(first)
    similarity = views @ views.T / temperature
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * count, device=views.device).roll(count)
    return F.cross_entropy(similarity, partner)


def train_simclr(
    images: torch.Tensor,
    config: ClusteringConfig,
    *,
    accelerator: Accelerator,
    seed: int,
    folder: Path,
    key: str,
    checkpoint_seconds: float,
) -> tuple[Backbone, dict[str, list[float]]]:
    """Train a backbone on unlabelled images.

    Args:
        images: uint8 (N, 3, H, W).
        config: The pretext's settings.
        accelerator: Device, precision and processes.
        seed: Seed of this stage.
        folder: Where the checkpoint goes.
        key: What the training depends on.
        checkpoint_seconds: How often to write a checkpoint.

    Returns:
        The backbone on the accelerator's device, without the projection head, and the loss a step.
    """
    device = accelerator.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "simclr-init"))
        backbone = Backbone(config.backbone)
        head = nn.Sequential(
            nn.Linear(backbone.feature_size, backbone.feature_size), nn.ReLU(), nn.Linear(backbone.feature_size, PROJECTION)
        )
    model = place(nn.Sequential(backbone, head), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.pretext_lr, weight_decay=1e-4)
    schedule = warmup_cosine(optimizer, config.pretext_steps)
    wrapped = accelerator.prepare(model)
    pool = images.to(device)
    batch_size = min(config.pretext_batch_size, len(images))

    def step(index: int) -> dict[str, torch.Tensor]:
        generator = step_generator(seed, "simclr", index, device)
        chosen = share(torch.randperm(len(pool), generator=generator, device=device)[:batch_size], accelerator)
        batch = to_unit(pool[chosen])
        views = torch.cat([contrastive_view(batch, generator, config.augmentation) for _ in range(2)])
        with accelerator.autocast():
            projected = wrapped(views.contiguous(memory_format=torch.channels_last))
        first, second = projected.chunk(2)
        loss = nt_xent(first, second, config.temperature)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        return {"loss": loss}

    history = train_steps(
        step,
        config.pretext_steps,
        {"model": model, "optimizer": optimizer, "schedule": schedule},
        accelerator=accelerator,
        checkpoint=folder / "checkpoint.pt",
        key=key,
        checkpoint_seconds=checkpoint_seconds,
        name="SimCLR",
    )
    return backbone, history
