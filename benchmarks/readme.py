"""Write benchmarks/README.md from results/*.json: `python -m benchmarks.readme`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, mean_and_deviation
from sdood_plugin.artifacts import read_json, write_text

INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks.readme` from `results/*.json`; each file names its command, configuration hash, device, versions and
seeds. Rates and areas are in per cent, mean +- sample standard deviation over seeds.
"""

MISSING = """## Missing, and what it needs

In the order in which a GPU should take them. Nothing here has been run yet.

| what | command | needs |
|---|---|---|
| CIFAR-10, unlabelled, ResNet-18: labels, diffusion model, 50,000 outliers and controls, detector | `sdood run --config configs/cifar10.yml --out runs/cifar10` | one GPU; OpenOOD's data folder |
| Table 1 of the paper (CIFAR-100 / SVHN / LSUN, ViT-B/16) | no script yet | one GPU; ViT-B/16 weights; whole SVHN and LSUN |
| Table 1 under OpenOOD's official lists, ResNet-18, labelled | no script yet | one GPU |
| Tables 2, 3 and 4 (S x w, scoring, outliers as test set) | no script yet | one GPU |
| FID of the outliers | no script yet | Inception weights |
| Fake-it and Multi-class AD on the same images | no script yet | one GPU for CIFAR-10 |
"""


def main() -> None:
    """Write README.md beside this file."""
    sections = [INTRODUCTION]
    for path in sorted(RESULTS.glob("*.json")):
        result = read_json(path)
        figure = f"figures/{path.stem}-triplets.png"
        extra = f"\n{result['note']}\n" if "note" in result else ""
        extra += f"\n![source, control and outlier]({figure})\n" if (Path(__file__).parent / figure).exists() else ""
        sections.append(
            f"## {path.stem}\n\n`{result['command']}`  \n{result['device']}, torch {result['versions'].get('torch')}, "
            f"seeds {result['seeds']}, {result['wall_s'] / 60:.0f} minutes\n{extra}\n{table(result['rows'])}\n"
        )
    write_text(Path(__file__).parent / "README.md", "\n".join([*sections, MISSING]))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: AUROC by method and OOD set where rows have them, else the rows as they are; then what was skipped."""
    skipped, rows = [row for row in rows if "skipped" in row], [row for row in rows if "skipped" not in row]
    if skipped:
        reasons = [f"- {row.get('method') or row.get('ood')}: {row['skipped']}" for row in skipped]
        return "\n".join([table(rows), "", "Not run:", "", *reasons])
    if not rows:
        return "no rows"
    if not {"method", "ood", "auroc"} <= rows[0].keys():
        names = list(dict.fromkeys(name for row in rows for name in row))
        return _markdown(names, [[_number(row.get(name, "")) for name in names] for row in rows])
    sets = list(dict.fromkeys(row["ood"] for row in rows))
    lines: list[list[str]] = []
    rate, words = ("fpr95", "ID") if "fpr95" in rows[0] else ("fpr95_ood_positive", "OOD")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [[row for row in rows if row["method"] == method and row["ood"] == name] for name in sets]
        lines.append([method, *(f"{_spread(cell, 'auroc')} ({_spread(cell, rate)})" if cell else "-" for cell in cells)])
    return f"AUROC (FPR@95, {words} positive)\n\n" + _markdown(["method", *sets], lines)


def _spread(rows: list[dict[str, Any]], name: str) -> str:
    mean, deviation = mean_and_deviation([row[name] for row in rows])
    return f"{mean:.1f} +- {deviation:.1f}" if len(rows) > 1 else f"{mean:.1f}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(names: list[str], lines: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *lines]])


if __name__ == "__main__":
    main()
