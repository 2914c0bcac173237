"""The stage that scores the test images with our detector; it reads the detector and decides nothing in it."""

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
from .features import evaluating, extract
from .metrics import auroc_interval, detection_metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TestSets:
    """Every test set's images, ID first."""

    __test__ = False  # not a test, whatever pytest reads into its name

    names: list[str]
    groups: list[str]
    sets: list[ImageSet]


def read_tests(run: Context) -> TestSets | None:
    """The test images; None when there is no OOD set."""
    if run.test is None:
        return None
    groups = [ood.group for ood in run.config.data.ood]
    return TestSets(["id", *run.ood], ["id", *groups], [run.test, *run.ood.values()])


def method_rows(run: Context, tests: TestSets, method: str, scores: list[torch.Tensor]) -> list[dict[str, Any]]:
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
    from .scoring.heads import head_scores
    from .scoring.storage import load_score

    device = run.accelerator.device
    network = load_network(run.folder / "detector" / "detector.safetensors").to(device)
    score = load_score(run.folder / "detector", device)
    tests = read_tests(run)
    names = ("sdood", "sdood-distance", "sdood-vote", "sdood-g_bin", "sdood-msp", "sdood-energy")
    per_method: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    rows: list[dict[str, Any]] = []
    if tests is None:
        log.info("evaluate: no OOD test sets (data.ood), nothing to score")
    else:
        for name, images in zip(tests.names, tests.sets, strict=True):
            features = extract(network.backbone, images.images, device=device)
            with evaluating(network):
                own = head_scores(network.g_bin(features), network.g_in(features))
            distance, votes = score.terms(features)
            total = score.combined(distance, votes)
            values = (total, distance, votes, *own.values())
            for method, value in zip(names, values, strict=True):
                per_method[method].append(value.cpu())
            called = (total > score.calibration.threshold).float()
            columns = torch.stack([total, distance, votes, own["g_bin"], called], dim=1).cpu().tolist()
            if run.is_main:
                write_csv(
                    folder / f"scores-{name}.csv",
                    ("path", "score", "distance", "votes", "g_bin", "called_ood"),
                    ([path, *(f"{value:.9g}" for value in row)] for path, row in zip(images.names, columns, strict=True)),
                )
                write_tensors(folder / f"features-{name}.safetensors", {"features": features.half()})
        rows = [row for method, scores in per_method.items() for row in method_rows(run, tests, method, scores)]
    if run.is_main:
        write_json(folder / "rows.json", rows)
