"""SimCLR's throughput: our batched views against a DataLoader that augments image by image.

    python -m benchmarks.simclr_speed DATA_ROOT [--loader lightly]

DATA_ROOT holds OpenOOD's `images_classic` and `benchmark_imglist`. Two things are timed on the same images, device and
network: the data alone (two views of each image, on the device) and the whole training. `--loader torchvision` is the way of
SCAN's reference implementation (torchvision's random resized crop, flip, colour jitter and grey on PIL images), `--loader
lightly` is lightly's SimCLRTransform without blur, its setting for CIFAR-10; lightly is no dependency of this project. Both
read images that are already decoded in memory, with as many workers as there are processors. A tiny size: `--images 64
--batch-size 32 --backbone small_cnn --batches 1`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.readme import table
from benchmarks.record import RESULTS, write_result
from sdood_plugin.clustering.pool import ImagePool, compiled
from sdood_plugin.clustering.simclr import nt_xent
from sdood_plugin.config import DataConfig, ImagesConfig, RunConfig
from sdood_plugin.data.augment import contrastive_view
from sdood_plugin.data.sources import load_images
from sdood_plugin.features import Backbone
from sdood_plugin.training import make_accelerator, place


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simclr_speed", description=__doc__.split("\n")[0])
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--loader", choices=("torchvision", "lightly"), default="torchvision")
    parser.add_argument("--backbone", default="resnet18_cifar")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--batches", type=int, default=15, help="timed ones of each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    return parser.parse_args(argv)


class TwoViews(Dataset):
    """Two views of each PIL image, what lightly and the reference implementation feed SimCLR with."""

    def __init__(self, images: torch.Tensor, transform: Callable[[Image.Image], list[torch.Tensor]]) -> None:
        self.images, self.transform = images.permute(0, 2, 3, 1).contiguous().numpy(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return self.transform(Image.fromarray(self.images[index]))


def their_transform(loader: str, size: int) -> Callable[[Image.Image], list[torch.Tensor]]:
    """PIL image to two float (3, H, W) views."""
    if loader == "lightly":
        from lightly.transforms import SimCLRTransform

        return SimCLRTransform(input_size=size, gaussian_blur=0.0)
    from torchvision import transforms

    one = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    return lambda image: [one(image), one(image)]


def their_views(images: torch.Tensor, settings: argparse.Namespace, device: torch.device) -> Iterator[torch.Tensor]:
    """float (2B, 3, H, W) on the device, without end."""
    data = TwoViews(images, their_transform(settings.loader, images.shape[-1]))
    loader = DataLoader(
        data,
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        pin_memory=device.type == "cuda",
    )
    while True:
        for first, second in loader:
            yield torch.cat([first, second]).to(device, non_blocking=True)


def our_views(images: torch.Tensor, settings: argparse.Namespace, device: torch.device) -> Iterator[torch.Tensor]:
    """float (2B, 3, H, W) on the device, without end."""
    pool, generator = ImagePool(images, device), torch.Generator(device).manual_seed(0)
    while True:
        batch = pool[torch.randperm(len(pool), generator=generator, device=device)[: settings.batch_size]]
        yield torch.cat([contrastive_view(batch, generator, "natural") for _ in range(2)])


def trainer(settings: argparse.Namespace, accelerator: Any) -> Callable[[torch.Tensor], None]:
    """One step of SimCLR on views, the same for both."""
    device = accelerator.device
    backbone = Backbone(settings.backbone)
    model = place(nn.Sequential(backbone, nn.Linear(backbone.feature_size, 64)), device)
    optimizer, network = torch.optim.AdamW(model.parameters()), compiled(model, device)

    def step(views: torch.Tensor) -> None:
        with accelerator.autocast():
            first, second = network(views.contiguous(memory_format=torch.channels_last)).chunk(2)
        optimizer.zero_grad(set_to_none=True)
        nt_xent(first, second, 0.2).backward()
        optimizer.step()

    return step


def images_per_s(views: Iterator[torch.Tensor], use: Callable[[torch.Tensor], None], settings: argparse.Namespace) -> list[float]:
    """Images (of two views each) a second, one figure a repeat; workers and compilation have a head start."""
    device = next(views).device
    for _ in range(2):
        use(next(views))
    found = []
    for _ in range(settings.repeats):
        _wait(device)
        started = time.perf_counter()
        for _ in range(settings.batches):
            use(next(views))
        _wait(device)
        found.append(settings.batches * settings.batch_size / (time.perf_counter() - started))
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> None:
    """Time, write and print."""
    settings = arguments(argv)
    accelerator = make_accelerator(RunConfig(device=settings.device))
    imglist = settings.data_root / "benchmark_imglist" / "cifar10" / "train_cifar10.txt"
    source = ImagesConfig(str(imglist), root=str(settings.data_root / "images_classic"), limit=settings.images)
    images = load_images(source, DataConfig(image_size=32), seed=0).images
    rows: list[dict[str, Any]] = []
    for what, use in (("data", lambda views: None), ("training", trainer(settings, accelerator))):
        speeds = {}
        for name, make in (("ours", our_views), (settings.loader, their_views)):
            speeds[name] = images_per_s(make(images, settings, accelerator.device), use, settings)
        ours, theirs = (statistics.median(values) for values in speeds.values())
        for name, values in speeds.items():
            rows.append({"what": what, "method": name, "images_per_s": statistics.median(values), "repeats": values})
        rows.append({"what": what, "method": f"ours / {settings.loader}", "ratio": ours / theirs})
        facts = {"data": {"cifar10_train": len(images)}, "backbone": settings.backbone}
        facts |= {"batch_size": settings.batch_size, "workers": settings.workers}
        where = {"folder": settings.folder, "device": settings.device, "data_root": settings.data_root}
        write_result(f"simclr_speed-{settings.loader}", vars(settings), [0], rows, facts, **where)
    print(table(rows))


if __name__ == "__main__":
    main()
