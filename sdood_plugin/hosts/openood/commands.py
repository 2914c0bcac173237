"""The command lines that start OpenOOD on an exported run: its stock outlier trainers, `train_sdood`, and its test pipeline."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

MIXOE_BATCH = 64
UDG_CLUSTERS, UDG_PCA = 1000, 256  # in the host's train_udg.yml


def command_lines(configs: Path, train: int, outliers: int, detector: Path | None, notes: Sequence[str] = ()) -> str:
    """A comment line a note, then two lines a job, a comment and a command; each command is whole and can be pasted.

    Args:
        configs: The exported folder of YAMLs.
        train: Images in the list `train`.
        outliers: Images in the list `oe`.
        detector: The run's `detector` folder, for a line that scores the run's OOD sets with it; None leaves it out.
        notes: What a reader of the numbers must know.
    """
    base = _stock("preprocessors/base_preprocessor.yml", "pipelines/train/baseline.yml")
    data, resnet = _own(configs, "dataset.yml"), _stock("networks/resnet18_32x32.yml")
    within = "--network.backbone.name resnet18_32x32"
    jobs = {
        "three heads": _line(_own(configs, "dataset.yml", "networks/sdood_net.yml", "pipelines/train_sdood.yml")),
        "the host's OE": _line([*data, *resnet, *base, *_stock("pipelines/train/train_oe.yml")]),
        "the host's MixOE (needs as many outliers a batch as images)": _line(
            [*data, *resnet, *base, *_stock("pipelines/train/train_mixoe.yml")], *_mixoe(train, outliers)
        ),
        "the host's MCD (uses outliers from trainer.start_epoch_ft on)": _line(
            [*data, *_stock("networks/mcd_net.yml"), *base, *_stock("pipelines/train/train_mcd.yml")], within
        ),
        "the host's UDG": _line(
            [*data, *_stock("networks/udg_net.yml"), *base, *_stock("pipelines/train/train_udg.yml")],
            within,
            *_udg(train + outliers),
        ),
    }
    if detector is not None:
        jobs["this run's detector on the run's OOD sets"] = _line(
            [
                *_own(configs, "dataset.yml", "ood.yml", "networks/sdood_net.yml"),
                *_stock("preprocessors/base_preprocessor.yml", "pipelines/test/test_ood.yml"),
                *_own(configs, "postprocessors/sdood.yml"),
            ],
            f"--network.pretrained True --network.checkpoint {shlex.quote(str(detector / 'detector.safetensors'))}",
        )
    lines = [f"# note: {note}" for note in notes] + [f"# {name}\n{command}" for name, command in jobs.items()]
    return "\n".join(lines) + "\n"


def _mixoe(train: int, outliers: int) -> list[str]:
    """Batches of one size; the host skips the last batch of an epoch, so there must be two."""
    size = max(1, min(MIXOE_BATCH, outliers, train // 2))
    return [f"--dataset.train.batch_size {size} --dataset.oe.batch_size {size}"]


def _udg(images: int) -> list[str]:
    settings = ["--dataset.train.dataset_class UDGDataset --dataset.oe.dataset_class UDGDataset"]
    if images < 4 * UDG_CLUSTERS:  # the host's k-means refuses fewer images than clusters
        few = max(2, images // 4)
        settings.append(f"--trainer.num_clusters {few} --network.num_clusters {few} --trainer.pca_dim {min(UDG_PCA, few)}")
    return settings


def _line(files: list[str], *settings: str) -> str:
    gpus = f"--num_gpus {int(torch.cuda.is_available())} --num_workers 4 --merge_option merge"
    return " ".join(["python -m sdood_plugin.hosts.openood --config", *files, gpus, *settings])


def _own(configs: Path, *names: str) -> list[str]:
    return [shlex.quote(str(configs / name)) for name in names]


def _stock(*names: str) -> list[str]:
    return [f'"$OPENOOD_ROOT"/configs/{name}' for name in names]
