"""Write benchmarks/README.md from results/*.json and the queue: `python -m benchmarks.readme`."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import table1, table1_openood, table2, table4
from benchmarks.queue import QUEUE
from benchmarks.record import RESULTS, mean_and_deviation
from sdood_plugin.artifacts import read_json, write_text

INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks.readme` from `results/*.json` and `benchmarks/queue.py`. Each file names its command, configuration
hash (of all settings but where the data lie), device, CPU threads, versions, commit, seeds, time, data sets and their counts, and holds
its rows with their mean and deviation; one that older code made says so here, with what it lacks. Rates and areas are in per cent,
mean +- sample standard deviation over seeds. Differences are ours minus theirs on the same test images, mean +- deviation over seeds,
with a 95 % interval by bootstrap over those images, which knows nothing of the seeds: `ahead` and `behind` are said only where the
interval leaves out 0 and three seeds or more stand behind it. Test images choose nothing: a test holds that a table script cannot reach
them before the score is fixed. Names ending in `-cosine` are a comparator's score on features of unit length, which its paper does not use.
"""
OURS = {"DN2": "dn2", "MSCL": "mscl", "Multi-class AD": "multi-class", "Fake-it": "fake-it", "Ours": "sdood"}
COLUMNS = (("cifar100",), ("svhn",), ("lsun-resize", "lsun-fix"))
FIGURES = ("triplets", "histograms", "noise-levels")  # a result's, beside the one of its own name
NOT_YET = "not yet"
ROOT = Path(__file__).parent.parent
CLAIM_SEEDS = 3  # fewer say neither ahead nor behind


def main() -> None:
    """Write README.md beside this file."""
    results = {path.stem: read_json(path) for path in sorted(RESULTS.glob("*.json"))}
    parts = [INTRODUCTION, published_beside_ours(results), *(section(name, result) for name, result in results.items()), queue()]
    write_text(Path(__file__).parent / "README.md", "\n".join(parts))


def published_beside_ours(results: dict[str, Any]) -> str:
    """The paper's Tables 1, 3 and 4, ours beside each number where there is one."""
    lines = []
    for method, backbone, *numbers in table1.PAPER:
        result = results.get("table1-gpu", {}) if backbone == "ViT-B/16" else {}
        lines.append([method, backbone, *_beside(numbers, result, OURS.get(method, ""))])
    for method, name in OURS.items():  # the paper's ResNet-18 of these has seen ImageNet, so it has no row of this kind
        own = results.get("table1-gpu-resnet18", {})
        lines.append([method, "ResNet-18, SimCLR on CIFAR-10", *_beside([None] * len(COLUMNS), own, name)])
    text = ["## The paper's tables", "", "Table 1, unlabelled CIFAR-10, AUROC, published: ours.", ""]
    text.append(_markdown(["method", "backbone", "CIFAR-100", "SVHN", "LSUN (resize / fix)"], lines))
    rows = [
        [
            f"S = {steps}",
            *(f"{table2.PAPER[name][steps]}: {_steps(results.get('table2-gpu', {}), steps, name)}" for name in table2.PAPER),
        ]
        for steps in table2.STEPS
    ]
    text += [
        "",
        "Table 3, against CIFAR-100 at w = 2, published: ours at S / 1000 (Table 2 of the paper lies between 97.4 and 98.0).",
        "",
    ]
    text.append(_markdown(["", "distance", "distance + vote"], rows))
    result = results.get("table4-gpu", {})
    rows = [[name, f"{number}: {_cell(result, ood='outliers', method=name)}"] for name, number in table4.PAPER.items()]
    text += ["", "Table 4, our outliers as the OOD test set, published: ours.", "", _markdown(["method", "AUROC"], rows), ""]
    text += [openood_beside_ours(results.get("table1_openood-gpu", {})), ""]
    return "\n".join(text)


def openood_beside_ours(result: dict[str, Any]) -> str:
    """OpenOOD's protocol, of which the paper has nothing: the leaderboard's means beside ours over both near sets."""
    methods = {"MSP": "msp", "KNN": "knn", "ViM": "vim"}
    lines = [
        [name, f"{near}: {_near(result, methods.get(name, ''))}", str(far)] for name, near, far in table1_openood.LEADERBOARD
    ]
    lines.append(["sdood", f"-: {_near(result, 'sdood')}", "-"])
    words = (
        "OpenOOD's protocol (labelled CIFAR-10, official lists, ResNet-18 from scratch), AUROC, published: ours. The paper has no numbers "
        "under it; the published ones are of OpenOOD's v1.5 leaderboard. Our far sets, as many as are here, stand in table1_openood-gpu's section."
    )
    return f"{words}\n\n" + _markdown(["method", "mean near", "mean far"], lines)


def _near(result: dict[str, Any], method: str) -> str:
    """The mean over the near sets by seed, then over seeds; `not yet` unless all are there."""
    names = [name for name, group in table1_openood.NAMES if group == "near"]
    own = [row for row in result.get("rows", []) if row["method"] == method]
    found = [{row["ood"]: row for row in own if row["seed"] == seed} for seed in result.get("seeds", [])]
    means = [{"auroc": fmean(by[name]["auroc"] for name in names)} for by in found if by.keys() >= set(names)]
    return _spread(means, "auroc") if means else NOT_YET


def _beside(numbers: Sequence[float | None], result: dict[str, Any], method: str) -> list[str]:
    ours = [" / ".join(_cell(result, ood=name, method=method) for name in names) for names in COLUMNS]
    return [f"{'-' if number is None else number}: {own}" for number, own in zip(numbers, ours, strict=True)]


def _cell(result: dict[str, Any], **wanted: str) -> str:
    rows = [row for row in result.get("rows", []) if all(row.get(name) == value for name, value in wanted.items())]
    return _spread(rows, "auroc") if rows else NOT_YET


def _steps(result: dict[str, Any], steps: int, method: str) -> str:
    rows = [row for row in result.get("rows", []) if row["guidance_weight"] == 2 and row["start_fraction"] == steps / 1000]
    return _cell({"rows": rows}, ood="cifar100", method=method)


def section(name: str, result: dict[str, Any]) -> str:
    """One result: where it comes from, its table, its paired differences, its figures."""
    figures = sorted((RESULTS.parent / "figures").glob(f"{name}*.png"))
    shown = (name, *(f"{name}-{ending}" for ending in FIGURES))
    pictures = [f"![{path.stem}](figures/{path.name})" for path in figures if path.stem in shown]
    counts = ", ".join(f"{key} {value}" for key, value in result.get("data", {}).items())
    head = [
        f"## {name}\n",
        f"`{result['command']}`  ",
        f"{result['device']}, torch {result['versions'].get('torch')}, seeds {result['seeds']}, {result['wall_s'] / 60:.0f} minutes"
        + (f"  \nimages: {counts}" if counts else "")
        + (f"  \nabsent: {', '.join(result['absent'])}" if result.get("absent") else ""),
        *([f"\n{result['note']}"] if "note" in result else []),
        *([f"\n{said}"] if (said := shortcomings(result)) else []),
    ]
    body = [
        *pictures,
        table(result["rows"]),
        decisions(result["rows"]),
        told_apart(result["rows"]),
        by_class(result.get("by_class", [])),
        *([chosen(result["chosen_settings"])] if result.get("chosen_settings") else []),
        *([savings(result["savings"])] if result.get("savings") else []),
        *([paired(result["paired"])] if result.get("paired") else []),
    ]
    return "\n".join([*head, *(f"\n{part}" for part in body if part), ""])


def decisions(rows: Sequence[dict[str, Any]]) -> str:
    """What the chosen threshold calls OOD, where that is recorded."""
    told = [row for row in rows if "called_ood" in row]
    if not told:
        return ""
    first = [row["called_id"] for row in told if row["ood"] == told[0]["ood"]]
    shares = {"ID": first} | {
        name: [row["called_ood"] for row in told if row["ood"] == name] for name in dict.fromkeys(row["ood"] for row in told)
    }
    said = ", ".join("{} {:.1f} +- {:.1f}".format(name, *mean_and_deviation(values)) for name, values in shares.items())
    return f"`sdood` calls OOD, at the threshold chosen on held-out images, in per cent: {said}."


def told_apart(rows: Sequence[dict[str, Any]]) -> str:
    """How far neighbours hold ID and each other kind apart early and late in a training, where that is recorded."""
    told = [row for row in rows if "knn_acc" in row]
    cells = {
        (moment, kind): [row["knn_acc"] for row in told if (row["training"], row["kind"]) == (moment, kind)]
        for moment, kind in dict.fromkeys((row["training"], row["kind"]) for row in told)
    }
    said = ["{}, {} {:.1f} +- {:.1f}".format(*names, *mean_and_deviation(values)) for names, values in cells.items()]
    return f"Images whose neighbours are of their own kind, ID against another, in per cent: {'; '.join(said)}." if said else ""


def by_class(rows: Sequence[dict[str, Any]], method: str = "both") -> str:
    """AUROC of each OOD set against the ID test images of one true class, where that is recorded."""
    own = [row for row in rows if row["method"] == method]
    if not own:
        return ""
    sets = list(dict.fromkeys(row["ood"] for row in own))
    counts = {row["id_class"]: row["n_id"] for row in own}
    lines = []
    for label, count in sorted(counts.items()):
        cells = [[row for row in own if (row["id_class"], row["ood"]) == (label, name)] for name in sets]
        lines.append([str(label), str(count), *(_spread(cell, "auroc") for cell in cells)])
    return f"AUROC of `{method}` against the ID test images of one class\n\n" + _markdown(["class", "ID images", *sets], lines)


def chosen(rows: Sequence[dict[str, Any]]) -> str:
    """The settings of sampling_speed that were chosen once for all seeds, by baseline."""
    lines = [
        [
            row["baseline"],
            row["method"],
            _times(row),
            f"{row['flips_above']:+.1f}",
            f"{row['fd_above_percent']:+.1f}",
            row["equal"],
        ]
        if "ratio" in row
        else [row["baseline"], row["method"], *["-"] * 4]
        for row in rows
    ]
    columns = [
        "baseline",
        "chosen",
        "times as fast",
        "flips above, points",
        "Frechet distance above, %",
        "halves on which it is equal",
    ]
    words = "Chosen once, on the choosing halves of all seeds; measured on the other halves"
    return f"{words}\n\n" + _markdown(columns, lines)


def savings(rows: Sequence[dict[str, Any]]) -> str:
    """What each saving of sampling_speed gives alone."""
    lines = [[row["saving"], _times(row) if "ratio" in row else row["said"], row.get("where", "-")] for row in rows]
    return "What each saving gives alone\n\n" + _markdown(["saving", "times as fast", "where"], lines)


def _times(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.3g} +- {row['ratio_std']:.2g}"


def shortcomings(result: dict[str, Any]) -> str:
    """What a file that older code made lacks; empty for the others."""
    wanted = {"threads": "the threads of the command", "data": "image counts", "summary": "means over seeds"}
    absent = [words for name, words in wanted.items() if name not in result]
    said = ["older code: its command may differ"] if is_older(result.get("commit")) else []
    return "; ".join([*said, *([f"not recorded: {', '.join(absent)}"] if absent else [])])


def is_older(commit: str | None) -> bool:
    """Whether a commit is not what this checkout goes back to: changed files, or another history; False where git cannot say."""
    if commit is None or not (ROOT / ".git").exists():
        return False
    asked = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor", commit, "HEAD"]
    return subprocess.run(asked, capture_output=True).returncode != 0  # git knows no `...-dirty`


def paired(rows: Sequence[dict[str, Any]]) -> str:
    """Ours minus each comparator, by OOD set."""
    sets = list(dict.fromkeys(row["ood"] for row in rows))
    by = {(row["method"], row["ood"]): row for row in rows}
    lines = [
        [method, *(_difference(by[method, name]) if (method, name) in by else "-" for name in sets)]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    runs, ours = rows[0]["n_runs"], rows[0]["ours"]
    words = f"mean of {runs} seeds +- deviation over them" if runs > 1 else "one seed"
    return f"AUROC of `{ours}` minus theirs, {words} (95 % interval)\n\n" + _markdown(["method", *sets], lines)


def _difference(row: dict[str, Any]) -> str:
    verdict = " ahead" if row["low"] > 0 else " behind" if row["high"] < 0 else ""
    deviation = f" +- {row['spread']:.1f}" if row["n_runs"] > 1 else ""
    interval = f"({row['low']:+.1f} to {row['high']:+.1f})"
    return f"{row['difference']:+.1f}{deviation} {interval}" + (verdict if row["n_runs"] >= CLAIM_SEEDS else "")


def queue() -> str:
    """What a GPU has yet to run, in order."""
    lines = [
        [str(number), item.name, "done" if item.done() else NOT_YET, str(item.minutes), item.needs, f"`{item.command}`"]
        for number, item in enumerate(QUEUE, 1)
    ]
    words = (
        "## The GPU queue\n\nIn this order, a slot of ten minutes each; minutes are estimates until one has run. "
        "`python -m benchmarks.queue --next --minutes 10` prints the next one.\n\n"
    )
    return words + _markdown(["", "what", "state", "minutes", "needs", "command"], lines) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: AUROC by method and OOD set where rows have them, else the rows as they are; then what was skipped."""
    skipped, rows = [row for row in rows if "skipped" in row], [row for row in rows if "skipped" not in row]
    if skipped:
        reasons = [f"- {row.get('method') or row.get('ood')}: {row['skipped']}" for row in skipped]
        return "\n".join([table(rows), "", "Not run:", "", *reasons])
    if not rows:
        return "no rows"
    if "guidance_weight" in rows[0] and "method" in rows[0]:
        return _grid(rows)
    if not {"method", "ood", "auroc"} <= rows[0].keys():
        names = list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, (list, dict))))
        return _markdown(names, [[_number(row.get(name, "")) for name in names] for row in rows])
    sets = list(dict.fromkeys(row["ood"] for row in rows))
    lines: list[list[str]] = []
    rate, words = ("fpr95", "ID") if "fpr95" in rows[0] else ("fpr95_ood_positive", "OOD")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [[row for row in rows if row["method"] == method and row["ood"] == name] for name in sets]
        lines.append([method, *(f"{_spread(cell, 'auroc')} ({_spread(cell, rate)})" if cell else "-" for cell in cells)])
    return f"AUROC (FPR@95, {words} positive)\n\n" + _markdown(["method", *sets], lines)


def _grid(rows: list[dict[str, Any]]) -> str:
    """AUROC by S and w, method and near OOD set."""
    near = [row for row in rows if row.get("group") == "near"]
    cells = sorted({(row["start_fraction"], row["guidance_weight"]) for row in near})
    columns = list(dict.fromkeys((row["method"], row["ood"]) for row in near))
    lines = []
    for start, weight in cells:
        own = [row for row in near if (row["start_fraction"], row["guidance_weight"]) == (start, weight)]
        rates = [_spread(own, name) if all(name in row for row in own) else "-" for name in ("flip_rate", "stay_rate")]
        found = [_spread([row for row in own if (row["method"], row["ood"]) == column], "auroc") for column in columns]
        lines.append([f"{start:g}", f"{weight:g}", *rates, *found])
    return "AUROC\n\n" + _markdown(
        ["S / T", "w", "flip rate", "stay rate", *(f"{method}, {ood}" for method, ood in columns)], lines
    )


def _spread(rows: list[dict[str, Any]], name: str) -> str:
    if not rows:
        return "-"
    mean, deviation = mean_and_deviation([row[name] for row in rows])
    return f"{mean:.1f} +- {deviation:.1f}" if len(rows) > 1 else f"{mean:.1f}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *lines]])


if __name__ == "__main__":
    main()
