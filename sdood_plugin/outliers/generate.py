"""Generate an outlier set: every source image noised to S and denoised by a guidance mode, as PNG + imglist + manifest."""

from __future__ import annotations

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ..artifacts import read_json, write_csv, write_json, write_text
from ..config import DiffusionConfig, OutliersConfig
from ..data.images import ImageSet, save_png, spread, to_uint8, to_unit
from ..diffusion.guidance import guidance_terms, wrong_classes
from ..diffusion.sampling import guided_partial_sample
from ..errors import RunError
from ..randomness import normal
from ..training import progress_bar, unet_format

COLUMNS = (
    "file",
    "source_index",
    "copy",
    "source",
    "source_label",
    "target",
    "target2",
    "mode",
    "guidance_weight",
    "start_fraction",
    "sampler",
    "sampling_steps",
    "seed",
    "distance_to_source",
)
_COPY_STRIDE = 1 << 32  # identity of copy c of source i is i + c * 2^32: more copies never change the first ones


def jobs(count: int, config: OutliersConfig) -> torch.Tensor:
    """int64 (J, 2): source index and copy of every outlier to be made of `count` images, one copy after the other."""
    sources = torch.arange(count) if config.sources is None or config.sources >= count else spread(count, config.sources)
    return torch.cartesian_prod(torch.arange(config.per_source), sources).reshape(-1, 2).flip(1)


def blocks(count: int, config: OutliersConfig) -> list[torch.Tensor]:
    """The jobs in the batches they are always denoised in, whoever denoises them: int64 (at most batch_size, 2) each.

    The last bits of a convolution depend on an image's place in the batch and on the size of the batch (and on which
    machines, nobody says). An outlier has one block and one place in it, so it has one value.
    """
    todo = jobs(count, config)
    return [block for copy in todo.split(max(1, len(todo) // config.per_source)) for block in copy.split(config.batch_size)]


def file_name(source: int, copy: int) -> str:
    """Where an outlier lies in its folder: shards of 1,000 sources."""
    return f"images/{source // 1000:04d}/{source:07d}_{copy}.png"


def sample_batch(
    unet: UNet2DModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    identity: torch.Tensor,
    config: OutliersConfig,
    diffusion: DiffusionConfig,
    *,
    classes: int,
    seed: int,
) -> torch.Tensor:
    """Outliers of one batch: uint8 (B, 3, H, W) in and out, on the U-Net's device; row b depends on row b only, but for rounding.

    Args:
        unet: The diffusion model.
        images: uint8 (B, 3, H, W) sources.
        labels: int64 (B,) pseudo-labels.
        identity: int64 (B,), what the noise and the wrong class are drawn by.
        config: Mode, w, S, sampler, steps.
        diffusion: The model's settings.
        classes: C.
        seed: Seed of the outlier set.
    """
    wrong = wrong_classes(labels, classes, seed=seed, index=identity)
    conditions, weights = guidance_terms(config.mode, config.guidance_weight, labels, wrong, classes)

    def denoiser(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        x = x.to(memory_format=unet_format(x.device))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            return unet(x, t, class_labels=condition, return_dict=False)[0]

    clean = guided_partial_sample(
        denoiser,
        to_unit(images),
        conditions,
        weights,
        lambda draw: normal(seed, identity, draw, tuple(images.shape[1:])),
        diffusion,
        start_fraction=config.start_fraction,
        sampler=config.sampler,
        steps=config.sampling_steps,
    )
    if not torch.isfinite(clean).all():
        raise RunError("outliers", "NaN or infinite pixels", "finite images", "train the diffusion model longer or lower w")
    return to_uint8(clean)


def generate(
    unet: UNet2DModel,
    sources: ImageSet,
    labels: torch.Tensor,
    config: OutliersConfig,
    diffusion: DiffusionConfig,
    *,
    classes: int,
    accelerator: Accelerator,
    seed: int,
    folder: Path,
    key: str,
    name: str = "outliers",
) -> None:
    """Write an outlier set to `folder`; images that are there already are kept, so a killed run goes on.

    Every process makes its share of the images; the main one writes manifest, imglist and meta at the end. In the
    imglist an outlier carries its SOURCE's pseudo-label.

    Args:
        unet: The diffusion model on the accelerator's device.
        sources: Source images.
        labels: int64 (N,) their pseudo-labels.
        config: What to make of them.
        diffusion: The model's settings.
        classes: C.
        accelerator: Device and processes.
        seed: Seed of the outlier set.
        folder: Where it goes.
        key: What the set depends on; files of another key are removed.
        name: Name on the progress bar.
    """
    progress, finished = folder / "in-progress.json", folder / "meta.json"
    if accelerator.is_main_process and not any(
        file.exists() and read_json(file).get("key") == key for file in (progress, finished)
    ):
        for file in (finished, folder / "manifest.csv", folder / "imglist.txt"):
            file.unlink(missing_ok=True)
        shutil.rmtree(folder / "images", ignore_errors=True)
        write_json(progress, {"key": key})
    accelerator.wait_for_everyone()
    mine = blocks(len(sources), config)[accelerator.process_index :: accelerator.num_processes]
    missing = [[row for row in block.tolist() if not (folder / file_name(*row)).exists()] for block in mine]
    device = accelerator.device
    total = sum(map(len, missing))
    with progress_bar(name, total, "image", accelerator.is_main_process) as bar, ThreadPoolExecutor(4) as pool:
        for block, rows in zip(mine, missing, strict=True):
            if not rows:
                continue
            padded = torch.cat([block, block[-1:].expand(config.batch_size - len(block), 2)])  # one batch shape, one result
            chosen = padded[:, 0]
            made = sample_batch(
                unet,
                sources.images[chosen].to(device),
                labels[chosen].to(device),
                (chosen + padded[:, 1] * _COPY_STRIDE).to(device),
                config,
                diffusion,
                classes=classes,
                seed=seed,
            ).cpu()
            images = [image for row, image in zip(block.tolist(), made, strict=False) if row in rows]
            list(pool.map(save_png, [folder / file_name(*row) for row in rows], images))
            bar.update(len(rows))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(folder, sources, labels, jobs(len(sources), config), config, classes, seed, key)
    accelerator.wait_for_everyone()


def _finish(
    folder: Path,
    sources: ImageSet,
    labels: torch.Tensor,
    todo: torch.Tensor,
    config: OutliersConfig,
    classes: int,
    seed: int,
    key: str,
) -> None:
    from .dataset import read_images

    files = [file_name(*row) for row in todo.tolist()]
    made = read_images(folder, files)
    chosen = todo[:, 0]
    distance = (to_unit(made) - to_unit(sources.images[chosen])).square().mean(dim=(1, 2, 3)).sqrt()
    own = labels[chosen]
    wrong = wrong_classes(own, classes, seed=seed, index=chosen + todo[:, 1] * _COPY_STRIDE)
    first, second = _targets(config.mode, own, wrong)
    rows = [
        (
            file,
            source,
            copy,
            sources.names[source],
            label,
            a,
            b,
            config.mode,
            config.guidance_weight,
            config.start_fraction,
            config.sampler,
            config.sampling_steps,
            seed,
            f"{far:.6f}",
        )
        for file, (source, copy), label, a, b, far in zip(
            files, todo.tolist(), own.tolist(), first, second, distance.tolist(), strict=True
        )
    ]
    write_csv(folder / "manifest.csv", COLUMNS, rows)
    write_text(folder / "imglist.txt", "".join(f"{file} {label}\n" for file, label in zip(files, own.tolist(), strict=True)))
    write_json(
        folder / "meta.json",
        {"key": key, "count": len(files), "classes": classes, "seed": seed, "config": dataclasses.asdict(config)},
    )
    (folder / "in-progress.json").unlink(missing_ok=True)


def _targets(mode: str, own: torch.Tensor, wrong: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """The classes guidance pointed to, for the manifest; empty where a mode has none."""
    empty = [""] * len(own)
    if mode == "away":
        return empty, empty
    if mode == "same":
        return own.tolist(), empty
    return wrong[:, 0].tolist(), wrong[:, 1].tolist() if mode == "blend" else empty
