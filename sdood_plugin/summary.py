"""What a finished command says on the terminal: the table of results and where things are."""

from __future__ import annotations

from pathlib import Path

from .artifacts import read_json


def summarise(folder: Path) -> str:
    """A table of AUROC by method and test set, and the files worth opening."""
    lines = []
    rows = read_json(folder / "metrics.json")["rows"] if (folder / "metrics.json").exists() else []
    if rows:
        sets = list(dict.fromkeys(row["ood"] for row in rows))
        groups = {row["ood"]: row["group"] for row in rows}
        heads = [f"{name} ({groups[name]})" for name in sets]
        width = max(len(row["method"]) for row in rows) + 2
        lines.append("AUROC, per cent".ljust(width) + "".join(head.rjust(len(head) + 3) for head in heads))
        for method in dict.fromkeys(row["method"] for row in rows):
            values = {row["ood"]: row["auroc"] for row in rows if row["method"] == method}
            lines.append(
                method.ljust(max(width, len("AUROC, per cent")))
                + "".join(
                    (f"{values[name]:.1f}" if name in values else "-").rjust(len(head) + 3)
                    for name, head in zip(sets, heads, strict=True)
                )
            )
    for name in ("report.html", "metrics.json", "outliers", "labels.csv"):
        if (folder / name).exists():
            lines.append(f"{folder / name}")
    return "\n".join(lines)
