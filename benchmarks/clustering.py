"""Pseudo-labels of CIFAR-10: methods on the same frozen features, and the full path from scratch.

    python -m benchmarks.clustering features DATA_ROOT --weights vit_tiny_patch16_224.safetensors --cache train.safetensors
    sdood cluster --config configs/cifar10_clustering.yml --out RUN ; python -m benchmarks.clustering scratch RUN

DATA_ROOT holds OpenOOD's `images_classic` and `benchmark_imglist`. `features` compares k-means, a Gaussian mixture, the SCAN
head and the SCAN head with self-labelling; features are computed once and read from `--cache` afterwards. `scratch` measures
what `sdood cluster` has made and keeps the labels as results/clustering-scratch-labels.npy, a file `--labels` takes. True
labels are looked at for ACC, NMI and ARI, never before. A tiny size: `--images 500 --seeds 0`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.features_cache import features_of
from benchmarks.readme import table
from benchmarks.record import RESULTS, write_result
from sdood_plugin.artifacts import atomic_path, read_json, read_tensors, write_tensors
from sdood_plugin.cli import read_config
from sdood_plugin.clustering.labels import read_labels
from sdood_plugin.clustering.mixtures import gaussian_mixture, k_means
from sdood_plugin.clustering.processes import mine_neighbours
from sdood_plugin.clustering.scan import feature_scale, scan_head
from sdood_plugin.clustering.self_label import self_label_head
from sdood_plugin.config import ClusteringConfig, DataConfig, ImagesConfig, RunConfig, as_dict
from sdood_plugin.context import Context
from sdood_plugin.data.sources import load_images
from sdood_plugin.errors import SdoodError
from sdood_plugin.features import load_backbone
from sdood_plugin.metrics import clustering_metrics
from sdood_plugin.randomness import derive_seed
from sdood_plugin.training import make_accelerator

CONFIG = ClusteringConfig(self_label_epochs=20)  # all else as it is by default: K 20, entropy 5, ten heads, 60 epochs


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clustering", description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    features = kinds.add_parser("features", help="methods on frozen features")
    features.add_argument("data_root", type=Path)
    features.add_argument("--cache", type=Path, help="safetensors with `features` and `labels`; made where it is absent")
    features.add_argument("--backbone", default="vit_tiny_patch16_224")
    features.add_argument("--weights", type=Path, help="safetensors of the backbone, where the cache is absent")
    features.add_argument("--images", type=int, default=10_000, help="training images at most, spread evenly")
    features.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    features.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    scratch = kinds.add_parser("scratch", help="what `sdood cluster` has made")
    scratch.add_argument("runs", type=Path, nargs="+", help="run folders, one a seed")
    for command in (features, scratch):
        command.add_argument("--folder", type=Path, default=RESULTS, help="where the result goes")
    return parser.parse_args(argv)


def load_features(settings: argparse.Namespace) -> dict[str, torch.Tensor]:
    """`features` float32 (N, D) and `labels` int64 (N,), from the cache or made and put there."""
    if settings.cache is not None and settings.cache.exists():
        return read_tensors(settings.cache)
    imglist = settings.data_root / "benchmark_imglist" / "cifar10" / "train_cifar10.txt"
    source = ImagesConfig(str(imglist), root=str(settings.data_root / "images_classic"), limit=settings.images)
    images = load_images(source, DataConfig(image_size=32), seed=0)
    device = str(make_accelerator(RunConfig(device=settings.device)).device)
    assert images.labels is not None, "an imglist has labels"
    found = {
        "features": features_of(images, load_backbone(settings.backbone, settings.weights), device),
        "labels": images.labels,
    }
    if settings.cache is not None:
        write_tensors(settings.cache, found)
    return found


def row(method: str, seed: int, labels: torch.Tensor, true: torch.Tensor, seconds: float) -> dict[str, Any]:
    """One record."""
    figures = clustering_metrics(labels.cpu(), true)
    return {"method": method, "seed": seed, **figures, "n": len(true), "seconds": round(seconds, 1)}


def compare(features: torch.Tensor, true: torch.Tensor, seed: int, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method on float32 (N, D) features with one seed."""
    rows, accelerator = [], make_accelerator(RunConfig(device=settings.device))
    seed_of_stage = derive_seed(seed, "cluster")
    for name, method in (("k-means", k_means), ("Gaussian mixture", gaussian_mixture)):
        started = time.perf_counter()
        rows.append(row(name, seed, method(features, CONFIG.clusters, seed_of_stage)[0], true, time.perf_counter() - started))
    features, started = features.to(accelerator.device), time.perf_counter()
    mean, std = feature_scale(features)
    neighbours = mine_neighbours(F.normalize((F.normalize(features, dim=1) - mean) / std, dim=1), CONFIG.neighbours, accelerator)
    head, _ = scan_head(features, neighbours, CONFIG, seed_of_stage)
    for name in ("SCAN head", "SCAN head, self-labelling"):
        if name != "SCAN head":
            self_label_head(head, features, CONFIG, seed_of_stage)
        with torch.no_grad():
            labels = head(features).argmax(dim=1)
        rows.append(row(name, seed, labels, true, time.perf_counter() - started))
    return rows


def measure_features(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """All seeds; the result is written after each."""
    data = load_features(settings)
    facts = {"data": {"cifar10_train": len(data["labels"])}, "features": f"{settings.backbone}, pre-trained, frozen"}
    rows: list[dict[str, Any]] = []
    where = {"folder": settings.folder, "device": settings.device}
    for index, seed in enumerate(settings.seeds):
        rows += compare(data["features"], data["labels"], seed, settings)
        write_result("clustering", as_dict(CONFIG), settings.seeds[: index + 1], rows, facts, **where)
    return rows


def measure_runs(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """The labels of run folders against the true ones; those of the first run are kept as a file."""
    rows, seeds, config = [], [], {}
    for run in settings.runs:
        context = Context(read_config(run / "config.yaml"), run)
        true = context.train.labels
        if true is None:
            raise SystemExit(f"{run}: its images have no true labels to compare with")
        labels = read_labels(run / "labels.csv", context.train).labels
        seconds = read_json(run / "stages" / "cluster.json")["seconds"]
        rows.append(row("SimCLR, SCAN, self-labelling", context.config.seed, labels, true, seconds))
        if not seeds:
            config = as_dict(context.config)
            with atomic_path(settings.folder / "clustering-scratch-labels.npy") as temporary:
                np.save(temporary, labels.numpy().astype(np.uint8))
        seeds.append(context.config.seed)
    facts = {"data": {"train": rows[0]["n"]}, "backbone": config["clustering"]["backbone"], "clustering": config["clustering"]}
    write_result("clustering-scratch", config, seeds, rows, facts, folder=settings.folder, device=config["device"])
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, write and print."""
    settings = arguments(argv)
    print(table(measure_features(settings) if settings.kind == "features" else measure_runs(settings)))


if __name__ == "__main__":
    try:
        main()
    except SdoodError as error:
        sys.exit(str(error))
