"""`--dry-run`: the resolved plan of a run, its sizes and an estimate of its time, measured on a few real steps."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .clustering.labels import given_labels
from .config import ClusteringConfig, RunConfig
from .config.outliers import bounds
from .context import Context
from .detector.training import Labelled, train_detector
from .run import check_input, is_current
from .stage_table import chosen_stages
from .training import Job

PROBE_STEPS = 3


def describe_plan(config: RunConfig, folder: Path, only: str | None = None) -> str:
    """The plan as text. Nothing is written outside a temporary folder that is removed again.

    Args:
        config: The settings.
        folder: The run folder it would write to.
        only: Name of the last stage, or None for all.
    """
    context = Context(config, folder)
    chosen = chosen_stages(config, only)
    check_input(context, chosen)
    shape, heldout = tuple(context.train.images.shape[1:]), int(context.heldout.sum())
    sizes = [f"training images   {len(context.train)} of {shape}, {heldout} of them held out"]
    sizes += [f"note              {note}" for note in context.train.notes]
    sizes += [f"ID test           {len(context.test)}"] if context.test is not None else []
    sizes += [f"OOD {ood.group:13s} {len(context.ood[ood.name])} {ood.name}" for ood in config.data.ood]
    sizes += [f"classes           {_classes(context)}"]
    sizes += [f"outliers          {_count(context)}" + (" and as many controls" if config.outliers.controls else "")]
    seconds = _estimate(context)
    done = {stage.name for stage in chosen if is_current(stage, context)}
    lines = []
    for stage in chosen:
        outputs = ", ".join(str(folder / path) for path in stage.writes(config))
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


def _pretext_steps(clustering: ClusteringConfig, images: int) -> float:
    """SimCLR steps, and what SCAN and self-labelling through the backbone are worth in them, by the views they train on."""
    if clustering.method == "given":
        return 0.0
    steps = float(clustering.pretext_steps) if clustering.weights is None else 0.0
    if clustering.method == "scan" and clustering.finetune_epochs:
        views = images * (2 * clustering.finetune_epochs + 1.3 * clustering.self_label_epochs)  # 0.3: choosing who teaches
        steps += views / (2 * min(clustering.pretext_batch_size, images))
    return steps


def _comparators(config: RunConfig, reference: float, diffusion: float) -> float:
    """Seconds of the comparators' training, from those of the reference network and of the diffusion model."""
    networks = {"oe-noise": 1.5, "multi-class": 1.0, "mscl": 2.0, "fake-it": 2.0}  # images a step, in units of the reference's
    fakes = diffusion * (config.compare.fake_it_steps or config.diffusion.steps / 2) / config.diffusion.steps
    methods = config.compare.methods
    return sum(networks.get(method, 0.0) * reference for method in methods) + fakes * ("fake-it" in methods)


def _estimate(context: Context) -> dict[str, float]:
    from .clustering.simclr import train_simclr
    from .diffusion.training import train_diffusion
    from .outliers.sample import sample_batch

    config, images = context.config, context.train.images
    classes = config.clustering.clusters
    labels = torch.arange(len(images)) % classes
    with tempfile.TemporaryDirectory() as temporary:
        job = Job(context.accelerator, Path(temporary))

        def pretext(steps: int) -> object:
            return train_simclr(images, dataclasses.replace(config.clustering, pretext_steps=steps), job)

        def diffusion(steps: int) -> object:
            return train_diffusion(images, labels, dataclasses.replace(config.diffusion, steps=steps), job, classes=classes)

        def detector(epochs: int) -> object:
            batch = images[: min(len(images), config.detector.batch_size)]
            data = Labelled(batch, labels[: len(batch)])
            return train_detector(
                data, data, data, dataclasses.replace(config.detector, epochs=epochs, weights=None), job, classes=classes
            )

        pretext_steps = _pretext_steps(config.clustering, len(images))
        pretext_seconds = _per_unit(pretext, 1, 1 + PROBE_STEPS) * pretext_steps if pretext_steps else 0.0
        diffusion_seconds = _per_unit(diffusion, 1, 1 + PROBE_STEPS) * config.diffusion.steps
        steps = config.detector.epochs * max(1, int((~context.heldout).sum()) // config.detector.batch_size)
        detector_seconds = _per_unit(detector, 1, 1 + PROBE_STEPS) * steps
        unet = train_diffusion(images, labels, dataclasses.replace(config.diffusion, steps=1), job, classes=classes)[0]
    size = min(config.outliers.batch_size, len(images))
    few = dataclasses.replace(config.outliers, sampling_steps=1, start_fraction=bounds(config.outliers.start_fraction)[1])
    device = context.accelerator.device
    started = time.perf_counter()
    sample_batch(
        unet,
        images[:size].to(device),
        labels[:size].to(device),
        torch.arange(size),
        few,
        config.diffusion,
        classes=classes,
        seed=0,
        precision=context.precision,
    )
    per_image = (time.perf_counter() - started) / size * config.outliers.sampling_steps
    return {
        "cluster": pretext_seconds,
        "train-diffusion": diffusion_seconds,
        "generate": per_image * _count(context) * (1.5 if config.outliers.controls else 1.0),
        "train-reference": detector_seconds / 2,
        "train-detector": detector_seconds,
        "train-comparators": _comparators(config, detector_seconds / 2, diffusion_seconds),
    }
