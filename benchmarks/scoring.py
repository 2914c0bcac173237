"""Which part of the score tells: distance, vote, both, g_bin, MSP, energy; how alpha is best chosen.

    python -m benchmarks.demo --labels hidden        # leaves the runs that are read when none are named
    python -m benchmarks.scoring [RUN ...]

Every run's detector scores its own test sets. `by_class` in the result is the AUROC of an OOD set against the ID test images
of one true class; `chosen` is what held-out data decided in each run. The rows `both, alpha by ...` choose alpha in other
ways: on `outliers` as they come against images, with their own `classes` left out of the bank, against images and `controls`,
or (the score's own way) both. The figure has the scores that the first run's evaluation wrote of each test set, and its
threshold.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, mean_and_deviation, write_result
from sdood_plugin import Detector, stages
from sdood_plugin.artifacts import atomic_path, read_json
from sdood_plugin.cli import read_config
from sdood_plugin.config import as_dict
from sdood_plugin.context import Context
from sdood_plugin.evaluation import TestSets, method_rows, read_tests
from sdood_plugin.features import extract
from sdood_plugin.metrics import detection_metrics
from sdood_plugin.scoring.score import fit_score

ROOT = Path(__file__).parent.parent
HEADS = ("g_bin", "msp", "energy", "g_out")
PARTS = {"score": "both", "distance": "distance", "votes": "vote", **dict(zip(HEADS, HEADS, strict=True))}
RULES = {  # how alpha is chosen -> what of the held-out data is not told
    "outliers": ("outlier_classes", "heldout_classes", "heldout_controls"),
    "classes": ("heldout_controls",),
    "controls": ("outlier_classes", "heldout_classes"),
    "classes and controls": (),
}
FINISHED = ("detector/score.json", "evaluation/scores-id.csv")  # what is there of a run that can be read


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__.split("\n")[0])
    default = [ROOT / "runs" / "benchmarks" / f"demo-hidden-{seed}" for seed in range(3)]
    parser.add_argument("runs", type=Path, nargs="*", default=default, help="run folders of `sdood run`, one a seed")
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
    draw_scores(settings.runs[0], RESULTS.parent / "figures" / f"{name}-histograms.png")
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
