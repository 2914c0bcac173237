"""`--dry-run`: the resolved plan of a run, its sizes and an estimate of its time, measured on a few real steps."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .clustering.labels import given_labels
from .config import RunConfig
from .context import Context
from .detector.training import Labelled, train_detector
from .run import check_input, is_current
from .stage_table import STAGES, with_needs

PROBE_STEPS = 3


def describe_plan(config: RunConfig, folder: Path, only: str | None = None) -> str:
    """The plan as text. Nothing is written outside a temporary folder that is removed again.

    Args:
        config: The settings.
        folder: The run folder it would write to.
        only: Name of the last stage, or None for all.
    """
    context = Context(config, folder)
    check_input(context)
    shape, heldout = tuple(context.train.images.shape[1:]), int(context.heldout.sum())
    sizes = [f"training images   {len(context.train)} of {shape}, {heldout} of them held out"]
    sizes += [f"note              {note}" for note in context.train.notes]
    sizes += [f"ID test           {len(context.test)}"] if context.test is not None else []
    sizes += [f"OOD {ood.group:13s} {len(context.ood[ood.name])} {ood.name}" for ood in config.data.ood]
    sizes += [f"classes           {_classes(context)}"]
    sizes += [f"outliers          {_count(context)}" + (" and as many controls" if config.outliers.controls else "")]
    seconds = _estimate(context)
    chosen = list(STAGES) if only is None else with_needs(only)
    done = {stage.name for stage in chosen if is_current(stage, context)}
    lines = []
    for stage in chosen:
        outputs = ", ".join(str(folder / path) for path in stage.outputs)
        cost = "done" if stage.name in done else _duration(seconds[stage.name]) if stage.name in seconds else "short"
        lines.append(f"{stage.name:17s} {cost:>10s}   -> {outputs}")
    total = sum(seconds.get(stage.name, 0) for stage in chosen if stage.name not in done)
    device = context.accelerator.device
    lines.append(f"{'total':17s} {_duration(total):>10s}   on {device}, measured on {PROBE_STEPS} steps of each training")
    return "\n".join([*sizes, "", *lines])


def _classes(context: Context) -> str:
    config = context.config.clustering
    if config.method != "given":
        return f"{config.clusters} clusters to be found"
    return f"{given_labels(context.train, config.labels).classes} given"


def _count(context: Context) -> int:
    outliers = context.config.outliers
    return min(outliers.sources or len(context.train), len(context.train)) * outliers.per_source


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _per_unit(work: Callable[[int], object], few: int, many: int) -> float:
    """Seconds a unit of work, its start-up cost removed."""
    times = []
    for units in (few, many):
        started = time.perf_counter()
        work(units)
        times.append(time.perf_counter() - started)
    return max(times[1] - times[0], 0.0) / (many - few)


def _estimate(context: Context) -> dict[str, float]:
    from .clustering.simclr import train_simclr
    from .diffusion.training import train_diffusion
    from .outliers.generate import sample_batch

    config, images = context.config, context.train.images
    classes = config.clustering.clusters
    labels = torch.arange(len(images)) % classes
    with tempfile.TemporaryDirectory() as temporary:
        common = {"accelerator": context.accelerator, "seed": 0, "folder": Path(temporary), "key": "", "checkpoint_seconds": 1e9}

        def pretext(steps: int) -> object:
            return train_simclr(images, dataclasses.replace(config.clustering, pretext_steps=steps), **common)

        def diffusion(steps: int) -> object:
            return train_diffusion(images, labels, dataclasses.replace(config.diffusion, steps=steps), classes=classes, **common)

        def detector(epochs: int) -> object:
            batch = images[: min(len(images), config.detector.batch_size)]
            data = Labelled(batch, labels[: len(batch)])
            return train_detector(
                data, data, data, dataclasses.replace(config.detector, epochs=epochs, weights=None), classes=classes, **common
            )

        needs_pretext = config.clustering.method != "given" and config.clustering.weights is None
        pretext_seconds = _per_unit(pretext, 1, 1 + PROBE_STEPS) * config.clustering.pretext_steps if needs_pretext else 0.0
        diffusion_seconds = _per_unit(diffusion, 1, 1 + PROBE_STEPS) * config.diffusion.steps
        steps = config.detector.epochs * max(1, int((~context.heldout).sum()) // config.detector.batch_size)
        detector_seconds = _per_unit(detector, 1, 1 + PROBE_STEPS) * steps
        unet = train_diffusion(
            images[:2], labels[:2], dataclasses.replace(config.diffusion, steps=1, batch_size=2), classes=classes, **common
        )[0]
    size = min(config.outliers.batch_size, len(images))
    few = dataclasses.replace(config.outliers, sampling_steps=1)
    device = context.accelerator.device
    started = time.perf_counter()
    sample_batch(
        unet,
        images[:size].to(device),
        labels[:size].to(device),
        torch.arange(size, device=device),
        few,
        config.diffusion,
        classes=classes,
        seed=0,
    )
    per_image = (time.perf_counter() - started) / size * config.outliers.sampling_steps
    return {
        "cluster": pretext_seconds,
        "train-diffusion": diffusion_seconds,
        "generate": per_image * _count(context) * (1.5 if config.outliers.controls else 1.0),
        "train-reference": detector_seconds / 2,
        "train-detector": detector_seconds,
        "compare": detector_seconds * 0.75 * ("oe-noise" in config.compare.methods),
    }
