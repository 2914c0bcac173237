"""Training of the three heads with OpenOOD's loaders and schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...detector.loss import three_head_loss
from ...errors import RunError, UsageError
from .host import require_host
from .network import AbsentHead, SDOODNet

require_host()
from openood.trainers.base_trainer import BaseTrainer  # noqa: E402 - only after the host is on the path
from openood.utils import comm  # noqa: E402


class SDOODTrainer(BaseTrainer):
    """ID images, controls and outliers in one batch and one forward pass, so that BatchNorm tells nothing of their origin.

    Optimiser and learning rate are the base trainer's. An outlier's label in its imglist is its SOURCE pseudo-label.

    Args:
        net: An `SDOODNet` with three heads, possibly wrapped for several GPUs.
        train_loader: ID images with their (pseudo-)labels.
        train_unlabeled_loader: Outliers.
        config: The host's config; reads `trainer.lambda_out` and the optimiser's settings.
        control_loader: Same-class reconstructions, which count as ID; None leaves them out.

    Raises:
        UsageError: A stock network, or no `trainer.lambda_out`.
    """

    def __init__(
        self, net: nn.Module, train_loader: Any, train_unlabeled_loader: Any, config: Any, control_loader: Any = None
    ) -> None:
        require_three_heads(net)
        if not isinstance(config.trainer.lambda_out, (int, float)) or config.trainer.lambda_out < 0:
            raise UsageError(
                "trainer.lambda_out", config.trainer.lambda_out, "a number of 0 or more", "set it in the pipeline YAML"
            )
        super().__init__(net, train_loader, config)
        self.extra_loaders = [(control_loader, False)] if control_loader is not None else []
        self.extra_loaders.append((train_unlabeled_loader, True))

    def train_epoch(self, epoch_idx: int) -> tuple[nn.Module, dict[str, float]]:
        """One pass over the ID images; returns the net and {'epoch_idx', 'loss'}, the loss smoothed as the host smooths it.

        Raises:
            RunError: The loss is NaN or infinite; the step is named.
        """
        from tqdm import tqdm

        self.net.train()
        device = next(self.net.parameters()).device
        extras = [(_endless(loader), flag) for loader, flag in self.extra_loaders]
        smooth = 0.0
        bar = tqdm(self.train_loader, desc=f"Epoch {epoch_idx:03d}: ", disable=not comm.is_main_process())
        for step, batch in enumerate(bar, 1):
            parts = [(batch, False), *((next(batches), flag) for batches, flag in extras)]
            images = torch.cat([part["data"] for part, _ in parts]).to(device)
            labels = torch.cat([part["label"] for part, _ in parts]).to(device)
            flags = torch.cat([torch.full_like(part["label"], flag, dtype=torch.bool) for part, flag in parts]).to(device)
            loss = three_head_loss(self.net(images, return_heads=True), labels, flags, self.config.trainer.lambda_out)["loss"]
            value = float(loss.detach())
            if not math.isfinite(value):
                raise RunError(f"loss in epoch {epoch_idx} at step {step}", value, "a finite number", "lower optimizer.lr")
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            smooth = smooth * 0.8 + value * 0.2
        return self.net, {"epoch_idx": epoch_idx, "loss": self.save_metrics(smooth)}


def require_three_heads(net: nn.Module) -> None:
    """Raises UsageError for a network, possibly wrapped for several GPUs, that is not an `SDOODNet` with all of its heads."""
    inner = getattr(net, "module", net)
    if not isinstance(inner, SDOODNet) or isinstance(inner.network.g_bin, AbsentHead):
        raise UsageError(
            "network of TrainSDOOD",
            type(inner).__name__,
            "a network with three heads",
            "use network.name: sdood without a stock checkpoint",
        )


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
