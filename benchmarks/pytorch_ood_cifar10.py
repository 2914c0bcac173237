"""CIFAR-10 benchmarks of pytorch-ood: our detector beside all of its own, on one frozen backbone.

    python -m benchmarks.pytorch_ood_cifar10 DATA_ROOT --weights vit_tiny_patch16_224.safetensors --outliers RUN/outliers

DATA_ROOT holds OpenOOD's `images_classic` and `benchmark_imglist`. Data sets that are absent are named in the result and
never downloaded; so is every detector that was not run, with the reason. All images, outliers too, are made 32 x 32 first,
as OpenOOD does. Every image is encoded once and every detector scores it once (see `pytorch_ood_detectors`); the host's
benchmarks then make their metrics of the scores. What the last block of the network takes is kept in memory: for ViT-Tiny
150 kB an image.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_ood.api import Detector
from pytorch_ood.benchmark import CIFAR10_OpenOOD
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from benchmarks.pytorch_ood_detectors import Recipe, Tail, Train, as_maps, recipes, split
from benchmarks.readme import table
from benchmarks.record import write_result
from sdood_plugin.data.images import spread
from sdood_plugin.errors import SdoodError
from sdood_plugin.features import evaluating, load_backbone
from sdood_plugin.hosts.pytorch_ood import SDOOD, SDOutliers, network_input
from sdood_plugin.hosts.pytorch_ood.benchmarks import limit, odin_benchmark, openood_benchmark
from sdood_plugin.metrics import detection_metrics

# What the benchmarks' papers use; a set that is not whole says so in its name.
WHOLE = {
    "CIFAR100": 9000,
    "TinyImageNet": 7793,
    "MNIST": 70000,
    "SVHN": 26032,
    "Textures": 5640,
    "Places365": 35195,
    "TinyImageNetCrop": 10000,
    "TinyImageNetResize": 10000,
    "LSUNCrop": 10000,
    "LSUNResize": 10000,
    "UniformNoise": 1000,
    "GaussianNoise": 1000,
}
GROUPS = dict.fromkeys(CIFAR10_OpenOOD._near_ood, "near")  # of the host; every other set is far


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pytorch_ood_cifar10", description=__doc__.split("\n")[0])
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--weights", type=Path, help="safetensors of the backbone; without it the features are random")
    parser.add_argument("--outliers", type=Path, help="an outlier set of `sdood generate`; without it SDOOD is distance only")
    parser.add_argument("--limit", type=int, default=500, help="images of every test set, spread evenly; 0 takes all")
    parser.add_argument("--train-limit", type=int, default=2000, help="training images and outliers at most; 0 takes all")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


class Encoded(NamedTuple):
    """A data set in the kinds of input that detectors take, each with its targets."""

    images: Dataset
    maps: TensorDataset | None
    features: TensorDataset


class Scores(Detector):
    """Scores in, scores out: lets the host evaluate what a detector has said."""

    def fit(self, *args: Any, **kwargs: Any) -> Scores:
        """Nothing to fit."""
        return self

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """The scores."""
        return x


def encode(dataset: Any, backbone: nn.Module, tail: Tail | None, settings: argparse.Namespace) -> Encoded:
    """Features, and maps where the backbone has a tail, of a data set in its order."""
    features, maps, targets = [], [], []
    keep = None if tail is None else tail.start.register_forward_pre_hook(lambda _, given: maps.append(as_maps(given[0]).cpu()))
    with evaluating(backbone):
        for x, y in DataLoader(dataset, batch_size=settings.batch_size):
            features.append(backbone(x.to(settings.device)).cpu())
            targets.append(y)
    if keep is not None:
        keep.remove()
    labels = torch.cat(targets)
    return Encoded(dataset, TensorDataset(torch.cat(maps), labels) if maps else None, TensorDataset(torch.cat(features), labels))


def ours(train: Train, outliers: torch.Tensor | None, seed: int) -> dict[str, Recipe | str]:
    """Our detector: with the outliers, where there are any, and by distance alone."""
    z, y, same = train.features, train.labels, nn.Identity()
    found: dict[str, Recipe | str] = {
        "sdood": "needs --outliers",
        "sdood-distance": Recipe("features", lambda: SDOOD(same, seed=seed).fit_features(z, y)),
    }
    if outliers is not None:
        both = torch.cat([z, outliers]), torch.cat([y, y.new_full((len(outliers),), -1)])
        found["sdood"] = Recipe("features", lambda: SDOOD(same, seed=seed).fit_features(*both))
    return found


def scored(detector: Any, level: str, encoded: Encoded, settings: argparse.Namespace) -> TensorDataset:
    """A detector's scores of a data set, with its targets.

    Raises:
        ValueError: Some of them are not finite.
    """
    device = "cpu" if level == "features" else settings.device
    scores, targets = [], []
    for x, y in DataLoader(getattr(encoded, level), batch_size=settings.batch_size):
        scores.append(detector(x.to(device)).detach().cpu())
        targets.append(y)
    together = torch.cat(scores)
    if not together.isfinite().all():
        raise ValueError(f"{int((~together.isfinite()).sum())} of {len(together)} scores are NaN or infinite")
    return TensorDataset(together, torch.cat(targets))


def evaluate(benchmark: Any, title: str, method: str, inside: TensorDataset, oods: list[TensorDataset]) -> list[dict[str, Any]]:
    """The host's metrics of a detector's scores, one flat record an OOD set; FPR@95 with ID positive is ours to add."""
    benchmark.test_in, benchmark.test_oods = inside, oods
    records = []
    for values, outside in zip(benchmark.evaluate(Scores(), loader_kwargs={"batch_size": 4096}), oods, strict=True):
        name, size = values["Dataset"], len(outside)
        records.append(
            {
                "benchmark": title,
                "method": method,
                "ood": name if size == WHOLE[name] else f"{name} ({size} of {WHOLE[name]})",
                "group": GROUPS.get(name, "far"),
                "auroc": 100 * values["AUROC"],
                "aupr": 100 * values["AUPR-OUT"],
                "aupr_id": 100 * values["AUPR-IN"],
                "fpr95": detection_metrics(inside.tensors[0], outside.tensors[0])["fpr95"],
                "fpr95_ood_positive": 100 * values["FPR95TPR"],
                "n_id": len(inside),
                "n_ood": size,
            }
        )
    return records


def rows(
    method: str, recipe: Recipe | str, tests: dict[str, tuple[Any, list[Encoded]]], settings: argparse.Namespace
) -> list[dict[str, Any]]:
    """The records of one detector on every benchmark; one record with the reason where it is not run or fails."""
    if isinstance(recipe, str):
        return [{"method": method, "skipped": recipe}]
    torch.manual_seed(settings.seed)  # of every detector anew, whatever was run before it
    try:
        detector = recipe.fitted()
        records = []
        for title, (benchmark, sets) in tests.items():
            inside, *oods = [scored(detector, recipe.level, encoded, settings) for encoded in sets]
            records += evaluate(benchmark, title, method, inside, oods)
        return [{**record, "seed": settings.seed} for record in records]
    except SdoodError:
        raise
    except (ValueError, RuntimeError, AssertionError) as error:  # some detectors of the host fail on features of low rank
        return [{"method": method, "skipped": f"failed, {type(error).__name__}: {' '.join(str(error).split())}"}]


def measure(settings: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the result, and the number of images in each set."""
    most, most_train = settings.limit or None, settings.train_limit or None
    transform = functools.partial(network_input, size=32)
    backbone = load_backbone(settings.backbone, settings.weights).eval().requires_grad_(False).to(settings.device)
    tail = split(backbone)
    built = {
        "CIFAR10_OpenOOD": openood_benchmark(settings.data_root, transform),
        "CIFAR10_ODIN": odin_benchmark(settings.data_root, transform),
    }
    outliers = None
    if settings.outliers is not None:
        made = SDOutliers(settings.outliers, transform)
        kept = spread(len(made), min(len(made), most_train or len(made)))
        outliers = encode(Subset(made, kept.tolist()), backbone, None, settings).features.tensors[0]
    records: list[dict[str, Any]] = []
    for title, (benchmark, absent) in built.items():
        records += [{"benchmark": title, "ood": name, "skipped": why} for name, why in absent.items()]
        limit(benchmark, most, most_train)
    known = encode(built["CIFAR10_OpenOOD"][0].train_set(), backbone, tail, settings)
    train = Train(known.features.tensors[0], known.maps.tensors[0] if known.maps else None, known.features.tensors[1])
    tests = {
        title: (benchmark, [encode(part, backbone, tail, settings) for part in (benchmark.test_in, *benchmark.test_oods)])
        for title, (benchmark, _) in built.items()
    }
    theirs = recipes(backbone, train, settings.device, settings.batch_size)
    for method, recipe in {**ours(train, outliers, settings.seed), **theirs}.items():
        records += rows(method, recipe, tests, settings)
    counts = {"train": len(train.labels), "outliers": 0 if outliers is None else len(outliers)}
    for benchmark, sets in tests.values():
        counts |= {name: len(part.features) for name, part in zip(["CIFAR10", *benchmark.ood_names], sets, strict=True)}
    return records, counts


def main(argv: list[str] | None = None) -> None:
    """Run and write."""
    settings = arguments(argv)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        records, counts = measure(settings)
    facts = {"data": counts, "labels": "true", "features": f"frozen, {'pre-trained' if settings.weights else 'random'}"}
    where = {"device": settings.device, "data_root": settings.data_root}
    write_result("pytorch_ood_cifar10", vars(settings), [settings.seed], records, facts, **where)
    print(table(records))


if __name__ == "__main__":
    try:
        main()
    except SdoodError as error:
        sys.exit(str(error))
