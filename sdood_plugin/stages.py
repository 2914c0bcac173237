"""The stages that make something: each reads what the one before wrote and writes its own artefacts."""

from __future__ import annotations

import csv
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .artifacts import write_csv, write_json, write_tensors, write_text
from .context import Context
from .detector.batches import require_even_shares
from .detector.network import ThreeHeadNet, load_network, save_network
from .detector.training import Labelled, train_detector
from .errors import UsageError
from .features import evaluating, extract, require_finite
from .metrics import clustering_metrics
from .training import place

if TYPE_CHECKING:
    from .outliers.dataset import OutlierSet

log = logging.getLogger(__name__)


def write_curves(path: Path, history: dict[str, list[float]]) -> None:
    """Losses as CSV, one row a step."""
    if history:
        names = list(history)
        write_csv(path, ("step", *names), ([step, *values] for step, values in enumerate(zip(*history.values(), strict=True))))


def cluster(run: Context, folder: Path, key: str) -> None:
    """labels.csv, the same as an imglist, example images of each cluster and, where it was trained, the backbone."""
    from .clustering.cluster import cluster_images
    from .clustering.labels import example_rows, write_imglist, write_labels

    config = run.config.clustering
    labels, backbone, curves, notes = cluster_images(run.train, config, run.job(folder, key, "cluster"))
    run.__dict__.pop("labels", None)
    if not run.is_main:
        return
    write_labels(run.folder / "labels.csv", run.train, labels.labels, labels.confidence)
    write_imglist(folder / "imglist.txt", run.train, labels.labels)
    if backbone is not None and config.leaves_backbone:
        write_tensors(folder / "backbone.safetensors", backbone.state_dict())
        write_text(folder / "backbone.key", key)  # what it was made of, for those who start from it
    for name, history in curves.items():
        write_curves(folder / f"{name}.csv", history)
    examples = example_rows(labels)
    write_tensors(folder / "examples.safetensors", {name: run.train.images[rows] for name, rows in examples.items()})
    write_json(
        folder / "summary.json",
        {
            "method": config.method,
            "classes": labels.classes,
            "sizes": torch.bincount(labels.labels, minlength=labels.classes).tolist(),
            "notes": notes,
        },
    )
    for left in folder.glob("checkpoint*.pt"):
        left.unlink()


def label_quality(run: Context) -> dict[str, float] | None:
    """ACC, NMI and ARI of the pseudo-labels where true labels exist: reported, never used."""
    true = run.train.labels
    return clustering_metrics(run.labels.labels, true) if true is not None and int(true.min()) >= 0 else None


def check_clustering(run: Context) -> None:
    """Make sure that the training images can be clustered, or that their given labels will do.

    Raises:
        RunError: They are too few, or a class is.
    """
    from .clustering.cluster import check_count
    from .clustering.labels import given_labels

    config = run.config.clustering
    if config.method == "given":
        run.with_enough_images(given_labels(run.train, config.labels))
    else:
        check_count(run.train, config)


def check_diffusion(run: Context) -> None:
    """Make sure that a diffusion model can be trained on these images by these processes.

    Raises:
        UsageError: The images' side cannot be halved so often, or the processes' shares of a batch would differ in size.
    """
    diffusion, processes = run.config.diffusion, run.accelerator.num_processes
    diffusion.require_side(run.train.images.shape[-1])
    if diffusion.batch_size % processes:
        raise UsageError(
            "diffusion.batch_size",
            diffusion.batch_size,
            f"a multiple of the {processes} processes, whose shares count alike",
            "change it or the number of processes",
        )


def check_detector(run: Context, *, controls: bool, outliers: bool) -> None:
    """Make sure that these processes can share the batches of a network with the detector's settings.

    Raises:
        UsageError: Their shares of the images, or of such controls and outliers as are trained on, would differ in size.
    """
    images, processes = int((~run.heldout).sum()), run.accelerator.num_processes
    require_even_shares(run.config.detector, images, processes, controls=controls, outliers=outliers)


def train_diffusion(run: Context, folder: Path, key: str) -> None:
    """The averaged U-Net weights, the loss curve and the loss by noise level on held-out images."""
    from .diffusion.training import loss_by_noise_level
    from .diffusion.training import train_diffusion as train

    labels, kept = run.labels, ~run.heldout
    config = run.config.diffusion
    unet, history = train(
        run.train.images[kept], labels.labels[kept], config, run.job(folder, key, "diffusion"), classes=labels.classes
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


def chosen_outliers(run: Context, folder: str, sources: torch.Tensor) -> OutlierSet | None:
    """Outliers that `selection` keeps, or controls, made of some images; None where the folder is absent.

    Args:
        run: The run.
        folder: `outliers` or `controls`.
        sources: bool (N,), the training images whose outliers are wanted.
    """
    from .outliers.dataset import OutlierSet
    from .outliers.subset import select

    if not (run.folder / folder / "meta.json").exists():
        return None
    made = OutlierSet(run.folder / folder)
    chosen = sources[made.sources]
    if folder == "outliers":
        chosen &= select(made, run.config.selection).kept
    return made.take(chosen)


def read_outliers(run: Context, folder: str, sources: torch.Tensor) -> Labelled | None:
    """The images and labels of `chosen_outliers`."""
    made = chosen_outliers(run, folder, sources)
    return None if made is None else Labelled(made.images, made.labels)


def train_reference(run: Context, folder: Path, key: str) -> None:
    """A network of the same backbone trained by cross-entropy alone: judges outliers and carries the comparators."""
    train_network(run, folder, key, "reference", None, None)


def train_three_heads(run: Context, folder: Path, key: str) -> None:
    """The detector's weights, and selection.json: which outliers it was given."""
    train_network(run, folder, key, "detector", *(read_outliers(run, name, ~run.heldout) for name in ("outliers", "controls")))
    if run.is_main:
        _write_selection(run, folder / "selection.json")


def _write_selection(run: Context, path: Path) -> None:
    """How many outliers `selection` kept, of training and of held-out sources, and how many it dropped and why."""
    from .outliers.dataset import OutlierSet
    from .outliers.subset import select

    made = OutlierSet(run.folder / "outliers")
    chosen = select(made, run.config.selection)
    heldout = int((chosen.kept & run.heldout[made.sources]).sum())
    found = {"count": len(made), "kept": int(chosen.kept.sum()), "kept_of_heldout_sources": heldout, "dropped": chosen.dropped}
    write_json(path, {**dataclasses.asdict(run.config.selection), **found})
    if chosen.dropped:
        reasons = ", ".join(f"{count} {name}" for name, count in chosen.dropped.items())
        log.info("selection: %d of %d outliers kept; dropped %s", found["kept"], len(made), reasons)


def score_features(run: Context, network: ThreeHeadNet, heldout: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """What `fit_score` is given of a run: features of images, outliers and controls, and the outliers' classes.

    Args:
        run: A run whose outliers are generated; of a detector that was trained without them there are none.
        network: The trained network, on its device.
        heldout: bool (N,), the held-out images to choose on; None takes all of them.

    Raises:
        RunError: Features that are not finite; the image is named.
    """
    device = run.accelerator.device
    heldout = run.heldout if heldout is None else heldout

    def features(images: torch.Tensor, name: Callable[[int], str]) -> torch.Tensor:
        found = extract(network.backbone, images, device=device)
        require_finite(found, name)
        return found

    def inside(chosen: torch.Tensor) -> torch.Tensor:
        return features(run.train.images[chosen], lambda row: run.train.names[int(chosen.nonzero()[row])])

    def made(folder: str, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = chosen_outliers(run, folder, sources) if run.config.detector.outlier_ratio > 0 else None
        if found is None or not len(found):
            return torch.empty(0, network.backbone.feature_size, device=device), torch.empty(0, dtype=torch.int64, device=device)
        return features(found.images, lambda row: f"{folder}/{found.manifest[row]['file']}"), found.labels.to(device)

    outliers, classes = made("outliers", ~run.heldout)
    heldout_outliers, heldout_classes = made("outliers", heldout)
    return {
        "inside": inside(~run.heldout),
        "outliers": outliers,
        "heldout_inside": inside(heldout),
        "heldout_outliers": heldout_outliers,
        "outlier_classes": classes,
        "heldout_classes": heldout_classes,
        "heldout_controls": made("controls", heldout)[0],
    }


def calibrate(run: Context, folder: Path, key: str) -> None:
    """The detector's banks, alpha and threshold, and the held-out scores they were chosen on."""
    from .scoring.score import fit_score
    from .scoring.storage import save_score

    network = place(load_network(run.folder / "detector" / "detector.safetensors"), run.accelerator.device)
    given = score_features(run, network)
    score = fit_score(config=run.config.scoring, **given)
    if run.is_main:
        save_score(run.folder / "detector", score)
        heldout = {"ID": given["heldout_inside"], "outliers": given["heldout_outliers"], "controls": given["heldout_controls"]}
        scores = [(kind, f"{value:.6g}") for kind, rows in heldout.items() if len(rows) for value in score(rows).tolist()]
        write_csv(run.folder / "detector" / "heldout.csv", ("set", "score"), scores)


def train_network(
    run: Context,
    folder: Path,
    key: str,
    name: str,
    outliers: Labelled | None,
    controls: Labelled | None,
    loss: Any = None,
    *,
    stop_after: int | None = None,
) -> ThreeHeadNet:
    """Train a network on all but the held-out images, as `train_detector`; weights and losses go to `folder` under `name`."""
    labels, kept = run.labels, ~run.heldout
    network, history = train_detector(
        Labelled(run.train.images[kept], labels.labels[kept]),
        outliers,
        controls,
        run.detector,
        run.job(folder, key, name),
        classes=labels.classes,
        name=name,
        loss=loss,
        stop_after=stop_after,
    )
    if run.is_main:
        save_network(folder / f"{name}.safetensors", network)
        write_curves(folder / "loss.csv", history)
        _write_classes(run, network, folder)
    return network


def _write_classes(run: Context, network: ThreeHeadNet, folder: Path) -> None:
    """What g_in says of the held-out images: each class in classes.csv, accuracy.json against the pseudo-labels."""
    features = extract(network.backbone, run.train.images[run.heldout], device=run.accelerator.device)
    with evaluating(network):
        said = network.g_in(features).argmax(dim=1).cpu()
    rows = run.heldout.nonzero()[:, 0].tolist()
    labels = run.labels.labels[rows]
    names = [run.train.names[row] for row in rows]
    write_csv(folder / "classes.csv", ("path", "label", "said"), zip(names, labels.tolist(), said.tolist(), strict=True))
    right = 100 * float((said == labels).double().mean())
    write_json(folder / "accuracy.json", {"images": len(rows), "acc_pseudo_labels": right})


def true_accuracy(run: Context) -> float | None:
    """Per cent of the held-out images whose true class the detector's g_in finds: reported, never used.

    A cluster's number means nothing, so true labels are compared after the best matching of clusters and classes.
    """
    path, true = run.folder / "detector" / "classes.csv", run.train.labels
    if not path.exists() or true is None or int(true.min()) < 0:
        return None
    with path.open(newline="") as stream:
        said = [int(row["said"]) for row in csv.DictReader(stream)]
    return clustering_metrics(said, true[run.heldout])["acc"]
