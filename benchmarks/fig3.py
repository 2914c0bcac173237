"""Fig. 3: the detector's embedding early and late in its training, by t-SNE.

Early is a detector trained for a tenth of the epochs, with a whole learning-rate schedule of its own. The result holds the
points; the figure is drawn from it alone.

python -m benchmarks.fig3 --size cpu --seeds 0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.experiment import TINY, Options, Rows, cells, configuration, data_facts, drawn, read_options
from sdood_plugin.artifacts import read_json, read_tensors
from sdood_plugin.config import RunConfig
from sdood_plugin.data.images import spread
from sdood_plugin.run import run

SIZES = {
    "tiny": ["demo.yml", *TINY],
    "cpu": ["demo.yml"],
    "gpu": ["cifar10.yml", "cifar10_resnet18_unlabelled.yml"],
}
POINTS = 300  # of each kind
COLOURS = {"id": "#2b6cb0", "outliers": "#d69e2e"}


def embedding(config: RunConfig, options: Options) -> Rows:
    """A row a kind (ID test, near OOD, outliers): t-SNE coordinates of its features of unit length."""
    from sklearn.manifold import TSNE

    folder = options.folder(config.seed)
    near = [ood.name for ood in config.data.ood if ood.group == "near"]
    kinds = {
        name: read_tensors(folder / "evaluation" / f"features-{name}.safetensors")["features"].float() for name in ("id", *near)
    }
    kinds["outliers"] = read_tensors(folder / "detector" / "bank.safetensors")["outliers"].float()
    chosen = {name: F.normalize(values[spread(len(values), min(POINTS, len(values)))], dim=1) for name, values in kinds.items()}
    count = sum(map(len, chosen.values()))
    plan = TSNE(random_state=config.seed, perplexity=min(30, count // 4), init="pca")
    points = torch.from_numpy(plan.fit_transform(torch.cat(list(chosen.values())).numpy()))
    parts = points.split([len(values) for values in chosen.values()])
    return [
        {"kind": name, "points": [[round(float(x), 2) for x in point] for point in part]}
        for name, part in zip(chosen, parts, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Train the detector briefly and whole, results/fig3-SIZE.json and figures/fig3-SIZE.png."""
    options = read_options("fig3", __doc__, arguments, seeds=(0,))
    config = configuration(options, SIZES)
    stages = {"early": max(1, config.detector.epochs // 10), "late": config.detector.epochs}

    def work(seed: int, cell: dict[str, Any]) -> Rows:
        detector = dataclasses.replace(config.detector, epochs=cell["epochs"])
        own = dataclasses.replace(config, seed=seed, detector=detector)
        run(own, options.folder(seed), "evaluate")
        return embedding(own, options)

    wanted = [{"training": name, "epochs": epochs} for name, epochs in stages.items()]
    rows = cells(options, config, wanted, work, lambda seeds: data_facts(config, options.folder(seeds[-1])))
    draw(read_json(options.result), options)
    return rows


def draw(result: dict[str, Any], options: Options) -> None:
    """figures/NAME.png: early beside late."""
    rows = [row for row in result["rows"] if row["seed"] == result["seeds"][0]]
    with drawn(options, (8, 4)) as figure:
        for column, training in enumerate(dict.fromkeys(row["training"] for row in rows)):
            axes = figure.add_subplot(1, 2, column + 1)
            for row in rows:
                if row["training"] == training:
                    axes.scatter(
                        *zip(*row["points"], strict=True), s=5, label=row["kind"], color=COLOURS.get(row["kind"], "#c53030")
                    )
                    axes.set_title(f"{training}: {row['epochs']} epochs", fontsize=9)
            axes.set(xticks=[], yticks=[])
        figure.axes[0].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
