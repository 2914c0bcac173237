"""Which part of the score tells: distance, vote, both, g_bin, MSP, energy; how alpha is best chosen; t-SNE early and late.

    python -m benchmarks.demo --labels hidden        # leaves the runs that are read when none are named
    python -m benchmarks.scoring [RUN ...]

Every run's detector scores its own test sets. `by_class` in the result is the AUROC of an OOD set against the ID test images
of one true class; `chosen` is what held-out data decided in each run. The rows `both, alpha by ...` choose alpha in other
ways: on `outliers` as they come against images, with their own `classes` left out of the bank, against images and `controls`,
or (the score's own way) both. For the figure (Fig. 3 of the paper) the first run's detector is trained again for
`--early-epochs`, with the learning rate falling to 0 in that time, and its features stand beside those of the run's own. A
second figure has the scores that the first run's evaluation wrote of each test set, and its threshold.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.record import RESULTS, mean_and_deviation, write_result
from sdood_plugin import Detector, stages
from sdood_plugin.artifacts import atomic_path, read_json
from sdood_plugin.cli import read_config
from sdood_plugin.config import as_dict
from sdood_plugin.context import Context
from sdood_plugin.data.images import spread
from sdood_plugin.evaluation import TestSets, method_rows, read_tests
from sdood_plugin.features import extract
from sdood_plugin.metrics import detection_metrics
from sdood_plugin.scoring.score import fit_score

ROOT = Path(__file__).parent.parent
HEADS = ("g_bin", "msp", "energy", "g_out")
PARTS = {"score": "both", "distance": "distance", "votes": "vote", **dict(zip(HEADS, HEADS, strict=True))}
POINTS = 200  # of each set in the figure
COLOURS = {"id": "#2b6cb0", "outliers": "#d69e2e"}
RULES = {  # how alpha is chosen -> what of the held-out data is not told
    "outliers": ("outlier_classes", "heldout_classes", "heldout_controls"),
    "classes": ("heldout_controls",),
    "controls": ("outlier_classes", "heldout_classes"),
    "classes and controls": (),
}
FINISHED = ("detector/score.json", "evaluation/scores-id.csv")  # what is there of a run that can be read
OOD_COLOURS = ("#c53030", "#805ad5", "#dd6b20", "#744210")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__.split("\n")[0])
    default = [ROOT / "runs" / "benchmarks" / f"demo-hidden-{seed}" for seed in range(3)]
    parser.add_argument("runs", type=Path, nargs="*", default=default, help="run folders of `sdood run`, one a seed")
    parser.add_argument("--early-epochs", type=int, default=1)
    parser.add_argument("--suffix", default="")
    parser.add_argument("--note", help="a sentence to stand in the result")
    return parser.parse_args()


def opened(folder: Path) -> tuple[Context, TestSets]:
    """A finished run and its test sets."""
    run = Context(read_config(folder / "config.yaml"), folder)
    tests = read_tests(run)
    if tests is None:
        raise SystemExit(f"{folder} has no OOD test sets")
    return run, tests


def ablation(run: Context, tests: TestSets) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows by method and OOD set, rows by method, OOD set and ID class)."""
    detector = Detector.load(run.folder)
    said = [detector.verdicts(images) for images in tests.sets]
    rows, by_class = [], []
    for field, method in PARTS.items():
        scores = [getattr(verdicts, field) for verdicts in said]
        rows += method_rows(run, tests, method, scores)
        true = tests.sets[0].labels
        for label in [] if true is None or method not in ("both", "distance", "vote") else true.unique().tolist():
            for name, outside in zip(tests.names[1:], scores[1:], strict=True):
                auroc = detection_metrics(scores[0][true == label], outside)["auroc"]
                row = {"method": method, "seed": run.config.seed, "ood": name, "id_class": label, "auroc": auroc}
                by_class.append(row | {"n_id": int((true == label).sum()), "n_ood": len(outside)})
    return rows, by_class


def alphas(run: Context, tests: TestSets) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(rows by way of choosing alpha and OOD set, alpha by way)."""
    detector = Detector.load(run.folder, run.accelerator.device)
    given = stages.score_features(run, detector.network)
    features = [extract(detector.network.backbone, images.images, device=detector.device) for images in tests.sets]
    rows, found = [], {}
    for name, untold in RULES.items():
        score = fit_score(config=run.config.scoring, **{part: value for part, value in given.items() if part not in untold})
        rows += method_rows(run, tests, f"both, alpha by {name}", [score(one) for one in features])
        found[name] = score.calibration.alpha
    return rows, found


def early_network(run: Context, epochs: int) -> nn.Module:
    """The run's detector after a training of so few epochs."""
    short = dataclasses.replace(run.config, detector=dataclasses.replace(run.config.detector, epochs=epochs))
    again = Context(short, run.folder)
    with tempfile.TemporaryDirectory() as folder:
        made = [stages.read_outliers(again, name, ~again.heldout) for name in ("outliers", "controls")]
        return stages.train_network(again, Path(folder), f"early {epochs}", "early", *made)


def some(rows: torch.Tensor) -> torch.Tensor:
    """Those that the figure shows."""
    return rows[spread(len(rows), min(len(rows), POINTS))]


def places(features: dict[str, torch.Tensor], normalise: bool) -> dict[str, list[list[float]]]:
    """t-SNE of the features (N, D) of all sets together, as the score sees them: [x, y] of each image by set."""
    from sklearn.manifold import TSNE

    found = {name: values.cpu().numpy() for name, values in features.items()}
    points = np.concatenate(list(found.values()))
    if normalise:
        points /= np.linalg.norm(points, axis=1, keepdims=True).clip(1e-12)
    flat = TSNE(random_state=0, init="pca", perplexity=min(30, len(points) // 4)).fit_transform(points)
    ends = np.cumsum([len(values) for values in found.values()])[:-1]
    return {name: np.round(part, 2).tolist() for name, part in zip(found, np.split(flat, ends), strict=True)}


def early_and_late(run: Context, tests: TestSets, epochs: int) -> dict[str, Any]:
    """Places of ID test images, near OOD images and outliers under both networks."""
    sets = {
        name: images.images for name, group, images in zip(tests.names, tests.groups, tests.sets, strict=True) if group != "far"
    }
    outliers = stages.read_outliers(run, "outliers", ~run.heldout)
    if outliers is not None:
        sets["outliers"] = outliers.images
    networks = {epochs: early_network(run, epochs), run.config.detector.epochs: Detector.load(run.folder).network}
    panels = []
    for done, network in networks.items():
        device = next(network.parameters()).device
        features = {name: extract(network.backbone, some(images), device=device) for name, images in sets.items()}
        panels.append({"epochs": done, "sets": places(features, run.config.scoring.normalise)})
    return {"seed": run.config.seed, "panels": panels}


def draw_panels(figure: Any, panels: list[dict[str, Any]]) -> None:
    """The places of every set, a panel an age of the detector."""
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        spare = iter(OOD_COLOURS * len(panel["sets"]))
        for name, points in panel["sets"].items():
            across, up = zip(*points, strict=True)
            axes.scatter(across, up, s=6, alpha=0.7, label="ID" if name == "id" else name, color=COLOURS.get(name) or next(spare))
        axes.set(xticks=[], yticks=[], title=f"after {panel['epochs']} epoch{'s' * (panel['epochs'] > 1)}")
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=6, frameon=False, markerscale=2)


def draw(file: Path, figure_file: Path) -> None:
    """The figure, from the JSON alone."""
    from matplotlib.figure import Figure

    panels = read_json(file)["tsne"]["panels"]
    figure = Figure(figsize=(4.5 * len(panels), 4.2))
    draw_panels(figure, panels)
    with atomic_path(figure_file) as temporary:
        figure.savefig(temporary, bbox_inches="tight", dpi=130)


def draw_scores(folder: Path, figure_file: Path) -> None:
    """The score of each test set and the threshold, from what the run's evaluation wrote."""
    from sdood_plugin.report.figures import score_histogram

    figure = score_histogram(folder)
    assert figure is not None, f"{folder} is not evaluated"
    with atomic_path(figure_file) as temporary:
        figure.savefig(temporary, bbox_inches="tight", dpi=130)


def main() -> None:
    """Score every run, write after each; then the figure."""
    settings = arguments()
    absent = [str(run) for run in settings.runs if not all((run / file).exists() for file in FINISHED)]
    if absent:
        raise SystemExit(f"no finished run in {', '.join(absent)}: name run folders, or run `python -m benchmarks.demo` first")
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"by_class": [], "chosen": []} | ({"note": settings.note} if settings.note else {})
    configs: list[Any] = []
    name, seeds = f"scoring{settings.suffix}", []
    for folder in settings.runs:
        run, tests = opened(folder)
        found, by_class = ablation(run, tests)
        others, alpha = alphas(run, tests)
        rows += found + others
        facts["by_class"] += by_class
        chosen = read_json(folder / "detector" / "score.json")["calibration"]
        facts["chosen"].append({"seed": run.config.seed, **chosen, "alpha_by": alpha})
        configs.append(as_dict(run.config))
        seeds.append(run.config.seed)
        facts["data"] = {"train": len(run.train), **dict(zip(tests.names, map(len, tests.sets), strict=True))}
        write_result(name, configs, seeds, rows, facts, device=run.config.device)
    figures = RESULTS.parent / "figures"
    draw_scores(settings.runs[0], figures / f"{name}-histograms.png")
    facts["tsne"] = early_and_late(*opened(settings.runs[0]), settings.early_epochs)
    draw(write_result(name, configs, seeds, rows, facts, device=run.config.device), figures / f"{name}-tsne.png")
    oods = list(dict.fromkeys(row["ood"] for row in rows))
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [mean_and_deviation([r["auroc"] for r in rows if r["method"] == method and r["ood"] == ood]) for ood in oods]
        print(
            method.ljust(38)
            + "".join(
                f"{ood} {mean:.1f} +- {deviation:.1f}".rjust(24) for ood, (mean, deviation) in zip(oods, cells, strict=True)
            )
        )


if __name__ == "__main__":
    main()
