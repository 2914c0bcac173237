"""SimCLR (Chen et al., ICML 2020): a backbone trained to recognise two views of the same unlabelled image."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..config import ClusteringConfig
from ..data.augment import contrastive_view
from ..features import Backbone
from ..randomness import derive_seed
from ..training import Descent, Job, initialised, place, share, train_steps
from .pool import ImagePool, compiled
from .processes import whole_batch

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
    job: Job,
) -> tuple[Backbone, dict[str, list[float]]]:
    """Train a backbone on unlabelled images; every image of the batch is a negative, whatever process it is on.

    Args:
        images: uint8 (N, 3, H, W).
        config: The pretext's settings.
        job: What it runs on, its seed and where it is resumed from.

    Returns:
        The backbone on the accelerator's device, without the projection head, and the loss a step.
    """
    accelerator, device, processes = job.accelerator, job.device, job.accelerator.num_processes
    model = place(initialised(lambda: _with_projection(config.backbone), derive_seed(job.seed, "simclr-init")), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.pretext_lr, weight_decay=1e-4)
    descend = Descent(model, optimizer, config.pretext_steps, accelerator)
    network = compiled(descend.wrapped, device)
    pool = ImagePool(images, device)
    batch_size = min(config.pretext_batch_size, len(images)) // processes * processes

    def step(index: int) -> dict[str, torch.Tensor]:
        generator = job.generator("simclr", index)
        batch = pool[share(torch.randperm(len(pool), generator=generator, device=device)[:batch_size], accelerator)]
        views = torch.cat([contrastive_view(batch, generator, config.augmentation) for _ in range(2)])
        with accelerator.autocast():
            projected = network(views.contiguous(memory_format=torch.channels_last))
        first, second = (whole_batch(part, accelerator) for part in projected.chunk(2))
        loss = nt_xent(first, second, config.temperature)
        descend(loss * processes)
        return {"loss": loss}

    history = train_steps(
        step,
        config.pretext_steps,
        descend.state,
        job,
        name="SimCLR",
    )
    return model[0], history  # type: ignore[return-value]


def _with_projection(name: str) -> nn.Sequential:
    backbone = Backbone(name)
    width = backbone.feature_size
    return nn.Sequential(backbone, nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION)))
