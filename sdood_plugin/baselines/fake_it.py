"""Fake-it (Mirzaei et al., "Fake it till you make it", ICLR 2023; FITYMI): outliers from a diffusion model stopped early.

An unconditional score model is trained on the normal images and stopped before it converges; its samples from pure noise
are near-distribution outliers. A pre-trained network is fine-tuned to tell them from normal images, and the score is the
sum of squared distances to the k = 2 nearest normal training features. What differs from paper and code, and why:
- The official code starts from files of ready outliers, as many as normal images; the score model itself is that of
  another repository (a VE SDE with 1,000 predictor-corrector steps). Here it is this project's U-Net as one class over
  all T steps, sampled with DPM-Solver++. It predicts v: a small U-Net that predicts noise and starts from pure noise
  divides its error by sqrt(abar) = 0.006 in the first step, and its samples are saturated colours.
- The paper stops by FID (about 45 on CIFAR-10 in the seed's figure, where a converged model reaches 3). `fake_it_steps`
  is when the training that is planned for diffusion.steps is stopped, its learning rate still high; the Frechet distance
  that was reached is recorded. Learning rate and EMA follow the diffusion settings.
- The paper's task has one class as normal, and one model a class; here all training images are normal, as in the
  seed's Table 1.
- The official code fine-tunes a ViT by SGD of learning rate 4e-4 with six frozen blocks, which configs/cifar10_vit_b16.yml
  has for every method; elsewhere the detector's own optimiser, epochs and augmentation hold, and `fake_it_lr` and
  `fake_it_frozen_blocks` can be set. ID and fake images share each batch, half and half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from ..config import CompareConfig, DetectorConfig, DiffusionConfig
from ..data.images import to_uint8
from ..detector.network import Heads
from ..diffusion.sampling import guided_partial_sample
from ..randomness import normal

SAMPLING_STEPS, BATCH_SIZE = 20, 128
Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def unconditional(config: DiffusionConfig) -> DiffusionConfig:
    """The diffusion settings for a model of all T noise levels."""
    return dataclasses.replace(config, prediction="v", max_start_fraction=1.0)


def stop_after(config: DiffusionConfig, compare: CompareConfig) -> int:
    """The step at which its training is stopped."""
    return min(compare.fake_it_steps or max(1, config.steps // 2), config.steps)


def binary(config: DetectorConfig, pretrained: str, compare: CompareConfig) -> DetectorConfig:
    """The detector's settings for ID against fakes: as many fakes as ID images in a batch, from pre-trained weights."""
    frozen = config.frozen_blocks if compare.fake_it_frozen_blocks is None else compare.fake_it_frozen_blocks
    return dataclasses.replace(
        config,
        weights=pretrained,
        outlier_ratio=1.0,
        control_ratio=0.0,
        lr=compare.fake_it_lr or config.lr,
        frozen_blocks=frozen,
    )


def fake_it_loss(heads: Heads, labels: torch.Tensor, is_outlier: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cross-entropy of g_bin alone; labels play no part."""
    return {"loss": F.cross_entropy(heads.binary.float(), is_outlier.long())}


def sample_fakes(
    denoiser: Denoiser, count: int, image_size: int, config: DiffusionConfig, *, seed: int, device: torch.device
) -> torch.Tensor:
    """Images from pure noise by a model of one class.

    Args:
        denoiser: (x_t, t (B,), class (B,)) -> prediction; the class is always 0.
        count: N.
        image_size: Side in pixels.
        config: Settings of `unconditional`.
        seed: Seed of the set; image i depends on it and on i alone, but for rounding.
        device: Where to compute.

    Returns:
        uint8 (N, 3, H, W) on the CPU.
    """
    shape = (3, image_size, image_size)
    one_class = torch.zeros(BATCH_SIZE, 1, dtype=torch.int64, device=device)
    batches = []
    for start in range(0, count, BATCH_SIZE):
        identity = torch.arange(start, start + BATCH_SIZE, device=device)  # the last batch is full too, and cut below
        made = guided_partial_sample(
            denoiser,
            torch.zeros(BATCH_SIZE, *shape, device=device),
            one_class,
            torch.ones(1, device=device),
            partial(_noise, seed, identity, shape),
            config,
            start_fraction=1.0,
            steps=SAMPLING_STEPS,
        )
        batches.append(to_uint8(made).cpu())
    return torch.cat(batches)[:count]


def _noise(seed: int, identity: torch.Tensor, shape: tuple[int, ...], draw: int) -> torch.Tensor:
    return normal(seed, identity, draw, shape)
