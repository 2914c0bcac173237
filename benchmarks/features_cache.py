"""Features of image lists through one frozen backbone, computed once and kept as safetensors.

    python -m benchmarks.features_cache DATA_ROOT --weights vit_tiny_patch16_224.safetensors --cache FOLDER

DATA_ROOT holds OpenOOD's `images_classic` and `benchmark_imglist`. One file a set with `features` float32 (N, D), `labels`
int64 (N,) and `index` int64 (N,), the line of its imglist (counted from 0) each row comes from. All images are made 32 x 32
first, as OpenOOD does for CIFAR-10, and the backbone resizes them to its own input. A file that is there is not made again,
unless the images or the weights it was made of are others now.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from sdood_plugin.artifacts import file_hash, read_tensors, value_hash, write_tensors
from sdood_plugin.config import DataConfig, ImagesConfig
from sdood_plugin.data.images import ImageSet, spread
from sdood_plugin.data.sources import load_images
from sdood_plugin.features import extract, load_backbone

BACKBONE = "vit_tiny_patch16_224"
CACHE = Path(__file__).parent.parent / "runs" / "features"
LISTS = {  # name of the set -> imglist; None takes every line
    "cifar10_train": "train_cifar10.txt",
    "cifar10_test": "test_cifar10.txt",
    "cifar100": "test_cifar100.txt",
    "tin": "test_tin.txt",
}
TRAIN_IMAGES = 10_000  # of 50,000, spread evenly over the list


def cached_features(
    data_root: Path,
    weights: Path,
    cache: Path = CACHE,
    *,
    backbone: str = BACKBONE,
    train_images: int = TRAIN_IMAGES,
    test_images: int | None = None,
    device: str = "cpu",
    names: Iterable[str] = LISTS,
) -> dict[str, dict[str, torch.Tensor]]:
    """`features`, `labels` and `index` of sets of `LISTS`, read from the cache or made and put there."""
    found = {}
    for name in names:
        path = data_root / "benchmark_imglist" / "cifar10" / LISTS[name]
        limit = train_images if name == "cifar10_train" else test_images
        found[name] = _cached(path, limit, data_root / "images_classic", weights, cache / f"{name}.safetensors", backbone, device)
    return found


def line_names(data_root: Path, name: str, index: torch.Tensor) -> list[str]:
    """The images' names at some lines of a set's imglist."""
    lines = _lines(data_root / "benchmark_imglist" / "cifar10" / LISTS[name])
    return [lines[row].rsplit(maxsplit=1)[0] for row in index.tolist()]


def _lines(imglist: Path) -> list[str]:
    return [line for line in imglist.read_text().splitlines() if line.strip()]


def _cached(
    imglist: Path, limit: int | None, root: Path, weights: Path, file: Path, backbone: str, device: str
) -> dict[str, torch.Tensor]:
    lines = _lines(imglist)
    count = min(limit or len(lines), len(lines))
    origin = {"imglist": imglist.name, "backbone": backbone, "images": str(count), "lines": value_hash(lines)}
    if origin_of(file) != origin | {"weights": file_hash(weights)}:
        images = load_images(ImagesConfig(str(imglist), root=str(root), limit=count), DataConfig(image_size=32), seed=0)
        assert images.labels is not None, "an imglist has labels"
        tensors = {
            "features": features_of(images, load_backbone(backbone, weights), device),
            "labels": images.labels,
            "index": spread(len(lines), count),
        }
        write_tensors(file, tensors, origin | {"weights": file_hash(weights)})
    return read_tensors(file)


def features_of(images: ImageSet, backbone: torch.nn.Module, device: str, batch_size: int = 50) -> torch.Tensor:
    """float32 (N, D) on the CPU; small batches stay in a processor's cache."""
    return extract(backbone.to(device), images.images, device=torch.device(device), batch_size=batch_size).cpu()


def origin_of(file: Path) -> dict[str, str]:
    """What a cached file was made of; empty where there is none."""
    from safetensors import safe_open

    if not file.exists():
        return {}
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def main() -> None:
    """Fill the cache."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--train-images", type=int, default=TRAIN_IMAGES)
    parser.add_argument("--test-images", type=int, help="of every test set, spread evenly; all without it")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sets = cached_features(
        options.data_root,
        options.weights,
        options.cache,
        train_images=options.train_images,
        test_images=options.test_images,
        device=options.device,
    )
    for name, tensors in sets.items():
        print(name, tuple(tensors["features"].shape))


if __name__ == "__main__":
    main()
