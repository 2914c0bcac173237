"""Guided partial sampling: noise an image to S, denoise it to 0. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..config import DiffusionConfig
from .training import add_noise
from .unet import alphas_bar, make_scheduler

Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t, t (B,), class (B,)) -> prediction
Noise = Callable[[int], torch.Tensor]  # draw number -> standard normal (B, 3, H, W)


def start_step(start_fraction: float, timesteps: int) -> int:
    """The index t of the noisiest step visited: S = start_fraction * T steps, the last of which is t = 0."""
    return max(1, round(start_fraction * timesteps)) - 1


def visited_steps(start: int, steps: int) -> list[int]:
    """`steps` training timesteps from `start` downwards, evenly spaced and without repetition; the next would be clean."""
    count = min(steps, start + 1)
    return [round((start + 1) * (count - i) / count) - 1 for i in range(count)]


def mix_predictions(
    denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor, conditions: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the predictions for M conditions, in one batched forward.

    Args:
        denoiser: The model.
        x: float (B, 3, H, W), noisy images.
        t: int64 (B,).
        conditions: int64 (B, M).
        weights: float (M,).
    """
    count = conditions.shape[1]
    stacked = denoiser(x.repeat(count, 1, 1, 1), t.repeat(count), conditions.T.reshape(-1))
    return torch.einsum("m,mbchw->bchw", weights, stacked.float().reshape(count, *x.shape))


@torch.inference_mode()
def guided_partial_sample(
    denoiser: Denoiser,
    images: torch.Tensor,  # float (B, 3, H, W) in [-1, 1]
    conditions: torch.Tensor,  # int64 (B, M), see guidance_terms
    weights: torch.Tensor,  # float (M,)
    noise: Noise,  # draw 1 noises the image, draws 2, 3, ... are the steps' own (ddpm only)
    config: DiffusionConfig,
    *,
    start_fraction: float,  # S / T
    sampler: str = "dpm",  # ddpm | ddim | dpm
    steps: int = 10,
    callback: Callable[[int, torch.Tensor], None] | None = None,  # called with (t, x) before each step
) -> torch.Tensor:
    """x_S = sqrt(abar_S) x + sqrt(1 - abar_S) eps, then guided denoising from S to 0 (METHOD section 3).

    Returns:
        float32 (B, 3, H, W), not clipped.
    """
    start = start_step(start_fraction, config.timesteps)
    scheduler = make_scheduler(config, sampler)
    scheduler.set_timesteps(timesteps=visited_steps(start, steps), device=images.device)
    x = add_noise(images, noise(1), alphas_bar(config)[start].float())
    for number, t in enumerate(scheduler.timesteps):
        if callback is not None:
            callback(int(t), x)
        predicted = mix_predictions(denoiser, x, t.expand(len(x)), conditions, weights)
        own = noise(2 + number) if sampler == "ddpm" else None
        x = scheduler.step(predicted, t, x, variance_noise=own, return_dict=False)[0]
    return x
