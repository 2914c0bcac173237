"""What many tests need: an accelerator on the CPU, a tiny U-Net and a few images."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin for each other take seconds a step on a busy machine

import pytest
import torch

from sdood_plugin.config import DiffusionConfig, RunConfig
from sdood_plugin.data.images import ImageSet
from sdood_plugin.training import make_accelerator

TINY = DiffusionConfig(size="tiny", timesteps=100, max_start_fraction=0.5, steps=5, batch_size=6)


@pytest.fixture(scope="session")
def accelerator():
    return make_accelerator(RunConfig(device="cpu"))


@pytest.fixture(scope="session")
def tiny() -> DiffusionConfig:
    return TINY


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def unet(tiny):
    """A U-Net for three classes with random weights, large enough that the class matters."""
    from sdood_plugin.diffusion.unet import build_unet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = build_unet(tiny, classes=3, image_size=8).eval()
    with torch.no_grad():
        unet.class_embedding.weight *= 3
    return unet.requires_grad_(False)


@pytest.fixture(scope="session")
def pictures() -> ImageSet:
    """Twelve random 8 x 8 images of three classes."""
    images = torch.randint(256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return ImageSet(images, [f"{i}.png" for i in range(12)], torch.arange(12) % 3)
