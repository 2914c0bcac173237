"""SCAN's clustering step (Van Gansbeke et al., ECCV 2020) on frozen features: neighbours should agree."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..config import ClusteringConfig
from ..neighbours import nearest
from ..randomness import step_generator


def scan_loss(anchor: torch.Tensor, neighbour: torch.Tensor, entropy_weight: float) -> torch.Tensor:
    """SCAN's loss (equation 2 of the paper) for several heads at once.

    -mean log <p(x), p(x')> - weight * H(mean p(x)).

    Args:
        anchor, neighbour: float (R, B, C) logits of R heads for B images and one neighbour of each.
        entropy_weight: Weight of the entropy of the mean assignment; 5 in the paper.

    Returns:
        float (R,), the loss of each head.
    """
    first, second = anchor.float().softmax(-1), neighbour.float().softmax(-1)
    agreement = (first * second).sum(-1).clamp_min(1e-8).log().mean(-1)
    mean = first.mean(dim=1).clamp_min(1e-8)
    entropy = -(mean * mean.log()).sum(-1)
    return -agreement - entropy_weight * entropy


def scan_clusters(features: torch.Tensor, config: ClusteringConfig, seed: int) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Cluster features with linear SCAN heads; the head of lowest loss over the last epoch is kept.

    Args:
        features: float (N, D), of the pretext.
        config: C, K, heads, epochs, learning rate, entropy weight.
        seed: Seed of this stage.

    Returns:
        float (N, C) probabilities of the kept head, and each epoch's losses (the mean over heads and the lowest).
    """
    features = F.normalize(features, dim=1)
    features = (features - features.mean(0)) / features.std(0).clamp_min(1e-6)
    count, width = features.shape
    device = features.device
    _, neighbours = nearest(F.normalize(features, dim=1), F.normalize(features, dim=1), config.neighbours, exclude_self=True)
    start = torch.randn(
        config.heads, width, config.clusters, generator=step_generator(seed, "scan-init", 0, device), device=device
    )
    weight = (start / width**0.5).requires_grad_()
    bias = torch.zeros(config.heads, 1, config.clusters, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=config.head_lr)
    history: dict[str, list[float]] = {"loss": [], "lowest": []}
    batch_size = min(config.head_batch_size, count)
    for epoch in range(config.head_epochs):
        generator = step_generator(seed, "scan", epoch, device)
        order = torch.randperm(count, generator=generator, device=device)
        picks = torch.randint(neighbours.shape[1], (count,), generator=generator, device=device)
        total = torch.zeros(config.heads, device=device)
        batches = [rows for rows in order.split(batch_size) if len(rows) == batch_size]
        for rows in batches:
            pair = torch.cat([features[rows], features[neighbours[rows, picks[rows]]]])
            logits = torch.einsum("bd,rdc->rbc", pair, weight) + bias
            anchor, neighbour = logits.chunk(2, dim=1)
            losses = scan_loss(anchor, neighbour, config.entropy_weight)
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()
            optimizer.step()
            total += losses.detach()
        total /= len(batches)
        history["loss"].append(float(total.mean()))
        history["lowest"].append(float(total.min()))
    best = int(total.argmin())
    with torch.no_grad():
        return (features @ weight[best] + bias[best]).softmax(-1), history
