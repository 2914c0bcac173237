"""Training speed of the detector against OpenOOD's own trainer and loader: the same network, batch size and optimiser.

OPENOOD_ROOT=/path/to/OpenOOD python -m benchmarks.detector_speed --data FOLDER [--networks small_cnn resnet18_cifar]

FOLDER holds benchmark_imglist and images_classic. Both train by cross-entropy on the same CIFAR-10 images, the host in
float32 with its augmentation and its default of 8 loader processes, ours as `sdood` does on that device (bf16 on a GPU; with
`--precision bf16` on a CPU, too, which pays where the processor has instructions for it).
`whole` is images a second through the training loop after its first steps; `loading` and `step` are its two halves alone:
reading, augmenting and stacking a batch, and the update on batches that are already there. Ours reads the images once
before it starts (`reading`), the host in every epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.record import write_result
from sdood_plugin.config import DataConfig, DetectorConfig, ImagesConfig, RunConfig
from sdood_plugin.data.augment import training_view
from sdood_plugin.data.images import to_unit
from sdood_plugin.data.sources import load_images
from sdood_plugin.detector.batches import Batches, Labelled, make_parts
from sdood_plugin.detector.training import train_detector
from sdood_plugin.features import Backbone
from sdood_plugin.hosts.openood.device import on_device
from sdood_plugin.hosts.openood.host import require_host
from sdood_plugin.randomness import step_generator
from sdood_plugin.training import Job, make_accelerator

WARM = 5  # steps before the clock starts: allocation, loader processes, compilation
LIST = "benchmark_imglist/cifar10/train_cifar10.txt"


class Clock:
    """Images a second between step `WARM` and the last."""

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self._device, self._batch_size, self._times = device, batch_size, list[float]()
        self._seen = 0

    def tick(self) -> None:
        """Once a step."""
        self._seen += 1
        if self._device.type == "cuda" and (self._seen == WARM or self._seen % 10 == 0):
            torch.cuda.synchronize()
        self._times.append(time.perf_counter())

    @property
    def images_per_s(self) -> float:
        """The rate, up to the last step that was waited for."""
        last = len(self._times) if self._device.type == "cpu" else len(self._times) // 10 * 10
        return (last - WARM) * self._batch_size / (self._times[last - 1] - self._times[WARM - 1])


def main() -> None:
    """Measure each network with each seed and write results/detector_speed[SUFFIX].json after each."""
    options = _options()
    require_host()
    accelerator = make_accelerator(RunConfig(device=options.device, precision=options.precision))
    started = time.perf_counter()
    count = options.steps * options.batch_size
    config = ImagesConfig(str(options.data / LIST), root=str(options.data / "images_classic"), limit=count)
    images = load_images(config, DataConfig(train=config), 0)
    assert images.labels is not None
    data = Labelled(images.images, images.labels)
    rows: list[dict[str, Any]] = [
        {"by": "sdood", "part": "reading", "images_per_s": len(data.images) / (time.perf_counter() - started), "n": count}
    ]
    for name, seed in itertools.product(options.networks, options.seeds):
        rates = dict((*_ours(name, data, seed, options, accelerator), *_theirs(name, seed, options, accelerator.device)))
        rows += _rows({"network": name, "seed": seed}, rates)
        facts = {"data": {"cifar10_train": len(data.images)}}
        settings = vars(options) | {"data": LIST}
        write_result(f"detector_speed{options.suffix}", settings, options.seeds, rows, facts, device=options.device)
    for row in rows:
        print(row)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=["small_cnn", "resnet18_cifar"])
    parser.add_argument("--steps", type=int, default=390, help=f"steps a measurement, {WARM} of them unmeasured")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=8, help="the host's loader processes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bf16"], help="of ours")
    parser.add_argument("--compile", action="store_true", help="torch.compile ours")
    parser.add_argument("--suffix", default="")
    options = parser.parse_args()
    if options.steps < 2 * WARM + 10:
        parser.error(f"--steps {options.steps}: give {2 * WARM + 10} or more")
    return options


def _rows(facts: dict[str, Any], rates: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    rows = [{**facts, "by": by, "part": part, "images_per_s": rate} for (by, part), rate in rates.items()]
    ratios = {part: rates["sdood", part] / rates["openood", part] for part in ("whole", "loading", "step")}
    return [*rows, *({**facts, "by": "ours / theirs", "part": part, "ratio": ratio} for part, ratio in ratios.items())]


def _ours(
    name: str, data: Labelled, seed: int, options: argparse.Namespace, accelerator: Any
) -> Iterator[tuple[tuple[str, str], float]]:
    config = DetectorConfig(
        backbone=name, epochs=1, batch_size=options.batch_size, optimizer="sgd", lr=0.1, compile=options.compile
    )

    def train(augmentation: Any) -> float:
        clock = Clock(accelerator.device, options.batch_size)

        def loss(heads: Any, labels: torch.Tensor, flags: torch.Tensor) -> dict[str, torch.Tensor]:
            clock.tick()
            return {"loss": F.cross_entropy(heads.inside.float(), labels)}

        with tempfile.TemporaryDirectory() as folder:
            train_detector(
                data,
                None,
                None,
                dataclasses.replace(config, augmentation=augmentation),
                Job(accelerator, Path(folder), seed),
                classes=10,
                loss=loss,
            )
        return clock.images_per_s

    yield ("sdood", "whole"), train("natural")
    yield ("sdood", "step"), train("none")
    device, clock = accelerator.device, Clock(accelerator.device, options.batch_size)
    parts = [
        part._replace(inputs=part.inputs.to(device), labels=part.labels.to(device))
        for part in make_parts(data, None, None, options.batch_size, (0, 0))
    ]
    batches = Batches(parts, seed, accelerator)
    for step in range(options.steps):
        inputs, _, _ = batches.draw(step)
        to_unit(training_view(inputs, step_generator(seed, "detector", step, device), "natural"))
        clock.tick()
    yield ("sdood", "loading"), clock.images_per_s


def _theirs(name: str, seed: int, options: argparse.Namespace, device: torch.device) -> Iterator[tuple[tuple[str, str], float]]:
    from openood.datasets import get_dataloader
    from openood.trainers.base_trainer import BaseTrainer

    def train(loader: Any, config: Any) -> float:
        torch.manual_seed(seed)
        backbone = Backbone(name)
        net = nn.Sequential(backbone.body, nn.Linear(backbone.feature_size, 10)).to(device)
        clock = Clock(device, options.batch_size)
        net.register_forward_hook(lambda *_: clock.tick())
        with on_device(device):
            BaseTrainer(net, loader, config).train_epoch(0)
        return clock.images_per_s

    with _host_config(options) as config:
        loader = get_dataloader(config)["train"]
        yield ("openood", "whole"), train(loader, config)
        clock, kept = Clock(torch.device("cpu"), options.batch_size), []
        for batch in loader:
            clock.tick()
            kept.append({key: batch[key] for key in ("data", "label")})
        yield ("openood", "loading"), clock.images_per_s
        yield ("openood", "step"), train(DataLoader(kept, batch_size=None), config)  # type: ignore[arg-type]


@contextlib.contextmanager
def _host_config(options: argparse.Namespace) -> Iterator[Any]:
    """The host's own YAMLs for CIFAR-10, its training list cut to the images that are measured."""
    from openood.utils.config import Config

    root = Path(os.environ["OPENOOD_ROOT"]) / "configs"
    names = ("datasets/cifar10/cifar10.yml", "networks/resnet18_32x32.yml", "pipelines/train/baseline.yml")
    with tempfile.TemporaryDirectory() as folder, (options.data / LIST).open() as lines:
        short = Path(folder) / "train.txt"
        short.write_text("".join(itertools.islice(lines, options.steps * options.batch_size)))
        config = Config(*(str(root / name) for name in names))
        config.num_workers, config.dataset.split_names = options.workers, ["train"]
        config.dataset.train.imglist_pth, config.dataset.train.data_dir = str(short), str(options.data / "images_classic")
        config.dataset.train.batch_size = options.batch_size
        config.parse_refs()
        yield config


if __name__ == "__main__":
    main()
