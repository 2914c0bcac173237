"""Fig. 3: the detector's embedding early and late in its training, by t-SNE, and how far it holds the kinds apart.

    python -m benchmarks.fig3 --size cpu --start-from demo-hidden        # the runs that benchmarks.demo leaves

Late is a run's detector. Early is the same training after a tenth of its epochs, done again up to there: with the same seed and
batches, and the learning rates of the whole. `loss_gap` is the largest difference of its losses from those the run has
written, 0 where the arithmetic is the same. ID and near OOD are test images, outliers those of held-out sources: the detector was
trained on none of them. `knn_acc` is of the features themselves, not of the figure: of ID images and as many of one other kind,
the share in per cent whose nearest neighbours among both, themselves left out, are mostly of their own kind; 50 is chance.
The result holds the points of all seeds; the figure, of the first, is drawn from it alone.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.experiment import TINY, Options, Rows, cells, configuration, data_facts, drawn, read_options
from sdood_plugin import Detector, stages
from sdood_plugin.artifacts import read_csv, read_json
from sdood_plugin.config import RunConfig
from sdood_plugin.context import Context
from sdood_plugin.data.images import spread
from sdood_plugin.evaluation import read_tests
from sdood_plugin.features import extract
from sdood_plugin.run import run

SIZES = {
    "tiny": ["demo.yml", *TINY],
    "cpu": ["demo.yml"],
    "gpu": ["cifar10.yml", "cifar10_resnet18_unlabelled.yml"],
}
POINTS = 200  # of each kind in the figure
IMAGES = 1000  # of each kind at most, whose neighbours are looked at
NEIGHBOURS = 5
COLOURS = {"id": "#2b6cb0", "outliers": "#d69e2e"}
OOD_COLOURS = ("#c53030", "#805ad5", "#dd6b20", "#744210")


def early_network(made: Context, epochs: int) -> tuple[nn.Module, float]:
    """A finished run's detector as it was after so many epochs, and `loss_gap`."""
    with tempfile.TemporaryDirectory() as name:
        again, given = Path(name), [stages.read_outliers(made, kind, ~made.heldout) for kind in ("outliers", "controls")]
        network = stages.train_network(made, again, "", "detector", *given, stop_after=epochs)
        losses = [
            torch.tensor([float(row["loss"]) for row in read_csv(folder / "loss.csv")])
            for folder in (again, made.folder / "detector")
        ]
    return network, float((losses[0] - losses[1][: len(losses[0])]).abs().max())


def embedding(made: Context, network: nn.Module) -> Rows:
    """A row a kind: t-SNE coordinates of its images' features and, but for ID, how far ID is held apart from it."""
    tests = read_tests(made)
    assert tests is not None, "every size has OOD test sets"
    sets = {name: own.images for name, group, own in zip(tests.names, tests.groups, tests.sets, strict=True) if group != "far"}
    outliers = stages.read_outliers(made, "outliers", made.heldout)
    assert outliers is not None, "every size has outliers"
    sets["outliers"] = outliers.images
    device = made.accelerator.device
    features = {name: extract(network.backbone, some(images, IMAGES), device=device).cpu() for name, images in sets.items()}
    if made.config.scoring.normalise:  # as the score sees them
        features = {name: F.normalize(values) for name, values in features.items()}
    rows = [{"kind": name, "points": points} for name, points in places(features).items()]
    return [row if row["kind"] == "id" else row | told_apart(features["id"], features[row["kind"]]) for row in rows]


def told_apart(inside: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """`knn_acc` of features (N, D) and (M, D), and the `images` of each kind it is of."""
    count = min(len(inside), len(other))
    points = torch.cat([some(inside, count), some(other, count)]).double()
    is_other = torch.arange(2 * count) >= count
    nearest = torch.cdist(points, points).fill_diagonal_(math.inf).topk(NEIGHBOURS, largest=False).indices
    said = is_other[nearest].sum(dim=1) > NEIGHBOURS // 2
    return {"knn_acc": 100 * float((said == is_other).double().mean()), "images": count}


def some(rows: torch.Tensor, count: int) -> torch.Tensor:
    """So many at most, spread evenly over all."""
    return rows[spread(len(rows), min(len(rows), count))]


def places(features: dict[str, torch.Tensor]) -> dict[str, list[list[float]]]:
    """t-SNE of features (N, D) of all kinds together: [x, y] of some images by kind."""
    from sklearn.manifold import TSNE

    shown = {name: some(values, POINTS).numpy() for name, values in features.items()}
    points = np.concatenate(list(shown.values()))
    flat = TSNE(random_state=0, init="pca", perplexity=min(30, len(points) // 4)).fit_transform(points)
    ends = np.cumsum([len(values) for values in shown.values()])[:-1]
    return {name: np.round(part, 2).tolist() for name, part in zip(shown, np.split(flat, ends), strict=True)}


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Look at every seed's detector early and late; results/fig3-SIZE.json and figures/fig3-SIZE.png."""
    options = read_options("fig3", __doc__, arguments)
    config = configuration(options, SIZES)

    def work(seed: int, cell: dict[str, Any]) -> Rows:
        made = finished(dataclasses.replace(config, seed=seed), options)
        if cell["training"] == "late":
            return embedding(made, Detector.load(made.folder, made.accelerator.device).network)
        network, gap = early_network(made, cell["epochs"])
        return [{**row, "loss_gap": gap} for row in embedding(made, network)]

    moments = {"early": max(1, config.detector.epochs // 10), "late": config.detector.epochs}
    wanted = [{"training": name, "epochs": epochs} for name, epochs in moments.items()]
    rows = cells(options, config, wanted, work, lambda seeds: data_facts(config, options.folder(seeds[-1])))
    draw(read_json(options.result), options)
    return rows


def finished(config: RunConfig, options: Options) -> Context:
    """The run of a seed, evaluated: test images decide nothing any more."""
    run(config, options.folder(config.seed), "evaluate")
    return Context(config, options.folder(config.seed))


def draw(result: dict[str, Any], options: Options) -> None:
    """figures/NAME.png: early beside late."""
    rows = [row for row in result["rows"] if row["seed"] == result["seeds"][0]]
    with drawn(options, (9, 4.2)) as figure:
        for axes, training in zip(figure.subplots(1, 2), ("early", "late"), strict=True):
            own = [row for row in rows if row["training"] == training]
            spare = iter(OOD_COLOURS * len(own))
            for row in own:
                label, colour = "ID" if row["kind"] == "id" else row["kind"], COLOURS.get(row["kind"]) or next(spare)
                axes.scatter(*zip(*row["points"], strict=True), s=6, alpha=0.7, label=label, color=colour)
            epochs = own[0]["epochs"]
            axes.set(xticks=[], yticks=[], title=f"after {epochs} epoch{'s' * (epochs > 1)}")
        figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=6, frameon=False, markerscale=2)


if __name__ == "__main__":
    main()
