"""Guided partial sampling: noise an image to S, denoise it to 0. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DModel

from ..config import DiffusionConfig
from ..training import resolve_precision, unet_format
from .training import add_noise
from .unet import alphas_bar, make_scheduler

Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t, t (B,), class (B,)) -> prediction
Noise = Callable[[int], torch.Tensor]  # draw number -> standard normal (B, 3, H, W)
SECOND_ORDER_STEPS = 5  # with fewer, `dpm` is of first order


def start_step(start_fraction: float, timesteps: int) -> int:
    """The index t of the noisiest step visited: S = start_fraction * T steps, the last of which is t = 0."""
    return max(1, round(start_fraction * timesteps)) - 1


def visited_steps(start: int, steps: int) -> list[int]:
    """Training timesteps from `start` downwards, evenly spaced and without repetition; the next would be clean.

    There are `steps` of them, or all start + 1 where these are fewer.
    """
    count = min(steps, start + 1)
    return [round((start + 1) * (count - i) / count) - 1 for i in range(count)]


def solver(sampler: str, steps: int) -> str:
    """The sampler that makes so many steps: `ddim`, DPM-Solver++ of first order, for `dpm` with fewer than SECOND_ORDER_STEPS.

    Second order extrapolates from the prediction before, and a guided prediction at the highest noise level overshoots; the
    steps that would make up for that are missing where there are three or four.
    """
    return "ddim" if sampler == "dpm" and steps < SECOND_ORDER_STEPS else sampler


def as_denoiser(unet: UNet2DModel, precision: str) -> Denoiser:
    """A U-Net as it is sampled from, in `float32`, `bf16` or, by the device, `auto`."""

    def denoiser(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        bf16 = resolve_precision(precision, x.device.type == "cuda") == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return unet(x.to(memory_format=unet_format(x.device)), t, class_labels=condition, return_dict=False)[0]  # type: ignore[no-any-return]

    return denoiser


def mix_predictions(
    denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor, conditions: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the predictions for M conditions, in one batched forward.

    Args:
        denoiser: The model.
        x: float (B, 3, H, W), noisy images.
        t: int64 (B,).
        conditions: int64 (B, M).
        weights: float (M,), or (B, M) where each image has its own.
    """
    count = conditions.shape[1]
    stacked = denoiser(x.repeat(count, 1, 1, 1), t.repeat(count), conditions.T.reshape(-1))
    return torch.einsum("bm,mbchw->bchw", weights.expand(conditions.shape), stacked.float().reshape(count, *x.shape))


def is_guided(t: int, timesteps: int, interval: tuple[float, float]) -> bool:
    """Whether step t (0 .. T - 1, which stands for the noise level (t + 1) / T) lies in the closed interval of fractions of T."""
    return interval[0] <= (t + 1) / timesteps <= interval[1]


@torch.no_grad()  # under inference_mode no cast weights are kept
def guided_partial_sample(
    denoiser: Denoiser,
    images: torch.Tensor,  # float (B, 3, H, W) in [-1, 1]
    conditions: torch.Tensor,  # int64 (B, M), see guidance_terms
    weights: torch.Tensor,  # float (M,) or (B, M)
    noise: Noise,  # draw 1 noises the image, draws 2, 3, ... are the steps' own (ddpm only)
    config: DiffusionConfig,
    *,
    start_fraction: float,  # S / T
    sampler: str = "dpm",  # ddpm | ddim | dpm
    steps: int = 10,
    guidance_interval: tuple[float, float] = (0.0, 1.0),  # noise levels, fractions of T, at which the terms hold
    outside: tuple[torch.Tensor, torch.Tensor] | None = None,  # conditions and weights elsewhere: guidance_terms at w = 0
    callback: Callable[[int, torch.Tensor], None] | None = None,  # called with (t, x) before each step
) -> torch.Tensor:
    """x_S = sqrt(abar_S) x + sqrt(1 - abar_S) eps, then guided denoising from S to 0 (METHOD section 3).

    All but the denoiser, which has its own precision, computes in float32, and nothing waits for the device.
    Outside of `guidance_interval` the `outside` terms are mixed instead, which at w = 0 are one forward less (Kynkaanniemi
    et al. 2024); they are needed as soon as a visited step lies there.

    Returns:
        float32 (B, 3, H, W), not clipped.
    """
    start = start_step(start_fraction, config.timesteps)
    visited = visited_steps(start, steps)
    scheduler = make_scheduler(config, solver(sampler, len(visited)))
    scheduler.set_timesteps(timesteps=visited)
    x = add_noise(images, noise(1), alphas_bar(config)[start].float())
    with torch.autocast(images.device.type, enabled=False):  # the outer one: weights that the denoiser's casts are kept
        for number, t in enumerate(visited):
            if callback is not None:
                callback(t, x)
            terms = (conditions, weights) if is_guided(t, config.timesteps, guidance_interval) else outside
            if terms is None:
                raise ValueError(f"step {t} is outside of guidance_interval {guidance_interval} and `outside` is not given")
            predicted = mix_predictions(denoiser, x, torch.full((len(x),), t, device=x.device), *terms)
            own = noise(2 + number) if sampler == "ddpm" else None
            x = scheduler.step(predicted, t, x, variance_noise=own, return_dict=False)[0]
    return x
