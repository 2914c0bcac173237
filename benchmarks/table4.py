"""Table 4: the outliers themselves as the OOD test set, for ours and for every comparator.

The outliers are those of held-out sources: no network has seen them, nor their sources. A run chooses alpha on such outliers,
so every other of these sources is the test set here, and alpha and the distance's unit are chosen again without it, on the
held-out images and outliers that remain. The same-class controls stand beside: a method that calls those OOD too has learnt
"was denoised" (about 50 is right). Comparators never saw an outlier of ours, ours did: the paper's table is unfair in the
same way, and says how near such outliers are.
tiny  the embedded data, a few steps; cpu the embedded data; gpu CIFAR-10, unlabelled, on table1's run folders

Every method of `compare.methods` has a row, and every post-hoc one, which trains nothing.

python -m benchmarks.table4 --size cpu --seeds 0 1 2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.experiment import TINY, Options, Rows, begun, cells, configuration, data_facts, read_options
from benchmarks.paired import Scores, add_pairs, read_table
from benchmarks.table1 import NEW
from benchmarks.table1_openood import ALL
from sdood_plugin.artifacts import write_csv
from sdood_plugin.baselines.posthoc import POSTHOC
from sdood_plugin.comparison import Comparators
from sdood_plugin.config import RunConfig
from sdood_plugin.context import Context
from sdood_plugin.decision import Detector
from sdood_plugin.metrics import detection_metrics
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.run import run
from sdood_plugin.scoring.score import fit_score
from sdood_plugin.stage_table import BY_NAME
from sdood_plugin.stages import score_features

SIZES = {
    "tiny": ["demo.yml", *TINY, "--compare.methods", "[distance,multi-class]"],
    "cpu": ["demo.yml", "--compare.methods", ALL],
    "gpu": ["cifar10.yml", "cifar10_resnet18_unlabelled.yml", "--compare.methods", NEW],
}
SETS = ("outliers", "controls")
STAGES = ("calibrate", "train-comparators", "train-exposed")  # what is scored here
PAPER = {"multi-class": 74.3, "fake-it": 81.4, "sdood": 98.2}


def halves(heldout: torch.Tensor, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out images to choose on and to test with: every other one that has outliers is a test source.

    Args:
        heldout: bool (N,), the held-out images.
        sources: int64 (M,), the source of each outlier.

    Returns:
        Two disjoint masks, bool (N,), that together are `heldout`.
    """
    tested = torch.zeros_like(heldout)
    tested[sources[heldout[sources]].unique()[1::2]] = True
    return heldout & ~tested, tested


def detector_chosen_on(images: torch.Tensor, context: Context) -> Detector:
    """The run's detector with alpha and the distance's unit chosen on these held-out images, bool (N,), and their outliers."""
    detector = Detector.load(context.folder, context.accelerator.device)
    given = score_features(context, detector.network, images)
    detector.fitted = fit_score(config=context.config.scoring, **given)
    return detector


def write_scores(config: RunConfig, options: Options) -> None:
    """table4/scores-SET.csv in the run folder, with every method's scores, for the ID test images and the sets tested."""
    folder = options.folder(config.seed)
    context = Context(config, folder)
    sets = [OutlierSet(folder / name) for name in SETS]
    chosen_on, tested = halves(context.heldout, sets[0].sources)
    scorers = Comparators(context, folder / "comparators").fit(list(dict.fromkeys([*config.compare.methods, *POSTHOC])))
    detector = detector_chosen_on(chosen_on, context)
    test = context.test
    assert test is not None, "every size has OOD sets, so there is a test set"
    sets = [made.take(tested[made.sources]) for made in sets]
    names = [test.names, *([row["file"] for row in made.manifest] for made in sets)]
    images = [test.images, *(made.images for made in sets)]
    scores: dict[str, list[torch.Tensor]] = {"sdood": [detector.score(one) for one in images]}
    for scorer in scorers:
        scores |= scorer(images)
    for number, name in enumerate(("id", *SETS)):
        columns = torch.stack([values[number].double().cpu() for values in scores.values()], dim=1).tolist()
        lines = ([path, *row] for path, row in zip(names[number], columns, strict=True))
        write_csv(folder / "table4" / f"scores-{name}.csv", ("path", *scores), lines)


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Finish a run a seed, score its held-out outliers and write results/table4-SIZE.json."""
    options = read_options("table4", __doc__, arguments)
    config = configuration(options, SIZES)

    def written(seed: int) -> dict[str, dict[str, Scores]]:
        return {name: read_table(begun(options, seed) / "table4", name) for name in SETS}

    def work(seed: int, _cell: dict[str, Any]) -> Rows:
        own = dataclasses.replace(config, seed=seed)
        for stage in STAGES:
            if BY_NAME[stage].wanted(own):
                run(own, options.folder(seed), stage)
        write_scores(own, options)
        return [
            {"method": method, "ood": name, **detection_metrics(*pair), "n_id": len(pair[0]), "n_ood": len(pair[1])}
            for name, methods in written(seed).items()
            for method, pair in methods.items()
        ]

    def facts(seeds: list[int]) -> dict[str, Any]:
        train = data_facts(config, options.folder(seeds[-1]))
        tested = {name: len(next(iter(scores.values()))[1]) for name, scores in written(seeds[-1]).items()}
        return {**train, "data": {name: train["data"][name] for name in ("train", "test")} | tested, "published": PAPER}

    rows = cells(options, config, [{}], work, facts)
    seeds = dict.fromkeys(row["seed"] for row in rows)
    scored = [seed for seed in seeds if (begun(options, seed) / "table4" / "scores-id.csv").exists()]
    add_pairs(options.result, [written(seed) for seed in scored], same_ood=False)  # a seed's outliers are its own
    return rows


if __name__ == "__main__":
    main()
