"""Tables 2 and 3: the start step S by the guidance weight w, and the parts of the score by S.

The paper's S of 50 to 200 is ambiguous: read as steps of T = 1000 it is 0.05 to 0.2, read as steps of a schedule of 250 it
is 0.2 to 0.8; both are run. Table 3 (distance, vote, both) is w = 2 of the same runs: `benchmarks.table3` draws it.
tiny  the embedded data, two cells; cpu the embedded data; gpu CIFAR-10, unlabelled

python -m benchmarks.table2 --size cpu --seeds 0 1 2
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.experiment import TINY, Options, Rows, cells, configuration, data_facts, read_options
from sdood_plugin.artifacts import read_json
from sdood_plugin.config import RunConfig
from sdood_plugin.run import run

SIZES = {
    "tiny": ["demo.yml", *TINY],
    "cpu": ["demo.yml", "--detector.epochs", "8"],
    "gpu": ["cifar10.yml", "cifar10_resnet18_unlabelled.yml"],
}
STEPS = (50, 80, 100, 150, 200)
WEIGHTS = (2.0, 3.0, 4.0)
PAPER = {  # Table 3 at w = 2, AUROC in per cent; Table 2 lies between 97.4 and 98.0 everywhere
    "sdood-distance": dict(zip(STEPS, (97.2, 97.5, 97.7, 97.6, 97.3), strict=True)),
    "sdood": dict(zip(STEPS, (97.6, 97.8, 98.0, 97.8, 97.4), strict=True)),
}
READINGS = {"of T = 1000": 1000, "of 250 steps": 250}
METHODS = ("sdood", "sdood-distance", "sdood-vote")


def grid(size: str) -> list[dict[str, Any]]:
    """The cells, w = 2 first so that Table 3 is whole early, and then the reading of S whose outliers keep more."""
    if size == "tiny":
        return [{"reading": "of T = 1000", "paper_steps": 100, "start_fraction": 0.1, "guidance_weight": w} for w in (2.0, 3.0)]
    return [
        {"reading": name, "paper_steps": steps, "start_fraction": steps / of, "guidance_weight": w}
        for w, (name, of), steps in itertools.product(WEIGHTS, READINGS.items(), STEPS)
    ]


def with_cell(config: RunConfig, cell: dict[str, Any]) -> RunConfig:
    """The configuration of one cell: the paper's mode at this S and w, on a diffusion model of all noise levels."""
    outliers = dataclasses.replace(
        config.outliers, mode="other", start_fraction=cell["start_fraction"], guidance_weight=cell["guidance_weight"]
    )
    return dataclasses.replace(config, outliers=outliers)


def settings(options: Options) -> RunConfig:
    """What all cells share; the diffusion model knows every S of the grid."""
    config = configuration(options, SIZES)
    last = max(grid(options.size), key=lambda cell: cell["start_fraction"])
    diffusion = dataclasses.replace(config.diffusion, max_start_fraction=last["start_fraction"])
    outliers = dataclasses.replace(config.outliers, mode="other", start_fraction=last["start_fraction"])
    return dataclasses.replace(config, diffusion=diffusion, outliers=outliers)


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Run the grid a seed in one run folder, where labels, diffusion model and reference are made once."""
    options = read_options("table2", __doc__, arguments)
    return run_cells(options, grid(options.size))


def run_cells(options: Options, wanted: Sequence[dict[str, Any]]) -> Rows:
    """Run those cells of the grid that are missing; all rows of results/table2-SIZE.json."""
    config = settings(options)

    def work(seed: int, cell: dict[str, Any]) -> Rows:
        folder = options.folder(seed)
        own = with_cell(dataclasses.replace(config, seed=seed), cell)
        run(own, folder, "inspect")
        run(own, folder, "evaluate")
        rates = read_json(folder / "inspection" / "quality.json")["outliers"]
        extra = {name: rates[name] for name in ("flip_rate", "stay_rate") if name in rates}
        return [row | extra for row in read_json(folder / "evaluation" / "rows.json") if row["method"] in METHODS]

    return cells(options, config, wanted, work, lambda seeds: data_facts(config, options.folder(seeds[-1])))


if __name__ == "__main__":
    main()
