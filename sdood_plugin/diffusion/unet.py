"""The class-conditional U-Net and its noise schedule, both from diffusers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel

from ..artifacts import read_tensors
from ..config import DiffusionConfig

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
MAX_BETA = 0.999  # as in diffusers' cosine schedule
ALGORITHMS = {"ddpm": ("sde-dpmsolver++", 1), "ddim": ("dpmsolver++", 1), "dpm": ("dpmsolver++", 2)}


def build_unet(config: DiffusionConfig, *, classes: int, image_size: int) -> UNet2DModel:
    """A U-Net for C classes and the null class, which is class index C.

    Raises:
        UsageError: The image side cannot be halved as often as there are resolutions.
    """
    config.require_side(image_size)
    shape = config.shape
    attends = [level == shape.attention for level in range(len(shape.channels))]
    unet: UNet2DModel = UNet2DModel(
        sample_size=image_size,
        in_channels=3,
        out_channels=3,
        layers_per_block=shape.layers_per_block,
        block_out_channels=shape.channels,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        attention_head_dim=math.gcd(shape.channels[-1], 32),
        norm_num_groups=math.gcd(math.gcd(*shape.channels) // 4, 32),  # groups of one channel would wipe out class and step
        num_class_embeds=classes + 1,
    )
    if config.compile:
        unet.compile(dynamic=False)  # in place, so the weights keep their names; a batch shape each has its own kernels
    return unet


def load_unet(path: Path, config: DiffusionConfig, *, classes: int, image_size: int) -> UNet2DModel:
    """A U-Net with the weights of `path`."""
    unet = build_unet(config, classes=classes, image_size=image_size)
    unet.load_state_dict(read_tensors(path))
    return unet.eval()


def make_scheduler(config: DiffusionConfig, sampler: str = "dpm") -> DPMSolverMultistepScheduler:
    """diffusers' scheduler for one of our samplers.

    DPM-Solver++ of first order is DDIM, and its stochastic form is ancestral DDPM with the posterior variance (Lu et
    al. 2022, section 4.1 and appendix); so one scheduler serves all three.
    The betas of `linear` are those of Ho et al. (2020) for T = 1000 times 1000 / T (Nichol & Dhariwal 2021, their code), so
    that x_T is noise for every T; none is above 0.999.
    """
    algorithm, order = ALGORITHMS[sampler]
    scale = 1000 / config.timesteps
    return DPMSolverMultistepScheduler(
        num_train_timesteps=config.timesteps,
        beta_start=min(1e-4 * scale, MAX_BETA),
        beta_end=min(0.02 * scale, MAX_BETA),
        beta_schedule=SCHEDULES[config.schedule],
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[config.prediction],
        algorithm_type=algorithm,
        solver_order=order,
        final_sigmas_type="zero",
    )


def alphas_bar(config: DiffusionConfig) -> torch.Tensor:
    """float64 (T,), the products of 1 - beta: x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps."""
    return make_scheduler(config).alphas_cumprod.double()
