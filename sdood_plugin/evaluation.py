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
from .decision import Detector, Verdicts
from .features import extract
from .metrics import auroc_interval, detection_metrics

log = logging.getLogger(__name__)
PARTS = {  # method -> what of the verdicts it is
    "sdood": "score",
    "sdood-distance": "distance",
    "sdood-vote": "votes",
    "sdood-g_bin": "g_bin",
    "sdood-msp": "msp",
    "sdood-energy": "energy",
    "sdood-g_out": "g_out",
}


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
    tests = read_tests(run)
    if tests is None:
        log.info("evaluate: no OOD test sets (data.ood), nothing to score")
    rows = [] if tests is None else _score(run, tests, folder)
    if run.is_main:
        write_json(folder / "rows.json", rows)


def _score(run: Context, tests: TestSets, folder: Path) -> list[dict[str, Any]]:
    """The rows of every method; each test set's scores and features are written."""
    device = run.accelerator.device
    detector = Detector.load(run.folder, device)
    said: list[Verdicts] = []
    for name, images in zip(tests.names, tests.sets, strict=True):
        features = extract(detector.network.backbone, images.images, device=device)
        said.append(detector.verdicts_of(features, images.names))
        if run.is_main:
            _write_scores(folder / f"scores-{name}.csv", images, said[-1], detector.threshold)
            write_tensors(folder / f"features-{name}.safetensors", {"features": features.half()})
    rows = {part: method_rows(run, tests, method, [getattr(one, part) for one in said]) for method, part in PARTS.items()}
    called = [100 * float((one.score > detector.threshold).double().mean()) for one in said]
    for row, share in zip(rows["score"], called[1:], strict=True):
        row |= {"called_id": called[0], "called_ood": share}  # per cent that the chosen threshold calls OOD
    return [row for part in rows.values() for row in part]


def _write_scores(path: Path, images: ImageSet, said: Verdicts, threshold: float) -> None:
    called = (said.score > threshold).float()
    columns = torch.stack([said.score, said.distance, said.votes, said.g_bin, called], dim=1).tolist()
    write_csv(
        path,
        ("path", "score", "distance", "votes", "g_bin", "called_ood"),
        ([name, *(f"{value:.9g}" for value in row)] for name, row in zip(images.names, columns, strict=True)),
    )
