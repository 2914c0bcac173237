"""The stages that score test images: ours and the comparators'. They read the detector and decide nothing in it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .artifacts import write_csv, write_json, write_tensors
from .context import Context
from .data.images import ImageSet
from .detector.network import load_network
from .detector.training import Labelled
from .features import evaluating, extract
from .metrics import auroc_interval, detection_metrics
from .stages import train_network

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _TestSets:
    """Every test set's images, ID first."""

    names: list[str]
    groups: list[str]
    sets: list[ImageSet]


def _test_sets(run: Context) -> _TestSets | None:
    if run.test is None:
        return None
    groups = [ood.group for ood in run.config.data.ood]
    return _TestSets(["id", *run.ood], ["id", *groups], [run.test, *run.ood.values()])


def _rows(run: Context, tests: _TestSets, method: str, scores: list[torch.Tensor]) -> list[dict[str, Any]]:
    """One flat record for each OOD set."""
    rows = []
    inside = scores[0].double().cpu().numpy()
    for name, group, own in list(zip(tests.names, tests.groups, scores, strict=True))[1:]:
        outside = own.double().cpu().numpy()
        values = detection_metrics(inside, outside)
        low, high = auroc_interval(values["auroc"], inside.size, outside.size)
        rows.append(
            {
                "method": method,
                "seed": run.config.seed,
                "ood": name,
                "group": group,
                **values,
                "auroc_low": low,
                "auroc_high": high,
                "n_id": inside.size,
                "n_ood": outside.size,
            }
        )
    return rows


def evaluate(run: Context, folder: Path, key: str) -> None:
    """rows.json and, for each test set, a CSV with every image's terms and scores."""
    from .scoring.storage import load_score

    device = run.accelerator.device
    network = load_network(run.folder / "detector" / "detector.safetensors").to(device)
    score = load_score(run.folder / "detector", device)
    tests = _test_sets(run)
    names = ("sdood", "sdood-distance", "sdood-vote", "sdood-g_bin", "sdood-msp", "sdood-energy")
    per_method: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    rows: list[dict[str, Any]] = []
    if tests is None:
        log.info("evaluate: no OOD test sets (data.ood), nothing to score")
    else:
        for name, images in zip(tests.names, tests.sets, strict=True):
            features = extract(network.backbone, images.images, device=device)
            with evaluating(network):
                inside, binary = network.g_in(features), network.g_bin(features).softmax(dim=1)[:, 1]
            distance, votes = score.terms(features)
            total = distance + score.calibration.alpha * votes
            values = (total, distance, votes, binary, -inside.softmax(dim=1).max(dim=1).values, -inside.logsumexp(dim=1))
            for method, value in zip(names, values, strict=True):
                per_method[method].append(value.cpu())
            columns = (
                torch.stack([total, distance, votes, binary, (total > score.calibration.threshold).float()], dim=1).cpu().tolist()
            )
            if run.is_main:
                write_csv(
                    folder / f"scores-{name}.csv",
                    ("path", "score", "distance", "votes", "g_bin", "called_ood"),
                    ([path, *(f"{value:.6g}" for value in row)] for path, row in zip(images.names, columns, strict=True)),
                )
                write_tensors(folder / f"features-{name}.safetensors", {"features": features.half()})
        rows = [row for method, scores in per_method.items() for row in _rows(run, tests, method, scores)]
    if run.is_main:
        write_json(folder / "rows.json", rows)


def compare(run: Context, folder: Path, key: str) -> None:
    """rows.json of the comparators, on the reference network; outlier exposure trains one of its own."""
    from .baselines.outlier_exposure import outlier_exposure_loss, uniform_noise
    from .baselines.posthoc import posthoc_scores

    tests, rows = _test_sets(run), []
    if tests is not None:
        device, kept = run.accelerator.device, ~run.heldout
        reference = load_network(run.folder / "reference" / "reference.safetensors").to(device)
        train = run.train.images[kept]
        methods = run.config.compare.methods
        features = extract(reference.backbone, train, device=device)
        queries = [extract(reference.backbone, images.images, device=device) for images in tests.sets]
        for method in methods:
            if method == "oe-noise":
                noise = Labelled(
                    uniform_noise(len(train), train.shape[-1], run.seed("noise")), torch.zeros(len(train), dtype=torch.int64)
                )
                network = train_network(run, folder, key, "oe-noise", noise, None, outlier_exposure_loss)
                own = [extract(network.backbone, images.images, device=device) for images in tests.sets]
                scores = posthoc_scores("msp", (features, run.labels.labels[kept]), network.g_in.weight, network.g_in.bias, own)
            elif method == "distance":
                scores = _plain_distance(run, features, queries)
            else:
                scores = posthoc_scores(
                    method, (features, run.labels.labels[kept]), reference.g_in.weight, reference.g_in.bias, queries
                )
            rows += _rows(run, tests, method, scores)
    if run.is_main:
        write_json(folder / "rows.json", rows)


def _plain_distance(run: Context, features: torch.Tensor, queries: list[torch.Tensor]) -> list[torch.Tensor]:
    """Our distance term on the reference network: what the outliers add is the difference to `sdood-distance`."""
    from torch.nn import functional as F

    from .neighbours import nearest

    scoring = run.config.scoring
    prepare = (lambda values: F.normalize(values, dim=1)) if scoring.normalise else (lambda values: values)
    return [nearest(prepare(query), prepare(features), scoring.k_distance)[0].sum(dim=1) for query in queries]
