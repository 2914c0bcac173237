"""The stage that makes the outlier set and its same-class controls, whole or a shard of it, and the look at a few beforehand."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DModel

from .artifacts import file_hash, provenance
from .backbones import HUB, RANDOM, weights_file
from .context import Context
from .data.images import spread
from .detector.network import load_network
from .diffusion.unet import load_unet
from .errors import RunError
from .features import evaluating, extract
from .outliers.blocks import in_blocks
from .outliers.dataset import OutlierSet
from .outliers.generate import generate as make
from .outliers.generate import sample_jobs
from .outliers.merge import check_shards
from .outliers.recipe import Recipe
from .outliers.storage import META, STATE, remove_set, set_key
from .outliers.verdicts import Judge
from .training import place, unet_format

log = logging.getLogger(__name__)


def generate(run: Context, folder: Path, key: str) -> None:
    """outliers/ and, if wanted, controls/, made of all training images, held-out ones included."""
    make_sets(run, run.folder)


def whole(run: Context) -> bool:
    """Whether every file of the sets is the one that was made; says which is not."""
    try:
        for name in recipes(run):
            OutlierSet(run.folder / name).verify()
    except RunError as error:
        log.warning("%s", error)
        return False
    return True


def make_sets(run: Context, into: Path, *, shard: tuple[int, int] | None = None, shards: Sequence[Path] = ()) -> None:
    """Write `into`/controls, if wanted, and `into`/outliers; what is there of the same recipe is kept.

    Args:
        run: A run with trained reference network and diffusion model.
        into: The run folder, or a shard's own.
        shard: (i, n): only the i-th of n parts.
        shards: Folders written by all n shards, to be put together.
    """
    unet, judge = load_sampler(run), load_judge(run)
    found = {name: as_begun(recipe, run, [folder / name for folder in (into, *shards)]) for name, recipe in recipes(run).items()}
    if run.is_main and shards:
        for name, recipe in found.items():  # all of them before a set is touched
            check_shards([other / name for other in shards], recipe)
    if "controls" not in found and run.is_main:
        remove_set(into / "controls")
    for name, recipe in found.items():
        make(
            recipe,
            unet,
            into / name,
            accelerator=run.accelerator,
            judge=judge,
            shard=shard,
            shards=[other / name for other in shards],
            controls=into / "controls" if name == "outliers" and "controls" in found else None,
            name=name,
        )


def as_begun(recipe: Recipe, run: Context, folders: Sequence[Path]) -> Recipe:
    """The recipe; where precision is `auto`, in the one that folders which hold a part of its set were begun in."""
    other = dataclasses.replace(recipe, precision="bf16" if recipe.precision == "float32" else "float32")
    keys = {set_key(folder / name) for folder in folders for name in (META, STATE)}
    return other if run.config.precision == "auto" and other.key in keys and recipe.key not in keys else recipe


def recipes(run: Context) -> dict[str, Recipe]:
    """What to make, by the name of its folder: controls first, which the outliers' data card shows."""
    config = run.config.outliers
    outliers = Recipe(
        run.train,
        run.labels.labels,
        run.labels.classes,
        config,
        run.config.diffusion,
        run.seed("outliers"),
        file_hash(run.folder / "diffusion" / "unet.safetensors"),
        file_hash(run.folder / "reference" / "reference.safetensors"),
        run.heldout,
        run.precision,
        _origin(run),
    )
    same = dataclasses.replace(outliers, config=dataclasses.replace(config, mode="same", per_source=1))
    return {"controls": same, "outliers": outliers} if config.controls else {"outliers": outliers}


def _origin(run: Context) -> dict[str, str | None]:
    """Where images, labels and reference network of a run come from: names, hashes of weights, no paths."""
    data, clustering, weights = run.config.data.train, run.config.clustering, run.detector.weights
    given = clustering.method == "given"
    return {
        "data": "demo" if data.path == "demo" else Path(data.path).resolve().name,
        "label_source": clustering.method,
        "label_backbone": None if given else clustering.backbone,
        "label_weights": None if given else _weights(clustering.weights),
        "reference_backbone": run.config.detector.backbone,
        "reference_weights": "clustering" if (run.folder / "clustering") in Path(str(weights)).parents else _weights(weights),
        "commit": provenance(())["commit"],
    }


def _weights(name: str | None) -> str:
    """What a network started from: `random` weights, timm's own (`hub`), or those of a file by its hash."""
    if file := weights_file(name):
        return file_hash(file)
    return HUB if name == HUB else RANDOM


def load_sampler(run: Context) -> UNet2DModel:
    """The run's diffusion model on its device."""
    weights, device = run.folder / "diffusion" / "unet.safetensors", run.accelerator.device
    unet = load_unet(weights, run.config.diffusion, classes=run.labels.classes, image_size=run.train.images.shape[-1])
    return place(unet, device, unet_format(device))


def load_judge(run: Context) -> Judge:
    """The run's reference network as a function of uint8 images: features and class probabilities."""
    device = run.accelerator.device
    network = load_network(run.folder / "reference" / "reference.safetensors").to(device)

    def judge(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = extract(network.backbone, images, device=device)
        with evaluating(network):
            return features, network.g_in(features).softmax(dim=1)

    return judge


def sample_triplets(run: Context, count: int) -> list[torch.Tensor]:
    """Sources spread over the training images, their controls and their outliers: uint8 (K, 3, H, W) each, K at most `count`.

    They are those of the set to be made, but for rounding.
    """
    outliers, unet = recipes(run)["outliers"], load_sampler(run)
    controls = dataclasses.replace(outliers, config=dataclasses.replace(outliers.config, mode="same"))
    rows = spread(len(run.train), min(count, len(run.train)))
    parts = in_blocks(torch.stack([rows, torch.zeros_like(rows)], dim=1), outliers.config, outliers.seed)
    size = max(len(part.jobs) for part in parts)  # one shape for all, as each is compiled for itself
    made = [
        torch.cat([sample_jobs(recipe, unet, part.jobs, run.accelerator.device, size) for part in parts])
        for recipe in (controls, outliers)
    ]
    return [run.train.images[torch.cat([part.jobs[:, 0] for part in parts])], *made]
