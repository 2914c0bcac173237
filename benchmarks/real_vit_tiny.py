"""CIFAR-10 against CIFAR-100 and Tiny-ImageNet on frozen ViT-Tiny features: what a CPU can measure on real images.

    python -m benchmarks.real_vit_tiny DATA_ROOT --weights vit_tiny_patch16_224.safetensors [--outliers RUN/outliers]

Features are computed once (`benchmarks.features_cache`): 10,000 training images, and OpenOOD's whole official test lists. All
rows are pre-trained: the backbone has seen ImageNet with labels. The methods:

- dn2, dn2-cosine: DN2's protocol, the two nearest training features; knn, mahalanobis, vim: pytorch-ood's; no outliers. msp,
  energy: of a linear classifier trained by cross-entropy.
- sdood and sdood-*: three linear heads trained on the frozen features with outliers. The features and with them the
  distance are the backbone's own, and g_in, which sees no outliers, learns what the classifier of msp and energy learns:
  only votes and g_bin learn of the outliers. With `--outliers` those are images of an outlier set. Without, they are made in
  feature space, means of the features of two images of different classes, which no image was generated for.
- sdood, bank N: both banks reduced to N rows together by k-means.

The heads' training is the package's, with all blocks frozen and no augmentation (`HEADS`); the features kept stand for what
`train_detector` computes once of the images and keeps in float16. There are no controls.

True labels train the heads, mahalanobis and vim (the labelled protocol). Seeds decide which tenth of the training images, with
the outliers made of them, is held out for alpha and the scale, the mixtures and the heads' first weights. Features of test
images are read when every seed is fitted.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.features_cache import BACKBONE, CACHE, TRAIN_IMAGES, cached_features, features_of, line_names
from benchmarks.paired import add_pairs
from benchmarks.record import RESULTS, mean_and_deviation, write_result
from sdood_plugin.baselines.dn2 import knn_score
from sdood_plugin.baselines.posthoc import posthoc_scores
from sdood_plugin.config import DetectorConfig, RunConfig, ScoringConfig
from sdood_plugin.data.images import ImageSet
from sdood_plugin.decision import Detector
from sdood_plugin.detector.batches import Labelled as Images
from sdood_plugin.detector.batches import make_parts
from sdood_plugin.detector.network import ThreeHeadNet
from sdood_plugin.detector.training import new_network, train_parts
from sdood_plugin.features import load_backbone
from sdood_plugin.metrics import auroc_interval, detection_metrics
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.randomness import derive_seed, step_generator
from sdood_plugin.scoring.score import Score, fit_score
from sdood_plugin.training import Job, make_accelerator

CLASSES = 10
HEADS = DetectorConfig(backbone=BACKBONE, frozen_blocks="all", augmentation="none", epochs=30, batch_size=256)
OODS = ("cifar100", "tin")
Scores = dict[str, list[torch.Tensor]]  # by method: of cifar10_test and of each of OODS


class Labelled(NamedTuple):
    """Features float32 (N, D) and labels int64 (N,); of outliers, their sources'."""

    features: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, kept: dict[str, torch.Tensor]) -> Labelled:
        """What the cache keeps of a set."""
        return cls(kept["features"], kept["labels"])

    def part(self, chosen: torch.Tensor) -> Labelled:
        """Those at a mask or at positions."""
        return Labelled(self.features[chosen], self.labels[chosen])


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_vit_tiny", description=__doc__.split("\n")[0])
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--outliers", type=Path, help="an outlier set of `sdood generate`")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-images", type=int, default=TRAIN_IMAGES)
    parser.add_argument("--test-images", type=int, help="of every test set; all without it")
    parser.add_argument("--bank-sizes", type=int, nargs="*", default=[2000, 500, 100])
    parser.add_argument("--device", default="cpu", help="of the backbone")
    parser.add_argument("--suffix", default="")
    return parser.parse_args(arguments)


def mixtures(inside: Labelled, generator: torch.Generator) -> Labelled:
    """One outlier an image: the mean of its features and those of an image of another class, with its label."""
    partner = torch.randperm(len(inside.labels), generator=generator)
    different = inside.labels != inside.labels[partner]
    blended = (inside.features + inside.features[partner]) / 2
    return Labelled(blended[different], inside.labels[different])


def train_heads(inside: Labelled, outliers: Labelled | None, weights: Path, seed: int) -> ThreeHeadNet:
    """`train_detector` from the features on; without outliers g_in alone learns, by cross-entropy."""
    config = dataclasses.replace(HEADS, weights=str(weights))
    pools = [None if part is None else Images(part.features.half(), part.labels) for part in (inside, outliers)]
    parts = make_parts(pools[0], None, pools[1], config.batch_size, (config.control_ratio, config.outlier_ratio))
    with tempfile.TemporaryDirectory() as folder:
        job = Job(make_accelerator(RunConfig(device="cpu")), Path(folder), derive_seed(seed, "heads"))
        network = new_network(config, job, classes=CLASSES, image_size=32)
        return train_parts(network, parts, config, job, half_way=True)[0].requires_grad_(False)


def scores_without_outliers(train: Labelled, plain: ThreeHeadNet, tests: list[torch.Tensor]) -> Scores:
    """The comparators."""
    classifier = plain.g_in.weight, plain.g_in.bias
    methods = ("knn", "mahalanobis", "vim", "msp", "energy")
    return {
        "dn2": [knn_score(train.features, test) for test in tests],
        "dn2-cosine": [knn_score(train.features, test, unit_length=True) for test in tests],
        **{method: posthoc_scores(method, tuple(train), *classifier, tests) for method in methods},
    }


def scores_with_outliers(score: Score, network: ThreeHeadNet, tests: list[torch.Tensor]) -> Scores:
    """Ours and its parts."""
    detector = Detector(network, score, network.image_size)
    found: Scores = {}
    for test in tests:
        said = detector.verdicts_of(test)
        for name, value in {"": said.score, "-distance": said.distance, "-vote": said.votes, "-g_bin": said.g_bin}.items():
            found.setdefault(f"sdood{name}", []).append(value)
    return found


class Fitted(NamedTuple):
    """What one seed has learnt and chosen; test images have no part in it."""

    train: Labelled
    plain: ThreeHeadNet  # heads trained without outliers
    network: ThreeHeadNet  # heads trained with them
    score: Score
    small: dict[int, Score]  # by bank size

    @property
    def chosen(self) -> dict[str, Any]:
        """What was chosen on held-out data."""
        calibration, threshold = self.score.calibration, self.score.threshold
        values = {"alpha": calibration.alpha, "curve": calibration.curve, "threshold": threshold.value}
        return values | {"false_alarm_interval": [threshold.low, threshold.high]}

    def scores(self, tests: list[torch.Tensor]) -> Scores:
        """Every method's scores of the test sets."""
        found = scores_without_outliers(self.train, self.plain, tests) | scores_with_outliers(self.score, self.network, tests)
        for size, small in self.small.items():
            terms = [small.terms(test) for test in tests]
            found[f"sdood, bank {size}"] = [small.combined(*pair) for pair in terms]
            found[f"sdood-distance, bank {size}"] = [distance for distance, _ in terms]
        return found

    def accuracy(self, test: Labelled) -> float:
        """Per cent of images whose class g_in finds."""
        return 100 * float((self.network.g_in(test.features).argmax(dim=1) == test.labels).float().mean())


def fit_seed(seed: int, whole: Labelled, made: OutlierFeatures | None, sizes: list[int], weights: Path) -> Fitted:
    """Everything that is trained and chosen, from the training images alone."""
    order = torch.randperm(len(whole.labels), generator=torch.Generator().manual_seed(derive_seed(seed, "heldout")))
    heldout = torch.zeros(len(order), dtype=torch.bool)
    heldout[order[: len(order) // 10]] = True
    train, held = whole.part(~heldout), whole.part(heldout)
    if made is None:
        outliers, held_outliers = (mixtures(part, step_generator(seed, "mixtures", len(part.labels))) for part in (train, held))
    else:
        outliers, held_outliers = made.split(heldout)
    given = (train.features, outliers.features, held.features, held_outliers.features)
    kinds = {"outlier_classes": outliers.labels, "heldout_classes": held_outliers.labels}
    small = {size: fit_score(*given, ScoringConfig(bank_size=size), **kinds) for size in sizes}
    networks = [train_heads(train, told, weights, seed) for told in (None, outliers)]
    return Fitted(train, *networks, fit_score(*given, ScoringConfig(), **kinds), small)


class OutlierFeatures:
    """Features of an outlier set, held out where their sources are.

    Args:
        folder: The set.
        names: Of the training images, in order; every source is one of them.
        weights: Of the backbone.
        device: Where to compute.
    """

    def __init__(self, folder: Path, names: list[str], weights: Path, device: str) -> None:
        made, place = OutlierSet(folder), {name: row for row, name in enumerate(names)}
        sources = [str(row["source"]) for row in made.manifest]
        unknown = [source for source in sources if source not in place]
        if unknown:
            raise SystemExit(f"{folder}: {len(unknown)} sources, {unknown[0]} the first, are not among the training images")
        images = ImageSet(made.images, [str(row) for row in range(len(made))])
        self.all = Labelled(features_of(images, load_backbone(BACKBONE, weights), device), made.labels)
        self.sources = torch.tensor([place[source] for source in sources])

    def split(self, heldout: torch.Tensor) -> tuple[Labelled, Labelled]:
        """(for training and the bank, held out); `heldout` bool (N,) is of the training images."""
        chosen = heldout[self.sources]
        return self.all.part(~chosen), self.all.part(chosen)


def records(seed: int, found: Scores, kind: str) -> list[dict[str, Any]]:
    """One flat row a method and OOD set."""
    rows = []
    for method, (inside, *outsides) in found.items():
        for name, outside in zip(OODS, outsides, strict=True):
            values = detection_metrics(inside, outside)
            low, high = auroc_interval(values["auroc"], len(inside), len(outside))
            row = {"method": method, "seed": seed, "ood": name, "group": "near", **values, "auroc_low": low, "auroc_high": high}
            rows.append(row | {"n_id": len(inside), "n_ood": len(outside), "pre_trained": True, "labels": "true"})
            rows[-1] |= {"outliers": kind} if method.startswith("sdood") else {}
    return rows


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Fit every seed, then score the test sets and write, after each seed."""
    settings = read_arguments(arguments)

    def read(names: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        sizes = {"train_images": settings.train_images, "test_images": settings.test_images, "device": settings.device}
        return list(cached_features(settings.data_root, settings.weights, settings.cache, **sizes, names=names).values())

    (kept,) = read(["cifar10_train"])
    whole, names = Labelled.of(kept), line_names(settings.data_root, "cifar10_train", kept["index"])
    made = OutlierFeatures(settings.outliers, names, settings.weights, settings.device) if settings.outliers else None
    fitted = [fit_seed(seed, whole, made, settings.bank_sizes, settings.weights) for seed in settings.seeds]
    tests = [Labelled.of(kept) for kept in read(["cifar10_test", *OODS])]
    kind = "images of an outlier set" if made else "feature-space mixtures of two classes"
    rows: list[dict[str, Any]] = []
    parts = zip(["cifar10_train", "cifar10_test", *OODS], [whole, *tests], strict=True)
    counts = {name: len(part.labels) for name, part in parts} | ({"outliers": len(made.sources)} if made else {})
    facts: dict[str, Any] = {"data": counts, "chosen": []}
    pairs = []
    config = {key: value for key, value in vars(settings).items() if key not in ("cache", "suffix")}
    config["heads"] = dataclasses.asdict(HEADS)
    name, where = f"real_vit_tiny{settings.suffix}", {"device": settings.device, "data_root": settings.data_root}
    for number, (seed, learnt) in enumerate(zip(settings.seeds, fitted, strict=True), 1):
        found = learnt.scores([test.features for test in tests])
        rows += records(seed, found, kind)
        facts["chosen"].append({"seed": seed, "id_accuracy": learnt.accuracy(tests[0]), **learnt.chosen})
        scores = {method: [values.double().numpy() for values in test] for method, test in found.items()}
        pairs.append({ood: {m: (s[0], s[1 + place]) for m, s in scores.items()} for place, ood in enumerate(OODS)})
        result = write_result(name, config, settings.seeds[:number], rows, facts, folder=RESULTS, **where)
    add_pairs(result, pairs)
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [mean_and_deviation([r["auroc"] for r in rows if r["method"] == method and r["ood"] == ood]) for ood in OODS]
        print(method.ljust(28) + "".join(f"{mean:.2f} +- {deviation:.2f}".rjust(18) for mean, deviation in cells))
    return rows


if __name__ == "__main__":
    main()
