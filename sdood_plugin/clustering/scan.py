"""SCAN's clustering step (Van Gansbeke et al., ECCV 2020) on frozen features: neighbours should agree."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..config import ClusteringConfig
from ..errors import RunError
from ..randomness import step_generator


class ClusterHead(nn.Module):
    """Features to cluster logits, float (B, D) -> (B, C): unit length, then standardised, then linear.

    Args:
        mean, std: float (D,) of the unit-length features the head was made for.
        weight: float (D, C).
        bias: float (C,).
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def standardised(self, features: torch.Tensor) -> torch.Tensor:
        """What is linear about clusters: float (B, D) features of unit length, then of mean 0 and deviation 1."""
        return (F.normalize(features.float(), dim=1) - self.mean) / self.std

    def classify(self, points: torch.Tensor) -> torch.Tensor:
        """Logits of standardised features."""
        return points @ self.weight + self.bias

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of features, in float32 whatever the features are."""
        return self.classify(self.standardised(features))


def feature_scale(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, float (D,), of float (N, D) features made unit length.

    Raises:
        RunError: Features that are not finite, or one and the same for every image.
    """
    if not torch.isfinite(features).all():
        row = int((~torch.isfinite(features)).any(dim=1).nonzero()[0, 0])
        raise RunError(f"features of image {row}", "NaN or infinity", "finite numbers", "check that image and the weights")
    points = F.normalize(features, dim=1)
    std = points.std(dim=0)
    if float(std.max()) < 1e-6:
        raise RunError(
            "features of the images",
            f"the same for all {len(features)} images",
            "images that differ",
            "check the images; equal ones cannot be clustered",
        )
    return points.mean(dim=0), std.clamp_min(1e-6)


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


def scan_head(
    features: torch.Tensor, neighbours: torch.Tensor, config: ClusteringConfig, seed: int
) -> tuple[ClusterHead, dict[str, list[float]]]:
    """Train linear SCAN heads on frozen features and keep the one of lowest loss over the last epoch.

    Args:
        features: float (N, D), of the pretext.
        neighbours: int64 (N, K), of each image.
        config: C, heads, epochs, learning rate, entropy weight.
        seed: Seed of this stage.

    Returns:
        The head, on the features' device, and each epoch's losses (the mean over heads and the lowest).

    Raises:
        RunError: Features that cannot be clustered.
    """
    mean, std = feature_scale(features)
    points = (F.normalize(features, dim=1) - mean) / std
    (count, width), device = points.shape, points.device
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
            pair = torch.cat([points[rows], points[neighbours[rows, picks[rows]]]])
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
    return ClusterHead(mean, std, weight[best], bias[best, 0]), history
