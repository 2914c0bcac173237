"""Table 4: the outliers themselves as the OOD test set, for ours and for every comparator.

The outliers are those of held-out sources: no network has seen them, nor their sources. The same-class controls stand beside:
a method that calls those OOD too has learnt "was denoised" (about 50 is right). Comparators never saw an outlier of
ours, ours did: the paper's table is unfair in the same way, and says how near such outliers are.
tiny  the embedded data, a few steps; cpu the embedded data; gpu CIFAR-10, unlabelled, on table1's run folders

python -m benchmarks.table4 --size cpu --seeds 0 1 2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.experiment import TINY, Options, Rows, cells, configuration, data_facts, read_options
from benchmarks.paired import Scores, paired_rows
from sdood_plugin.comparison import Comparators
from sdood_plugin.config import RunConfig
from sdood_plugin.context import Context
from sdood_plugin.decision import Detector
from sdood_plugin.metrics import detection_metrics
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.run import run

SIZES = {
    "tiny": ["demo.yml", *TINY, "--compare.methods", "[distance,multi-class]"],
    "cpu": ["demo.yml", "--compare.methods", "[distance,dn2,mscl,multi-class,fake-it]"],
    "gpu": ["cifar10.yml", "cifar10_resnet18_unlabelled.yml", "--compare.methods", "[distance,dn2,mscl,multi-class,fake-it]"],
}
PAPER = {"multi-class": 74.3, "fake-it": 81.4, "sdood": 98.2}


def scores_of_outliers(config: RunConfig, options: Options) -> dict[str, dict[str, Scores]]:
    """By set (outliers, controls), by method: scores of the ID test images and of the set."""
    folder = options.folder(config.seed)
    context = Context(config, folder)
    test = context.test
    assert test is not None, "every size has OOD sets, so there is a test set"
    sets = {name: OutlierSet(folder / name) for name in ("outliers", "controls")}
    heldout = {name: made.images[context.heldout[made.sources]] for name, made in sets.items()}
    images = [test.images, *heldout.values()]
    detector = Detector.load(folder, context.accelerator.device)
    values: dict[str, list[torch.Tensor]] = {"sdood": [detector.score(one) for one in images]}
    for scorer in Comparators(context, folder / "comparators", "").fit(config.compare.methods):
        values |= scorer(images)
    arrays = {method: [one.double().cpu().numpy() for one in scores] for method, scores in values.items()}
    return {
        name: {method: (scores[0], scores[number]) for method, scores in arrays.items()} for number, name in enumerate(sets, 1)
    }


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Finish a run a seed, score its held-out outliers and write results/table4-SIZE.json."""
    options = read_options("table4", __doc__, arguments)
    config = configuration(options, SIZES)
    kept: dict[int, dict[str, dict[str, Scores]]] = {}

    def work(seed: int, _cell: dict[str, Any]) -> Rows:
        own = dataclasses.replace(config, seed=seed)
        run(own, options.folder(seed), "calibrate")
        run(own, options.folder(seed), "train-comparators")
        kept[seed] = scores_of_outliers(own, options)
        return [_row(method, name, *pair) for name, methods in kept[seed].items() for method, pair in methods.items()]

    def facts(seeds: list[int]) -> dict[str, Any]:
        runs = [kept[seed] for seed in seeds if seed in kept]
        return {**data_facts(config, options.folder(seeds[-1])), "published": PAPER, "paired": paired_rows(runs)}

    return cells(options, config, [{}], work, facts)


def _row(method: str, name: str, inside: np.ndarray, outside: np.ndarray) -> dict[str, Any]:
    return {"method": method, "ood": name, **detection_metrics(inside, outside), "n_id": inside.size, "n_ood": outside.size}


if __name__ == "__main__":
    main()
