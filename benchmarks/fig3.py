"""Fig. 3: the detector's embedding early and late in its training, by t-SNE.

Early is a detector trained for a tenth of the epochs, with a whole learning-rate schedule of its own. The result holds the
points; the figure is drawn from it alone, as that of benchmarks.scoring is.

python -m benchmarks.fig3 --size cpu --seeds 0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.experiment import TINY, Options, Rows, cells, configuration, data_facts, drawn, read_options
from benchmarks.scoring import draw_panels, places, some
from sdood_plugin.artifacts import read_json, read_tensors
from sdood_plugin.config import RunConfig
from sdood_plugin.run import run

SIZES = {
    "tiny": ["demo.yml", *TINY],
    "cpu": ["demo.yml"],
    "gpu": ["cifar10.yml", "cifar10_resnet18_unlabelled.yml"],
}


def embedding(config: RunConfig, options: Options) -> Rows:
    """A row a kind (ID test, near OOD, outliers): t-SNE coordinates of the features that the run has kept."""
    folder = options.folder(config.seed)
    near = [ood.name for ood in config.data.ood if ood.group == "near"]
    kinds = {
        name: read_tensors(folder / "evaluation" / f"features-{name}.safetensors")["features"].float() for name in ("id", *near)
    }
    kinds["outliers"] = read_tensors(folder / "detector" / "bank.safetensors")["outliers"].float()
    found = places({name: some(values) for name, values in kinds.items()}, config.scoring.normalise)
    return [{"kind": name, "points": points} for name, points in found.items()]


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
    panels: dict[str, dict[str, Any]] = {}
    for row in rows:
        panel = panels.setdefault(row["training"], {"epochs": row["epochs"], "sets": {}})
        panel["sets"][row["kind"]] = row["points"]
    with drawn(options, (9, 4.2)) as figure:
        draw_panels(figure, list(panels.values()))


if __name__ == "__main__":
    main()
