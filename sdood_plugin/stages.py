"""The stages that make something: each reads what the one before wrote and writes its own artefacts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from .artifacts import write_csv, write_json, write_tensors
from .context import Context
from .data.images import spread
from .detector.network import ThreeHeadNet, load_network, save_network
from .detector.training import Labelled, train_detector
from .features import evaluating, extract
from .metrics import clustering_metrics
from .training import place, unet_format


def write_curves(path: Path, history: dict[str, list[float]]) -> None:
    """Losses as CSV, one row a step."""
    if history:
        names = list(history)
        write_csv(path, ("step", *names), ([step, *values] for step, values in enumerate(zip(*history.values(), strict=True))))


def cluster(run: Context, folder: Path, key: str) -> None:
    """labels.csv and, where one was trained, the pretext's weights."""
    from .clustering.cluster import cluster_images
    from .clustering.labels import write_labels

    labels, backbone, curves = cluster_images(run.train, run.config.clustering, **run.training(folder, key, "cluster"))
    run.__dict__.pop("labels", None)
    if not run.is_main:
        return
    write_labels(run.folder / "labels.csv", run.train, labels.labels, labels.confidence)
    if backbone is not None and run.config.clustering.weights is None:
        write_tensors(folder / "pretext.safetensors", backbone.state_dict())
    for name, history in curves.items():
        write_curves(folder / f"{name}.csv", history)
    write_json(
        folder / "summary.json",
        {
            "method": run.config.clustering.method,
            "classes": labels.classes,
            "sizes": torch.bincount(labels.labels, minlength=labels.classes).tolist(),
        },
    )


def label_quality(run: Context) -> dict[str, float] | None:
    """ACC, NMI and ARI of the pseudo-labels where true labels exist: reported, never used."""
    true = run.train.labels
    return clustering_metrics(run.labels.labels, true) if true is not None and int(true.min()) >= 0 else None


def train_diffusion(run: Context, folder: Path, key: str) -> None:
    """The averaged U-Net weights, the loss curve and the loss by noise level on held-out images."""
    from .diffusion.training import loss_by_noise_level
    from .diffusion.training import train_diffusion as train

    labels, kept = run.labels, ~run.heldout
    config = run.config.diffusion
    unet, history = train(
        run.train.images[kept], labels.labels[kept], config, classes=labels.classes, **run.training(folder, key, "diffusion")
    )
    if not run.is_main:
        return
    write_tensors(folder / "unet.safetensors", unet.state_dict())
    write_curves(folder / "loss.csv", history)
    levels = loss_by_noise_level(
        unet,
        run.train.images[run.heldout],
        labels.labels[run.heldout],
        config,
        device=run.accelerator.device,
        seed=run.seed("diffusion"),
    )
    write_csv(folder / "loss-by-noise.csv", list(levels[0]), (list(row.values()) for row in levels))


def generate(run: Context, folder: Path, key: str) -> None:
    """outliers/ and, if wanted, controls/, made of all training images, held-out ones included."""
    from .diffusion.unet import load_unet
    from .outliers.generate import generate as make

    labels, config = run.labels, run.config
    weights = run.folder / "diffusion" / "unet.safetensors"
    unet = place(
        load_unet(weights, config.diffusion, classes=labels.classes, image_size=run.train.images.shape[-1]),
        run.accelerator.device,
        unet_format(run.accelerator.device),
    )
    common = {"classes": labels.classes, "accelerator": run.accelerator, "seed": run.seed("outliers")}
    make(unet, run.train, labels.labels, config.outliers, config.diffusion, folder=run.folder / "outliers", key=key, **common)
    if config.outliers.controls:
        same = dataclasses.replace(config.outliers, mode="same", per_source=1)
        make(
            unet,
            run.train,
            labels.labels,
            same,
            config.diffusion,
            folder=run.folder / "controls",
            key=key,
            name="controls",
            **common,
        )


def _outliers(run: Context, folder: str, heldout: bool) -> Labelled | None:
    """Outliers or controls of held-out or of training sources; None where the folder is absent."""
    from .outliers.dataset import OutlierSet

    if not (run.folder / folder / "meta.json").exists():
        return None
    made = OutlierSet(run.folder / folder)
    chosen = run.heldout[made.sources] == heldout
    return Labelled(made.images[chosen], made.labels[chosen])


def train_reference(run: Context, folder: Path, key: str) -> None:
    """A network of the same backbone trained by cross-entropy alone: judges outliers and carries the comparators."""
    train_network(run, folder, key, "reference", None, None)


def train_three_heads(run: Context, folder: Path, key: str) -> None:
    """The detector's weights."""
    train_network(run, folder, key, "detector", _outliers(run, "outliers", False), _outliers(run, "controls", False))


def calibrate(run: Context, folder: Path, key: str) -> None:
    """The detector's banks, alpha and threshold, and the held-out scores they were chosen on."""
    from .scoring.score import fit_score
    from .scoring.storage import save_score

    network = place(load_network(run.folder / "detector" / "detector.safetensors"), run.accelerator.device)
    outliers, heldout_outliers = _outliers(run, "outliers", False), _outliers(run, "outliers", True)
    device = run.accelerator.device
    nothing = torch.empty(0, network.backbone.feature_size, device=device)

    def features(images: torch.Tensor | None) -> torch.Tensor:
        return extract(network.backbone, images, device=device) if images is not None and len(images) else nothing

    use_outliers = outliers is not None and run.config.detector.outlier_ratio > 0
    heldout = {"ID": features(run.train.images[run.heldout])}
    heldout["outliers"] = features(heldout_outliers.images if heldout_outliers and use_outliers else None)
    score = fit_score(
        features(run.train.images[~run.heldout]),
        features(outliers.images if outliers and use_outliers else None),
        heldout["ID"],
        heldout["outliers"],
        run.config.scoring,
    )
    if run.is_main:
        save_score(run.folder / "detector", score)
        scores = [(kind, f"{value:.6g}") for kind, rows in heldout.items() if len(rows) for value in score(rows).tolist()]
        write_csv(run.folder / "detector" / "heldout.csv", ("set", "score"), scores)


def train_network(
    run: Context, folder: Path, key: str, name: str, outliers: Labelled | None, controls: Labelled | None, loss: Any = None
) -> ThreeHeadNet:
    """Train a network on all but the held-out images; weights and losses go to `folder` under `name`."""
    labels, kept = run.labels, ~run.heldout
    network, history = train_detector(
        Labelled(run.train.images[kept], labels.labels[kept]),
        outliers,
        controls,
        run.config.detector,
        classes=labels.classes,
        name=name,
        loss=loss,
        **run.training(folder, key, name),
    )
    if run.is_main:
        save_network(folder / f"{name}.safetensors", network)
        write_curves(folder / "loss.csv", history)
    return network


def inspect(run: Context, folder: Path, key: str) -> None:
    """quality.json: what the outliers and the controls are, judged by the reference network; and the triplets' choice."""
    from .outliers.dataset import OutlierSet
    from .outliers.inspect import set_quality

    reference = load_network(run.folder / "reference" / "reference.safetensors").to(run.accelerator.device)

    def judge(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = extract(reference.backbone, images, device=run.accelerator.device)
        with evaluating(reference):
            return features, reference.g_in(features).softmax(dim=1)

    quality, sets = {}, {}
    for name in ("outliers", "controls"):
        if (run.folder / name / "meta.json").exists():
            made = OutlierSet(run.folder / name)
            quality[name] = set_quality(made, run.train.images, judge)
            sets[name] = made
    if run.is_main:
        write_json(folder / "quality.json", quality)
        _write_triplets(run, folder / "triplets.safetensors", sets, lambda images: judge(images)[1].argmax(dim=1).cpu())


def _write_triplets(run: Context, path: Path, sets: dict[str, Any], classify: Any, count: int = 16) -> None:
    """Sources spread over the set, their controls and their outliers, and the class each is seen as."""
    made = sets["outliers"]
    rows = spread(len(made), min(count, len(made)))
    sources = made.sources[rows]
    strips = {"source": run.train.images[sources], "outlier": made.images[rows]}
    if "controls" in sets:
        position = {source: row for row, source in enumerate(sets["controls"].sources.tolist())}
        strips["control"] = sets["controls"].images[[position[source] for source in sources.tolist()]]
    write_tensors(path, {**strips, **{f"{name}_said": classify(images) for name, images in strips.items()}})
