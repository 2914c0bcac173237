"""report.html: one file that holds a run's table, figures and configuration."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from ..artifacts import read_json, write_json, write_text

TITLES = {
    "triplets": (
        "Outliers: source, same-class control, outlier",
        "One column an image; below each, the class the reference network sees in it.",
    ),
    "grid-class-pair": (
        "Outliers by class pair",
        "Row: the source's pseudo-label; column: the class guidance pointed to, or what is seen.",
    ),
    "grid-start_fraction": ("Outliers by S", "How far their sources were noised, as a fraction of T."),
    "grid-guidance_weight": ("Outliers by w", "How strongly they were guided."),
    "scores": (
        "Scores",
        "Every test image (held-out images where there are no test sets); dashed: the threshold, chosen on held-out images.",
    ),
    "tsne": ("Feature space", "t-SNE of the detector's features."),
    "labels": ("Pseudo-labels", "Cluster sizes and confidence."),
    "clusters": (
        "Images of each cluster",
        "The most and the least confident ones; with many clusters those of the first twenty.",
    ),
    "losses": ("Training", "Losses, smoothed."),
    "noise-levels": ("Diffusion loss by noise level", "On held-out images; levels above S_max are never trained."),
}


def write_report(folder: Path, truth: dict[str, Any] | None = None) -> Path:
    """Draw the figures and write report.html.

    Args:
        folder: A run folder.
        truth: What only the report may know (label quality against true labels, notes on the input); kept in
            report.json, so that the report can be drawn again from files alone.
    """
    from .figures import draw_all, scores_of_tests

    if truth is not None:
        write_json(folder / "report.json", truth)
    figures = draw_all(folder)
    rows = _optional(folder / "metrics.json", {"rows": []})["rows"]
    sets = list(dict.fromkeys(row["ood"] for row in rows))
    tests = [
        next({"name": name, "group": row["group"], "n_ood": row["n_ood"]} for row in rows if row["ood"] == name) for name in sets
    ]
    table = [
        {
            "method": method,
            "cells": [next((r for r in rows if r["method"] == method and r["ood"] == name), None) for name in sets],
        }
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    calibration = _optional(folder / "detector" / "score.json", {}).get("calibration", {})
    page = _template("page.html.j2").render(
        name=folder.resolve().name,
        run=read_json(folder / "run.json"),
        tests=tests,
        table=table,
        calibration=calibration if "votes" in calibration else None,  # that of an earlier version says less
        called={name: _called_ood(scores) for name, scores in scores_of_tests(folder).items()} if rows else {},
        selected=_optional(folder / "detector" / "selection.json", None),
        cluster_notes=_optional(folder / "clustering" / "summary.json", {}).get("notes", []),
        figures=_embedded(figures),
        quality=_optional(folder / "inspection" / "quality.json", {}),
        truth=_optional(folder / "report.json", {"label_quality": None, "notes": []}),
        times={
            path.stem: read_json(path)["seconds"]
            for path in sorted((folder / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime)
        },
        config=(folder / "config.yaml").read_text(),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def write_quality_page(folder: Path) -> Path:
    """Draw the grids and write report.html of a folder that holds nothing but an inspection."""
    from .figures import draw_all

    page = _template("inspection.html.j2").render(
        name=folder.resolve().name,
        figures=_embedded(draw_all(folder)),
        quality=_optional(folder / "inspection" / "quality.json", {}),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _called_ood(rows: list[dict[str, str]]) -> float:
    """Per cent of a test set's images above the threshold."""
    return 100 * sum(float(row["called_ood"]) for row in rows) / len(rows)


def _template(name: str) -> Any:
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(name)


def _embedded(figures: dict[str, Path]) -> list[tuple[str, str, str]]:
    """Figures as base64 with title and note, in the order of TITLES."""
    return [(base64.b64encode(figures[name].read_bytes()).decode(), *words) for name, words in TITLES.items() if name in figures]


def _optional(path: Path, default: Any) -> Any:
    return read_json(path) if path.exists() else default
