"""Training of the diffusion model in two processes; started by test_diffusion_training.py in each: two_processes.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sdood_plugin.__main__ import leave
from sdood_plugin.config import DiffusionConfig, RunConfig
from sdood_plugin.diffusion.training import train_diffusion
from sdood_plugin.errors import RunError
from sdood_plugin.training import Job, make_accelerator, train_steps


def train(accelerator, folder: Path) -> dict[str, object]:
    """Weights, losses and number of processes."""
    images = torch.randint(256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    config = DiffusionConfig(size="tiny", timesteps=100, max_start_fraction=0.5, steps=5, batch_size=6)
    unet, history = train_diffusion(images, torch.arange(12) % 3, config, Job(accelerator, folder), classes=3)
    return {"weights": unet.state_dict(), "losses": history["loss"], "processes": accelerator.num_processes}


def diverge(accelerator, folder: Path) -> str:
    """What a training says whose loss is not finite at step 2 of the last process alone."""
    last = accelerator.process_index == accelerator.num_processes - 1

    def step(index: int) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(float("nan") if last and index == 2 else 1.0)}

    try:
        train_steps(step, 4, {}, Job(accelerator, folder), name="trial")
    except RunError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    accelerator, folder = make_accelerator(RunConfig(device="cpu")), Path(sys.argv[1])
    found = {**train(accelerator, folder), "error": diverge(accelerator, folder)}
    torch.save(found, folder / f"{accelerator.process_index}.pt")
    leave(0)
