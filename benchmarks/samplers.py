"""Ways to make outliers with the same weights: two that a user would write with diffusers, and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

from sdood_plugin.config import OutliersConfig, RunConfig
from sdood_plugin.data.images import to_uint8, to_unit
from sdood_plugin.diffusion.guidance import guidance_terms, wrong_classes
from sdood_plugin.diffusion.sampling import start_step
from sdood_plugin.diffusion.training import add_noise
from sdood_plugin.diffusion.unet import SCHEDULES, alphas_bar
from sdood_plugin.outliers.sample import sample_batch
from sdood_plugin.randomness import normal, step_generator


class Batch(NamedTuple):
    """Sources: uint8 (B, 3, H, W), pseudo-labels int64 (B,) and identities int64 (B,), on the device."""

    images: torch.Tensor
    labels: torch.Tensor
    identity: torch.Tensor


@dataclass
class Setting:
    """What all ways share."""

    unet: UNet2DModel
    run: RunConfig
    outliers: OutliersConfig
    classes: int
    device: torch.device
    seed: int = 0


Way = Callable[[Setting, Batch], torch.Tensor]  # makes uint8 (B, 3, H, W)


def noised(setting: Setting, batch: Batch) -> torch.Tensor:
    """x_S, as ours draws it."""
    start = start_step(setting.outliers.start_fraction, setting.run.diffusion.timesteps)
    noise = normal(setting.seed, batch.identity, 1, tuple(batch.images.shape[1:]))
    return add_noise(to_unit(batch.images), noise, alphas_bar(setting.run.diffusion)[start].float())


def terms(setting: Setting, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The conditions and weights of the mode."""
    wrong = wrong_classes(batch.labels, setting.classes, seed=setting.seed, index=batch.identity)
    return guidance_terms(setting.outliers.mode, setting.outliers.guidance_weight, batch.labels, wrong, setting.classes)


@torch.no_grad()
def naive(setting: Setting, batch: Batch, batched: bool = False) -> torch.Tensor:
    """Ancestral sampling with every step from S; one forward a condition unless `batched`."""
    diffusion = setting.run.diffusion
    scheduler = DDPMScheduler(
        num_train_timesteps=diffusion.timesteps,
        beta_schedule=SCHEDULES[diffusion.schedule],
        variance_type="fixed_small",
        clip_sample=False,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[diffusion.prediction],
    )
    scheduler.set_timesteps(diffusion.timesteps)
    conditions, weights = terms(setting, batch)
    generator = step_generator(setting.seed, "naive", int(batch.identity[0]), setting.device)
    x = noised(setting, batch)
    for t in scheduler.timesteps[-(start_step(setting.outliers.start_fraction, diffusion.timesteps) + 1) :]:
        if batched:
            predicted = _mixed(setting, x, t, conditions, weights)
        else:
            predicted = sum(weight * setting.unet(x, t, class_labels=conditions[:, m]).sample for m, weight in enumerate(weights))
        x = scheduler.step(predicted, t, x, generator=generator).prev_sample
    return to_uint8(x)


@torch.no_grad()
def informed(setting: Setting, batch: Batch, steps: int = 20, half: bool = True) -> torch.Tensor:
    """DPM-Solver++ from S with condition and null in one batch, bf16 on a GPU unless `half` is false."""
    diffusion = setting.run.diffusion
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=diffusion.timesteps,
        beta_schedule=SCHEDULES[diffusion.schedule],
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[diffusion.prediction],
    )
    start = start_step(setting.outliers.start_fraction, diffusion.timesteps)
    scheduler.set_timesteps(timesteps=torch.linspace(start, 0, steps + 1).round().long().tolist()[:-1], device=setting.device)
    conditions, weights = terms(setting, batch)
    x = noised(setting, batch)
    with torch.autocast(setting.device.type, torch.bfloat16, enabled=half and setting.device.type == "cuda"):
        for t in scheduler.timesteps:
            x = scheduler.step(_mixed(setting, x, t, conditions, weights), t, x).prev_sample
    return to_uint8(x)


def _mixed(setting: Setting, x: torch.Tensor, t: torch.Tensor, conditions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    count = conditions.shape[1]
    said = setting.unet(torch.cat([x] * count), t, class_labels=conditions.T.reshape(-1)).sample
    return sum(weight * part for weight, part in zip(weights, said.float().chunk(count), strict=True))


def ours(setting: Setting, batch: Batch, **changes: Any) -> torch.Tensor:
    """`sample_batch`, what `sdood generate` calls, with changed settings."""
    return sample_batch(
        setting.unet,
        *batch,
        replace(setting.outliers, **changes),
        setting.run.diffusion,
        classes=setting.classes,
        seed=setting.seed,
    )
