"""Figures of a run folder, drawn from its files alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..artifacts import atomic_path, read_csv, read_json, read_tensors
from .clustering import LOSSES, cluster_grid, label_figure

matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130})
ID_COLOUR, OOD_COLOURS, OUTLIER_COLOUR = "#2b6cb0", ("#c53030", "#dd6b20", "#805ad5", "#b83280", "#744210"), "#d69e2e"
TSNE_POINTS = 400  # of each kind


def draw_all(folder: Path) -> dict[str, Path]:
    """Draw every figure whose data the run folder holds; name -> file below figures/."""
    drawers: dict[str, Callable[[Path], Figure | None]] = {
        "triplets": triplets,
        **{f"grid-{name}": partial(grid, name=name) for name in ("class-pair", "start_fraction", "guidance_weight")},
        "labels": label_figure,
        "clusters": cluster_grid,
        "scores": score_histogram,
        "tsne": tsne,
        "losses": losses,
        "noise-levels": noise_levels,
    }
    made = {}
    for name, draw in drawers.items():
        figure = draw(folder)
        if figure is not None:
            path = folder / "figures" / f"{name}.png"
            with atomic_path(path) as temporary:
                figure.savefig(temporary, bbox_inches="tight")
            made[name] = path
    return made


def triplets(folder: Path) -> Figure | None:
    """Source above its same-class control above its outlier, a column each, with what the reference network sees."""
    path = folder / "inspection" / "triplets.safetensors"
    if not path.exists():
        return None
    data = read_tensors(path)
    rows = [
        (name, data[name].permute(0, 2, 3, 1).numpy(), data[f"{name}_said"].tolist())
        for name in ("source", "control", "outlier")
        if name in data
    ]
    count = len(rows[0][1])
    figure = Figure(figsize=(0.75 * count + 1, 0.95 * len(rows)))
    for line, (name, images, said) in enumerate(rows):
        for column in range(count):
            axes = figure.add_subplot(len(rows), count, line * count + column + 1)
            axes.imshow(images[column], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"seen as {said[column]}", fontsize=6, labelpad=1)
            if column == 0:
                axes.set_ylabel(name, fontsize=9)
    figure.subplots_adjust(hspace=0.3, wspace=0.05)
    return figure


def grid(folder: Path, name: str) -> Figure | None:
    """One of the grids that the inspection chose: outliers under the names of their columns, rows named at the left."""
    path = folder / "inspection" / "grids.json"
    if not path.exists():
        return None
    names = read_json(path)[name]
    images = read_tensors(path.with_suffix(".safetensors"))[name].permute(0, 1, 3, 4, 2).numpy()
    lines, count = images.shape[:2]
    figure = Figure(figsize=(0.75 * count + 1, 0.8 * lines + 0.3))
    for line, axes in enumerate(np.atleast_2d(figure.subplots(lines, count, squeeze=False))):
        for column, cell in enumerate(axes):
            cell.imshow(images[line, column], interpolation="nearest")
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
            if line == 0:
                cell.set_title(names["columns"][column], fontsize=7)
        axes[0].set_ylabel(names["rows"][line], fontsize=7)
    figure.subplots_adjust(hspace=0.06, wspace=0.06)
    if names.get("note"):
        figure.supxlabel(names["note"], fontsize=8)
    return figure


def scores_of_tests(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The scores that the evaluation wrote of each test set, in-distribution images first."""
    files = sorted((folder / "evaluation").glob("scores-*.csv"), key=lambda path: path.name != "scores-id.csv")
    return {path.stem.removeprefix("scores-"): read_csv(path) for path in files}


def score_histogram(folder: Path) -> Figure | None:
    """The score of every test image (of held-out ones where there are no test sets), and the threshold."""
    scores = {name: np.array([float(row["score"]) for row in rows]) for name, rows in scores_of_tests(folder).items()}
    if not scores and (folder / "detector" / "heldout.csv").exists():
        rows = read_csv(folder / "detector" / "heldout.csv")
        for kind in dict.fromkeys(row["set"] for row in rows):
            scores[f"held-out {kind}"] = np.array([float(row["score"]) for row in rows if row["set"] == kind])
    if not scores or not (folder / "detector" / "score.json").exists():
        return None
    threshold = read_json(folder / "detector" / "score.json")["calibration"]["threshold"]
    everything = np.concatenate(list(scores.values()))
    positive = max(float(np.percentile(everything, 0.2)), 1e-4)
    bins = np.geomspace(positive, max(float(everything.max()), 2 * positive), 50)
    figure = Figure(figsize=(6.5, 3))
    axes = figure.add_subplot()
    for (name, values), colour in zip(scores.items(), (ID_COLOUR, *OOD_COLOURS * math.ceil(len(scores) / 5)), strict=False):
        axes.hist(
            np.clip(values, positive, None),
            bins=bins.tolist(),
            density=False,
            weights=np.full(len(values), 100 / len(values)),
            alpha=0.55,
            label="ID" if name == "id" else name,
            color=colour,
        )
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="threshold")
    axes.set(xscale="log", xlabel="score (larger = more OOD)", ylabel="% of the set's images")
    axes.legend(frameon=False)
    return figure


def tsne(folder: Path) -> Figure | None:
    """t-SNE of the detector's features: ID test (training where there are no test sets), outliers and the near OOD sets."""
    if not (folder / "detector" / "score.json").exists():
        return None
    paths = sorted((folder / "evaluation").glob("features-*.safetensors"))
    from sklearn.manifold import TSNE

    groups = {"id": "id", **{ood["name"]: ood["group"] for ood in read_json_config(folder)}}
    sets = {path.stem.removeprefix("features-"): read_tensors(path)["features"].float().numpy() for path in paths}
    sets = {name: values for name, values in sets.items() if groups.get(name) in ("id", "near")}
    score = read_json(folder / "detector" / "score.json")
    if score["config"]["normalise"]:
        sets = {name: values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12) for name, values in sets.items()}
    bank = read_tensors(folder / "detector" / "bank.safetensors")
    sets = sets or {"id": bank["inside"].numpy()}
    sets["outliers"] = bank["outliers"].numpy()
    chosen = {
        name: values[np.arange(min(len(values), TSNE_POINTS)) * len(values) // min(len(values), TSNE_POINTS)]
        for name, values in sets.items()
        if len(values)
    }
    points = np.concatenate(list(chosen.values()))
    if len(points) < 20:
        return None
    places = TSNE(random_state=0, init="pca", perplexity=min(30, len(points) // 4)).fit_transform(points)
    colours = {"id": ID_COLOUR, "outliers": OUTLIER_COLOUR}
    spare = iter(OOD_COLOURS * len(chosen))
    figure = Figure(figsize=(5.5, 4.5))
    axes = figure.add_subplot()
    start = 0
    for name, values in chosen.items():
        here = places[start : start + len(values)]
        axes.scatter(
            here[:, 0], here[:, 1], s=6, alpha=0.7, label="ID" if name == "id" else name, color=colours.get(name) or next(spare)
        )
        start += len(values)
    axes.set(xticks=[], yticks=[])
    axes.legend(frameon=False, markerscale=2)
    return figure


def read_json_config(folder: Path) -> list[dict[str, str]]:
    """The OOD sets of a run folder's configuration."""
    import yaml

    return yaml.safe_load((folder / "config.yaml").read_text())["data"]["ood"]


def losses(folder: Path) -> Figure | None:
    """Training losses, smoothed over a fiftieth of the steps."""
    sources = {
        **LOSSES,
        "diffusion": "diffusion/loss.csv",
        "reference": "reference/loss.csv",
        "detector": "detector/loss.csv",
    }
    present = {name: read_csv(folder / file) for name, file in sources.items() if (folder / file).exists()}
    present = {name: rows for name, rows in present.items() if rows}
    if not present:
        return None
    figure = Figure(figsize=(2.3 * len(present), 2.1))
    for axes, (name, rows) in zip(np.atleast_1d(figure.subplots(1, len(present))), present.items(), strict=True):
        for column in (column for column in rows[0] if column != "step"):
            values = np.array([float(row[column]) for row in rows])
            window = max(1, len(values) // 50)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axes.plot(np.arange(len(smooth)) + window - 1, smooth, linewidth=1, label=column)
        axes.set(title=name, xlabel="step")
        if len(rows[0]) > 2:
            axes.legend(frameon=False, fontsize=6)
    figure.tight_layout()
    return figure


def noise_levels(folder: Path) -> Figure | None:
    """The diffusion loss on held-out images by noise level: where the model is still bad."""
    path = folder / "diffusion" / "loss-by-noise.csv"
    if not path.exists():
        return None
    rows = read_csv(path)
    figure = Figure(figsize=(4, 2.2))
    axes = figure.add_subplot()
    axes.plot(
        [float(row["noise"]) for row in rows], [float(row["loss"]) for row in rows], marker="o", markersize=3, color=ID_COLOUR
    )
    axes.set(xlabel="noise level sqrt(1 - abar)", ylabel="held-out loss", yscale="log")
    return figure
