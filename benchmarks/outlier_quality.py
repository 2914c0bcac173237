"""Quality of outliers over S, w and four modes on real images; figures of triplets and of the loss by noise level.

python -m benchmarks.outlier_quality --images data/benchmark_imglist/cifar10/train_cifar10.txt --root data/images_classic \\
    --inception weights-inception-2015-12-05-6726825d.pth --count 10000 --config configs/cifar10.yml        # one GPU
python -m benchmarks.outlier_quality --images ... --root ... --limit 4000 --count 128 --steps 500 --size demo \\
    --classifier_epochs 8 --backbone vit_tiny_patch16_224 --weights vit_tiny_patch16_224.safetensors        # minutes on a CPU

The diffusion model and the reference classifier are trained on the same images with their true labels (both in a run
folder that is used again), so the table says what S and w do with THIS model: its size and steps stand in each row's file.
Distances to the training images are those of the Inception network (FID, KID) where its weights are given, and a
Frechet distance over the reference classifier's and, with --backbone, over another network's features.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, earlier, write_result
from sdood_plugin.artifacts import atomic_path
from sdood_plugin.cli import read_config
from sdood_plugin.config import ImagesConfig, InspectionConfig, OutliersConfig, RunConfig, SelectionConfig, as_dict
from sdood_plugin.context import Context
from sdood_plugin.data.images import spread
from sdood_plugin.detector.network import ThreeHeadNet, load_network
from sdood_plugin.diffusion.guidance import wrong_classes
from sdood_plugin.diffusion.unet import load_unet
from sdood_plugin.features import evaluating, extract
from sdood_plugin.outliers.fidelity import Features, distances, load_features
from sdood_plugin.outliers.quality import set_quality
from sdood_plugin.outliers.sample import sample_batch
from sdood_plugin.outliers.select import Verdicts
from sdood_plugin.outliers.verdicts import Referee
from sdood_plugin.report.figures import noise_levels
from sdood_plugin.run import run
from sdood_plugin.training import place, unet_format

ROOT = Path(__file__).parent.parent
STARTS, WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5), (0.0, 1.0, 2.0, 3.0, 4.0)
SETTINGS = [  # mode, S / T and w of each row
    ("none", 0.0, 0.0),
    *((mode, start, weight) for start in STARTS for mode in ("other", "away", "blend") for weight in WEIGHTS),
    *(("same", start, 0.0) for start in STARTS),
]
SHOWN = [("same", 0.0), ("other", 2.0), ("blend", 0.0), ("away", 3.0)]  # the rows of the figure, below the sources


class Bench:
    """A trained diffusion model, a reference classifier and the sources of all rows."""

    def __init__(self, config: RunConfig, folder: Path, count: int, inspections: list[InspectionConfig]) -> None:
        for stage in ("train-diffusion", "train-reference"):
            run(config, folder, stage)
        self.config, self.context = config, Context(config, folder)
        self.device = self.context.accelerator.device
        self.classes = self.context.labels.classes
        self.train, labels = self.context.train.images, self.context.labels.labels
        self.unet = place(
            load_unet(
                folder / "diffusion" / "unet.safetensors", config.diffusion, classes=self.classes, image_size=self.train.shape[-1]
            ),
            self.device,
            unet_format(self.device),
        )
        self.network: ThreeHeadNet = load_network(folder / "reference" / "reference.safetensors").to(self.device)
        self.sources = spread(len(self.train), min(count, len(self.train)))
        self.labels = labels[self.sources]
        self.referee = Referee(self.train, self.judge, self.device)
        reference = Features(
            f"the reference classifier's features ({self.network.backbone.name})",
            lambda images: extract(self.network.backbone, images, device=self.device),
        )
        self.inspections = [(load_features(inspection, self.device, reference), inspection) for inspection in inspections]
        self.real = [features.of(self.train) for features, _ in self.inspections]

    def judge(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and class probabilities of the reference classifier."""
        features = extract(self.network.backbone, images, device=self.device)
        with evaluating(self.network):
            return features, self.network.g_in(features).softmax(dim=1)

    def accuracy(self) -> dict[str, float]:
        """The reference classifier's accuracy on images it was and was not trained on, per cent."""
        right = self.judge(self.train)[1].argmax(dim=1).cpu() == self.context.labels.labels
        heldout = self.context.heldout
        return {
            "classifier_acc_train": 100 * float(right[~heldout].float().mean()),
            "classifier_acc_heldout": 100 * float(right[heldout].float().mean()),
        }

    def make(self, outliers: OutliersConfig) -> torch.Tensor:
        """uint8 (N, 3, H, W), an outlier of every source."""
        parts = [
            sample_batch(
                self.unet,
                self.train[chosen].to(self.device),
                labels.to(self.device),
                chosen.to(self.device),
                outliers,
                self.config.diffusion,
                classes=self.classes,
                seed=0,
            ).cpu()
            for chosen, labels in zip(
                self.sources.split(outliers.batch_size), self.labels.split(outliers.batch_size), strict=True
            )
        ]
        return torch.cat(parts)

    def row(self, mode: str, start: float, weight: float) -> dict[str, Any]:
        """One row of the table; mode `none` is the sources themselves, the floor of every distance at this n."""
        if mode == "none":
            images = self.train[self.sources]
        else:
            images = self.make(dataclasses.replace(self.config.outliers, mode=mode, start_fraction=start, guidance_weight=weight))
        columns = self.referee(images, self.sources, self.labels)
        verdicts = Verdicts(
            self.labels,
            torch.tensor([int(value) for value in columns["predicted_after"]]),
            *(torch.tensor([float(value) for value in columns[name]]) for name in ("confidence_after", "nearest_train_distance")),
        )
        targets = wrong_classes(self.labels, self.classes, seed=0, index=self.sources)[:, 0].tolist()
        settings = {
            "target": targets if mode == "other" else [""] * len(images),
            "start_fraction": [start] * len(images),
            "guidance_weight": [weight] * len(images),
        }
        figures = set_quality(images, self.sources, self.train, verdicts, settings, SelectionConfig())
        row = {"mode": mode, "start_fraction": start, "guidance_weight": weight, "n": len(images)}
        row |= {name: value for name, value in figures.items() if isinstance(value, float) and not name.startswith("diversity")}
        for (features, inspection), real in zip(self.inspections, self.real, strict=True):
            found = distances(features.of(images), real, features.name, inspection)
            short = "" if "fid" in found else "_reference" if inspection.features == "reference" else f"_{inspection.features}"
            row |= {f"{name}{short}": found[name] for name in ("fid", "fd", "kid", "kd", "precision", "recall") if name in found}
        return row

    def figure(self, path: Path, start: float = 0.2, columns: int = 16) -> None:
        """Sources above what each of SHOWN makes of them."""
        from matplotlib.figure import Figure

        sources, labels = self.sources, self.labels
        self.sources, self.labels = sources[spread(len(sources), columns)], labels[spread(len(sources), columns)]
        strips = {"source": self.train[self.sources]}
        for mode, weight in SHOWN:
            outliers = dataclasses.replace(self.config.outliers, mode=mode, start_fraction=start, guidance_weight=weight)
            strips["control" if mode == "same" else f"{mode}, w = {weight:g}"] = self.make(outliers)
        self.sources, self.labels = sources, labels
        named = zip(self.context.labels.labels.tolist(), self.context.train.names, strict=True)
        words = {label: Path(name).parent.name for label, name in named}  # CIFAR-10's folders are its classes
        figure = Figure(figsize=(0.7 * columns + 1, 0.85 * len(strips)))
        for line, (name, images) in enumerate(strips.items()):
            said = self.judge(images)[1].argmax(dim=1).tolist()
            for column in range(columns):
                axes = figure.add_subplot(len(strips), columns, line * columns + column + 1)
                axes.imshow(images[column].permute(1, 2, 0).numpy(), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.set_xlabel(f"seen as {words.get(said[column]) or said[column]}", fontsize=5, labelpad=1)
                if column == 0:
                    axes.set_ylabel(name, fontsize=7)
        figure.subplots_adjust(hspace=0.3, wspace=0.05)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, bbox_inches="tight", dpi=120)


def configuration(options: argparse.Namespace) -> RunConfig:
    """The configuration file with what the command line says of images, labels (the true ones) and sizes."""
    base = read_config(options.config)
    diffusion = dataclasses.replace(
        base.diffusion,
        max_start_fraction=max(STARTS),
        **{name: value for name, value in (("steps", options.steps), ("size", options.size)) if value is not None},
    )
    if options.size is not None:
        diffusion = dataclasses.replace(diffusion, batch_size=64, lr=1e-3, ema_decay=0.99)
    detector = dataclasses.replace(base.detector, backbone=options.classifier)
    if options.classifier_epochs:
        detector = dataclasses.replace(detector, epochs=options.classifier_epochs, optimizer="adamw", lr=2e-3)
    return dataclasses.replace(
        base,
        report=False,
        data=dataclasses.replace(
            base.data, train=ImagesConfig(options.images, options.root, limit=options.limit), test=None, ood=[]
        ),
        clustering=dataclasses.replace(base.clustering, method="given", labels=None),
        diffusion=diffusion,
        outliers=dataclasses.replace(base.outliers, sampling_steps=options.sampling_steps, batch_size=options.batch_size),
        detector=detector,
    )


def main() -> None:
    """Measure every setting and write results/outlier_quality[-suffix].json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="training images: imglist, folder or CIFAR batches, with labels")
    parser.add_argument("--root", help="what an imglist's paths are relative to")
    parser.add_argument("--limit", type=int, help="train the models on this many images")
    parser.add_argument("--count", type=int, default=128, help="outliers of each setting")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "cifar10.yml")
    parser.add_argument("--size", help="U-Net in place of the configuration's, with its own batch size and rate")
    parser.add_argument("--steps", type=int, help="of the diffusion model's training")
    parser.add_argument("--classifier", default="small_cnn", help="backbone of the reference classifier")
    parser.add_argument("--classifier_epochs", type=int)
    parser.add_argument("--sampling_steps", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--backbone", help="a timm model to take a Frechet distance over too")
    parser.add_argument("--weights", help="its safetensors file")
    parser.add_argument("--inception", help="torch-fidelity's Inception weights (.pth), for FID and KID")
    parser.add_argument("--suffix", default="")
    options = parser.parse_args()
    inspections = [InspectionConfig(kernel_subsets=10)]
    if options.backbone:
        inspections.append(InspectionConfig(options.backbone, options.weights, kernel_subsets=10))
    if options.inception:
        inspections.append(InspectionConfig("inception", options.inception))
    config, name = configuration(options), f"outlier_quality{options.suffix}"
    measured = {**as_dict(config), "count": options.count, "features": [as_dict(inspection) for inspection in inspections]}
    rows, spent = earlier(RESULTS / f"{name}.json", measured)
    folder, figures = ROOT / "runs" / "benchmarks" / name, RESULTS.parent / "figures"
    bench = Bench(config, folder, options.count, inspections)
    diffusion, over = bench.config.diffusion, ", ".join(features.name for features, _ in bench.inspections)
    model = f"{diffusion.size} U-Net, {diffusion.steps} steps of {diffusion.batch_size} images"
    note = f"{model}, trained on {len(bench.train)} images with their true labels; distances over {over}"
    facts = {"data": {"train": len(bench.train), "sources": len(bench.sources)}, "note": note, **bench.accuracy()}
    bench.figure(figures / f"{name}-triplets.png")
    curve = noise_levels(folder)
    assert curve is not None, "the diffusion stage has run"
    with atomic_path(figures / f"{name}-noise-levels.png") as temporary:
        curve.savefig(temporary, bbox_inches="tight", dpi=120)
    for mode, start, weight in SETTINGS:
        if not any((row["mode"], row["start_fraction"], row["guidance_weight"]) == (mode, start, weight) for row in rows):
            rows.append(bench.row(mode, start, weight))
            write_result(name, measured, [config.seed], rows, facts, spent_s=spent, device=config.device)
            print({key: round(value, 2) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True)


if __name__ == "__main__":
    main()
