"""MSCL (Reiss & Hoshen, "Mean-shifted contrastive loss for anomaly detection", AAAI 2023).

Pre-trained features phi(x) of unit length are fine-tuned by contrasting theta(x) = (phi(x) - c) / |phi(x) - c|, with c the
mean of the training features before fine-tuning; the score is DN2's on phi. Where paper and official code differ:
- The paper adds the angular centre loss -phi(x) . c for both views. The code adds |phi(x) - c|^2, which with a unit c is
  2 - 2 phi(x) . c, so twice as much, and only when asked to (`--angular`); without it c keeps its own length. Here the
  weight is a setting, `mscl_angular`: 0 the code's default, 1 the paper's, 2 the code's `--angular`.
- The paper fine-tunes the last two blocks of a ResNet; the code freezes stem and first two stages of a ResNet-152 and
  nothing of its other networks, and keeps every BatchNorm in evaluation mode, also while training. Here the detector's
  `frozen_blocks` hold, or, where it has none, the first half of the backbone's tensors, which for a ResNet-18 is stem and
  two stages; BatchNorm stays in evaluation mode.
- The views are those of this project's SimCLR; the code's are blurred too, half of the time. The code keeps the last
  batch of an epoch, which has fewer images; here it is left out.
- The paper trains 25 epochs, the code 20; here the detector's number, as for every comparator. SGD, batches of 64, weight
  decay 5e-5 and temperature 0.25 are those of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..clustering.simclr import nt_xent
from ..config import CompareConfig
from ..data.augment import contrastive_view
from ..data.images import to_unit
from ..errors import UsageError
from ..features import Backbone, extract
from ..training import Job, place, share, train_steps

BATCH_SIZE, WEIGHT_DECAY, TEMPERATURE = 64, 5e-5, 0.25


def mean_shifted_loss(first: torch.Tensor, second: torch.Tensor, centre: torch.Tensor, angular: float) -> dict[str, torch.Tensor]:
    """NT-Xent of the mean-shifted features (equations 4 and 5), and the angular centre loss (equation 6).

    Args:
        first, second: float (B, D), features of two views of the same B images; any length, normalised here.
        centre: float (D,), c.
        angular: Weight of the angular centre loss; with it c is scaled to unit length, as in the official code.

    Returns:
        Scalars `loss`, `contrastive` and `angular` (its weight not applied).
    """
    first, second = F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)
    c = F.normalize(centre, dim=0) if angular else centre
    contrastive = nt_xent(first - c, second - c, TEMPERATURE)
    pull = -(first @ c).mean() - (second @ c).mean()
    return {"loss": contrastive + angular * pull, "contrastive": contrastive, "angular": pull}


def freeze_first_half(backbone: Backbone) -> list[torch.nn.Parameter]:
    """Freeze the first half of the backbone's parameter tensors, unless some are frozen already; return the others.

    Raises:
        UsageError: All of them are frozen.
    """
    tensors = list(backbone.parameters())
    free = [tensor for tensor in tensors if tensor.requires_grad]
    if not free:
        raise UsageError("compare.methods", "mscl", "a backbone that is not frozen as a whole", "leave it out: it would be dn2")
    if len(free) < len(tensors):
        return free
    for tensor in tensors[: len(tensors) // 2]:
        tensor.requires_grad_(False)
    return tensors[len(tensors) // 2 :]


def train_mscl(
    images: torch.Tensor,
    backbone: Backbone,
    config: CompareConfig,
    job: Job,
    *,
    epochs: int,
    augmentation: str,
) -> tuple[Backbone, dict[str, list[float]]]:
    """Fine-tune a pre-trained backbone on unlabelled images.

    Args:
        images: uint8 (N, 3, H, W).
        backbone: The pre-trained network, perhaps frozen in part; changed in place.
        config: Learning rate and weight of the angular loss.
        job: What it runs on, its seed and where it is resumed from.
        epochs: Passes over the images.
        augmentation: Views, as for SimCLR: `digits` or `natural`.

    Returns:
        The backbone in evaluation mode on the accelerator's device, and each step's losses.
    """
    accelerator, device = job.accelerator, job.device
    backbone = place(backbone, device).eval()
    centre = F.normalize(extract(backbone, images, device=device), dim=1).mean(dim=0).clone()
    optimizer = torch.optim.SGD(freeze_first_half(backbone), lr=config.mscl_lr, weight_decay=WEIGHT_DECAY)
    wrapped: Any = accelerator.prepare(backbone)
    pool, batch_size = images.to(device), min(BATCH_SIZE, len(images))
    per_epoch = len(images) // batch_size

    def step(index: int) -> dict[str, torch.Tensor]:
        epoch, place_in_epoch = divmod(index, per_epoch)
        order = torch.randperm(len(pool), generator=job.generator("mscl-order", epoch), device=device)
        chosen = share(order[place_in_epoch * batch_size : (place_in_epoch + 1) * batch_size], accelerator)
        generator = job.generator("mscl", index)
        batch = to_unit(pool[chosen])
        views = torch.cat([contrastive_view(batch, generator, augmentation) for _ in range(2)])
        with accelerator.autocast():
            features = wrapped(views.contiguous(memory_format=torch.channels_last))
        first, second = features.chunk(2)
        losses = mean_shifted_loss(first, second, centre, config.mscl_angular)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(losses["loss"])
        optimizer.step()
        return losses

    history = train_steps(
        step,
        epochs * per_epoch,
        {"backbone": backbone, "optimizer": optimizer},
        job,
        name="MSCL",
    )
    return backbone, history
