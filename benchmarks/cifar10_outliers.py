"""The diffusion job on CIFAR-10: a U-Net, 50,000 outliers and 50,000 same-class controls, and what they are like.

The labels are the true ones and the judge is a ResNet-18 trained on real images alone. The result has a row for each set
(flip and stay rates, distances to the training images) and one for each noise level of the held-out loss; beside it come the
figures of the triplets and of that loss. `--until STAGE` ends a slot; what it finished is handed over to the next.
tiny  the embedded data, a few steps of everything: shows that the script runs
cpu   4,000 real images and a small U-Net trained for minutes
gpu   configs/cifar10_diffusion_small.yml

python -m benchmarks.cifar10_outliers --size gpu --seeds 0 --until train-diffusion
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiment import TINY, Options, Rows, cells, configuration, data_facts, read_options
from sdood_plugin.artifacts import atomic_path, read_csv, read_json
from sdood_plugin.config import OutliersConfig
from sdood_plugin.report.figures import noise_levels, triplets
from sdood_plugin.run import run

SIZES = {
    "tiny": ["demo.yml", *TINY, "--clustering.method", "given"],
    "cpu": """cifar10_diffusion_small.yml --data.train.limit 4000 --diffusion.size demo --diffusion.steps 500
        --diffusion.batch_size 64 --diffusion.lr 0.001 --diffusion.ema_decay 0.99 --diffusion.compile false
        --outliers.batch_size 100 --detector.backbone small_cnn --detector.epochs 8 --detector.optimizer adamw
        --detector.lr 0.002""".split(),
    "gpu": ["cifar10_diffusion_small.yml"],
}
SETS = ("outliers", "controls")
DISTANCES = ("fid", "fd", "kid", "kd", "precision", "recall")


def measured(folder: Path, outliers: OutliersConfig) -> Rows:
    """A row for each set and each noise level; none before the set is inspected."""
    if not (folder / "stages" / "inspect.json").exists():
        return []
    quality = read_json(folder / "inspection" / "quality.json")
    rows: Rows = []
    for name in SETS:
        mode = outliers.mode if name == "outliers" else "same"
        figures = {key: value for key, value in quality[name].items() if isinstance(value, (int, float))}
        distances = {key: value for key, value in quality[name]["fidelity"].items() if key in ("features", *DISTANCES)}
        rows.append({"part": "set", "set": name, "mode": mode, "start_fraction": outliers.start_fraction, **figures, **distances})
    levels = read_csv(folder / "diffusion" / "loss-by-noise.csv")
    return rows + [{"part": "noise level", **{key: float(value) for key, value in level.items()}} for level in levels]


def draw(folder: Path, options: Options) -> None:
    """figures/NAME-triplets.png and figures/NAME-noise-levels.png, as far as there is anything to draw."""
    for words, figure in (("triplets", triplets(folder)), ("noise-levels", noise_levels(folder))):
        if figure is not None:
            with atomic_path(options.results.parent / "figures" / f"{options.name}-{words}.png") as temporary:
                figure.savefig(temporary, bbox_inches="tight", dpi=130)


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Run up to a stage, draw what there is and write results/cifar10_outliers-SIZE.json."""
    options = read_options("cifar10_outliers", __doc__, arguments, seeds=(0,))
    config, last = configuration(options, SIZES), options.folder(options.seeds[-1])

    def work(seed: int, _cell: dict[str, Any]) -> Rows:
        run(dataclasses.replace(config, seed=seed), options.folder(seed), options.until or "inspect")
        draw(options.folder(seed), options)
        return measured(options.folder(seed), config.outliers)

    def facts(_seeds: list[int]) -> dict[str, Any]:
        seconds = {record.stem: read_json(record)["seconds"] for record in (last / "stages").glob("*.json")}
        return {**data_facts(config, last), "stage_seconds": seconds}  # of the slots that finished them

    return cells(options, config, [{}], work, facts)


if __name__ == "__main__":
    main()
