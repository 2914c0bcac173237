"""Outlier sets of a few random images, made by a tiny U-Net with random weights."""

from __future__ import annotations

import dataclasses

import torch

from sdood_plugin.config import OutliersConfig
from sdood_plugin.outliers.generate import generate
from sdood_plugin.outliers.recipe import Recipe
from sdood_plugin.outliers.storage import prepare

CONFIG = OutliersConfig(mode="other", guidance_weight=2.0, start_fraction=0.4, sampler="dpm", sampling_steps=3, batch_size=4)
RANGES = dataclasses.replace(CONFIG, per_source=2, guidance_weight=[-1.0, 3.0], start_fraction=[0.1, 0.5], sampling_steps=2)


def a_recipe(pictures, tiny, config=CONFIG, unet_sha256="a tiny U-Net", labels=None, reference=""):
    labels = pictures.labels if labels is None else labels
    return Recipe(pictures, labels, 3, config, tiny, 9, unet_sha256, reference)


def judge(images):
    """Class 0, 1 or 2 by the mean of a channel each; features are those means."""
    means = images.float().mean(dim=(2, 3))
    return means, (means / 8).softmax(dim=1)


def contents(folder):
    """Bytes by name of all files."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


class Share:
    """One of several processes that work one after the other."""

    def __init__(self, accelerator, index, count):
        self.device, self.process_index, self.num_processes, self.is_main_process = accelerator.device, index, count, index == 0

    def wait_for_everyone(self):
        pass


def write(folder, unet, recipe, accelerator, **options):
    generate(recipe, unet, folder, accelerator=accelerator, **options)
    return contents(folder)


def write_by_processes(folder, count, unet, recipe, accelerator, **options):
    """What `count` processes of one launch write."""
    folder.mkdir()
    prepare(folder, recipe.meta)  # which the main one does while the others wait
    for index in reversed(range(count)):  # the main one last: it writes the lists
        write(folder, unet, recipe, Share(accelerator, index, count), **options)
    return contents(folder)


def idle(*args, **kwargs):
    raise AssertionError("there is nothing left to make")


def spread_images(count, side=8):
    """uint8 (count, 3, side, side) random images."""
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
