"""Training of the diffusion model: noise prediction with a dropped condition, on noise levels up to S_max only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from ..config import DiffusionConfig
from ..data.augment import flip
from ..data.images import to_unit
from ..randomness import derive_seed, step_generator
from ..training import Descent, Job, initialised, place, share, train_steps, unet_format
from .unet import alphas_bar, build_unet


def add_noise(clean: torch.Tensor, noise: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(abar) x + sqrt(1 - abar) eps; float (B, 3, H, W) twice and abar (B,) or scalar."""
    abar = abar.to(clean).reshape(-1, 1, 1, 1)
    return abar.sqrt() * clean + (1 - abar).sqrt() * noise


def regression_target(clean: torch.Tensor, noise: torch.Tensor, abar: torch.Tensor, prediction: str) -> torch.Tensor:
    """What the U-Net should say: eps, or v = sqrt(abar) eps - sqrt(1 - abar) x (Salimans & Ho 2022)."""
    if prediction == "epsilon":
        return noise
    abar = abar.to(clean).reshape(-1, 1, 1, 1)
    return abar.sqrt() * noise - (1 - abar).sqrt() * clean


def min_snr_weight(abar: torch.Tensor, prediction: str, gamma: float) -> torch.Tensor:
    """Weights (B,) of the prediction's squared error that weigh the clean image's by min(SNR, gamma) (Hang et al. 2023).

    With SNR = abar / (1 - abar) the squared error of the clean image is that of eps / SNR, and that of v / (SNR + 1).
    """
    snr = abar / (1 - abar)
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)


def denoising_loss(
    predicted: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, abar: torch.Tensor, config: DiffusionConfig
) -> torch.Tensor:
    """The mean over images of the weighted squared error; float (B, 3, H, W) three times and abar (B,), a scalar out."""
    error = (predicted.float() - regression_target(clean, noise, abar, config.prediction)).square().mean(dim=(1, 2, 3))
    if config.min_snr_gamma is not None:
        error = error * min_snr_weight(abar, config.prediction, config.min_snr_gamma)
    return error.mean()


def drop_condition(labels: torch.Tensor, classes: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Labels int64 (B,) with each replaced by the null class `classes` with the given probability."""
    dropped = torch.rand(len(labels), generator=generator, device=labels.device) < probability
    return torch.where(dropped, classes, labels)


class Average(EMAModel):
    """diffusers' running average of weights; what a checkpoint says of them comes to the device they are on."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take a state of `state_dict`, whose tensors may be on another device."""
        device = self.shadow_params[0].device
        super().load_state_dict(dict(state_dict))
        self.to(device)


def train_diffusion(
    images: torch.Tensor,
    labels: torch.Tensor,
    config: DiffusionConfig,
    job: Job,
    *,
    classes: int,
    stop_after: int | None = None,
) -> tuple[UNet2DModel, dict[str, list[float]]]:
    """Train the U-Net on E || eps_theta(x_t, c) - eps ||^2 (METHOD section 2).

    Args:
        images: uint8 (N, 3, H, W).
        labels: int64 (N,) pseudo-labels in 0 .. C - 1.
        config: The model's and the training's settings.
        job: What it runs on, its seed and where it is resumed from.
        classes: C.
        stop_after: Do only so many of the steps, in the schedule of all.

    Returns:
        The U-Net with its averaged weights, on the accelerator's device, and each step's loss; `timestep` is the mean t.
    """
    accelerator, device = job.accelerator, job.device
    build = partial(build_unet, config, classes=classes, image_size=images.shape[-1])
    unet = place(initialised(build, derive_seed(job.seed, "unet-init")), device, unet_format(device))
    average = Average(unet.parameters(), decay=config.ema_decay, foreach=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.lr, weight_decay=1e-4, fused=device.type == "cuda")
    descent = Descent(unet, optimizer, config.steps, accelerator, gradient_clip=config.gradient_clip)
    pool, pool_labels = images.to(device), labels.to(device)
    abar = alphas_bar(config).float().to(device)
    highest = max(1, round(config.max_start_fraction * config.timesteps))

    def step(index: int) -> dict[str, torch.Tensor]:
        generator = job.generator("diffusion", index)
        chosen = torch.randint(len(pool), (config.batch_size,), generator=generator, device=device)
        t = torch.randint(highest, (config.batch_size,), generator=generator, device=device)
        condition = drop_condition(pool_labels[chosen], classes, config.condition_dropout, generator)
        clean = to_unit(pool[chosen])
        if config.flips:
            clean = flip(clean, generator)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        mine = share(torch.arange(config.batch_size, device=device), accelerator)
        clean, noise, t, condition = clean[mine], noise[mine], t[mine], condition[mine]
        noisy = add_noise(clean, noise, abar[t]).contiguous(memory_format=unet_format(device))
        with accelerator.autocast():
            predicted = descent.wrapped(noisy, t, class_labels=condition, return_dict=False)[0]
        loss = denoising_loss(predicted, clean, noise, abar[t], config)
        descent(loss)
        average.step(unet.parameters())
        return {"loss": loss}

    history = train_steps(
        step,
        config.steps if stop_after is None else min(stop_after, config.steps),
        {**descent.state, "average": average},
        job,
        name="diffusion",
    )
    average.copy_to(unet.parameters())
    return unet.eval(), history


def loss_by_noise_level(
    unet: UNet2DModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: DiffusionConfig,
    *,
    device: torch.device,
    seed: int,
    levels: int = 10,
    batch_size: int = 256,
) -> list[dict[str, float]]:
    """The squared error of the prediction on given images at `levels` noise levels from 0 to S_max: where the model is still bad.

    Args:
        unet: The trained U-Net on `device`.
        images: uint8 (N, 3, H, W), at least one.
        labels: int64 (N,) pseudo-labels.
        config: The model's settings.
        device: Where to compute.
        seed: Seed of the noise.
        levels: Noise levels.
        batch_size: Images at once; one batch is drawn a level.
    """
    abar = alphas_bar(config).float()
    highest = max(1, round(config.max_start_fraction * config.timesteps))
    rows = []
    for t in sorted({round(i * (highest - 1) / max(1, levels - 1)) for i in range(levels)}):
        generator = step_generator(seed, "loss-by-level", t)
        chosen = torch.randperm(len(images), generator=generator)[:batch_size]
        clean = to_unit(images[chosen])
        noise = torch.randn(clean.shape, generator=generator)
        with torch.inference_mode():
            noisy = add_noise(clean, noise, abar[t])
            step = torch.full((len(chosen),), t, device=device)
            predicted = unet(noisy.to(device), step, class_labels=labels[chosen].to(device), return_dict=False)[0].float().cpu()
        target = regression_target(clean, noise, abar[t], config.prediction)
        rows.append({"timestep": t, "noise": float((1 - abar[t]).sqrt()), "loss": float(F.mse_loss(predicted, target))})
    return rows
