"""Which outliers help the detector: kinds, controls and guidance modes, several seeds, a digit left out of ID as the near OOD.

python -m benchmarks.selection --labels given
python -m benchmarks.selection --suffix=-start --parts start       # what weights it starts from, at which learning rates
python -m benchmarks.selection --seeds 0 --renders 1 --epochs 2          # a trial of the script
python -m benchmarks.selection --config configs/cifar10.yml --suffix -cifar10 --labels hidden

The embedded data take `data.demo_left_out`: no test scan is used, so the best variant may become the default. Any other
configuration is scored on its own OOD sets, which tune nothing: such rows say `protocol: test sets`. The clustering, the
diffusion model and a mode's outliers are shared by the variants of a seed. A run that is cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.demo import table
from benchmarks.experiment import data_facts, handed_over, with_given_labels
from benchmarks.record import RESULTS, earlier, mean_and_deviation, write_result
from sdood_plugin.artifacts import read_json
from sdood_plugin.cli import read_config
from sdood_plugin.config import KINDS, ImagesConfig, RunConfig, SelectionConfig, as_dict
from sdood_plugin.errors import RunError
from sdood_plugin.outliers.dataset import OutlierSet
from sdood_plugin.outliers.select import choose, kinds, read_verdicts
from sdood_plugin.run import run

ROOT = Path(__file__).parent.parent
LEFT_OUT = {0: 0, 1: 2, 2: 4}  # seed -> digit; a digit a seed, so that no single one decides
KEEPS = {
    "all": list(KINDS),
    "stay": ["stay"],
    "flip": ["flip"],
    "ambiguous": ["ambiguous"],
    "ambiguous + flip": ["ambiguous", "flip"],
}
MODES = [("other", 2.0), ("other", 0.0), ("blend", 0.0), ("blend-own", 0.0), ("away", 3.0), ("away", 6.0)]
START = 0.2
# ancestral steps, guided where the noise is high only: as many flips as the paper's sampler at its distance to real images
INTERVAL = {"sampler": "ddpm", "sampling_steps": 8, "guidance_interval": [0.13, 1.0]}
STARTS = [("random", 2e-3), (None, 2e-3), (None, 6e-4), (None, 2e-4)]  # weights, null being the clustering's, and learning rate


def variants(base: RunConfig) -> list[dict[str, Any]]:
    """All variants, those that share outliers after each other: first the kinds of the configured set, then the modes."""
    own = {
        "mode": base.outliers.mode,
        "guidance_weight": base.outliers.guidance_weight,
        "start_fraction": base.outliers.start_fraction,
    }
    ours = [{"part": "kinds", **own, "keep": name, "controls": controls} for controls in (True, False) for name in KEEPS]
    none = {"part": "kinds", **own, "keep": "none", "controls": False}
    others = sorted(
        MODES, key=lambda mode: mode != (own["mode"], own["guidance_weight"])
    )  # the one whose outliers are there comes first
    rest = {"start_fraction": START, "keep": "all", "controls": True}
    modes = [{"part": "modes", "mode": mode, "guidance_weight": weight, **rest} for mode, weight in others]
    modes.append({"part": "modes", "mode": "away", "guidance_weight": 6.5, **INTERVAL, **rest})
    starts = [
        {"part": "start", **own, "keep": "all", "controls": True, "weights": weights, "lr": lr}
        for weights, lr in ([] if base.clustering.method == "given" else STARTS)
    ]
    return [none, *ours, *modes, *starts]


def name_of(variant: dict[str, Any]) -> str:
    """A variant in words."""
    if variant["part"] == "modes":
        how = f", {variant['sampler']}, guided above {variant['guidance_interval'][0]:g} T" if "sampler" in variant else ""
        return f"{variant['mode']}, w = {variant['guidance_weight']:g}{how}"
    if variant["part"] == "start":
        return f"{variant['weights'] or 'clustering'}, lr = {variant['lr']:g}"
    return f"{variant['keep']}, {'with' if variant['controls'] else 'no'} controls"


def configured(base: RunConfig, variant: dict[str, Any], seed: int) -> RunConfig:
    """The configuration of one variant and seed."""
    data, clustering = base.data, base.clustering
    if data.train.path == "demo":
        data = dataclasses.replace(data, demo_left_out=LEFT_OUT[seed])
        clustering = dataclasses.replace(clustering, clusters=5)
    how = {name: variant[name] for name in ("mode", "guidance_weight", "start_fraction", *INTERVAL) if name in variant}
    outliers = dataclasses.replace(base.outliers, **how)
    detector = {name: variant[name] for name in ("weights", "lr") if name in variant}
    detector["control_ratio"] = base.detector.control_ratio if variant["controls"] else 0.0
    if variant["keep"] == "none":
        detector["outlier_ratio"] = 0.0
    return dataclasses.replace(
        base,
        seed=seed,
        data=data,
        clustering=clustering,
        outliers=outliers,
        detector=dataclasses.replace(base.detector, **detector),
        selection=SelectionConfig(KEEPS.get(variant["keep"], list(KINDS)), base.selection.flip_confidence),
    )


def run_variant(base: RunConfig, variant: dict[str, Any], seed: int, folder: Path) -> list[dict[str, Any]]:
    """One row an OOD set: the detector's score, with the AUROC of its distance term alone beside it."""
    config = configured(base, variant, seed)
    left = config.data.demo_left_out
    facts = {
        "method": name_of(variant),
        "seed": seed,
        "protocol": "test sets" if left is None else "a digit left out",
        "left_out": left,
        **variant,
    }
    try:
        run(config, folder, "evaluate")
    except RunError as error:  # a kind that the set has none of
        return [{**facts, "skipped": str(error)}]
    verdicts = read_verdicts(OutlierSet(folder / "outliers").manifest, folder)
    found = kinds(verdicts, config.selection.flip_confidence)
    used = 0 if variant["keep"] == "none" else int(choose(verdicts, config.selection).kept.sum())
    facts |= {"outliers_kept": used, "outliers": len(found)}
    facts |= {f"{kind}_rate": 100 * float((found == number).double().mean()) for number, kind in enumerate(KINDS)}
    rows = read_json(folder / "evaluation" / "rows.json")
    distance = {row["ood"]: row["auroc"] for row in rows if row["method"] == "sdood-distance"}
    names = {row["ood"]: "left-out digit" if left is not None and row["group"] == "near" else row["ood"] for row in rows}
    return [
        {**row, **facts, "ood": names[row["ood"]], "auroc_distance": distance[row["ood"]]}
        for row in rows
        if row["method"] == "sdood"
    ]


def ranking(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation of the near AUROC of every variant, and of its difference to the reference's of the same seed.

    The reference is `all, with controls`, or else the first variant.
    """
    near = {(row["method"], row["seed"]): row["auroc"] for row in rows if row.get("group") == "near"}
    methods = list(dict.fromkeys(method for method, _ in near))
    reference = "all, with controls" if "all, with controls" in methods else next(iter(methods), None)
    found = []
    for method in methods:
        seeds = [seed for name, seed in near if name == method]
        mean, deviation = mean_and_deviation([near[method, seed] for seed in seeds])
        shared = [near[method, seed] - near[reference, seed] for seed in seeds if (reference, seed) in near]
        difference = mean_and_deviation(shared) if shared else (None, None)
        found.append({"variant": method, "seeds": len(seeds), "auroc_near": mean, "deviation": deviation,
                      "gain": difference[0], "gain_deviation": difference[1]})  # fmt: skip
    return sorted(found, key=lambda row: -row["auroc_near"])


def main() -> None:
    """Run all variants and write results/selection[-suffix].json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yml")
    parser.add_argument("--labels", choices=["hidden", "given"], default="hidden")
    parser.add_argument("--parts", choices=["kinds", "modes", "start"], nargs="+", default=["kinds", "modes"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(LEFT_OUT))
    parser.add_argument("--epochs", type=int, help="of the detector, in place of the configuration's")
    parser.add_argument("--renders", type=int, help="of the embedded data, in place of the configuration's")
    parser.add_argument("--train", help="training images in place of the configuration's")
    parser.add_argument("--suffix", default="", help="ends the names of run folders and of the result file")
    parser.add_argument("--hand-over", action="store_true", help="go on from the slot before and keep what this one finishes")
    options = parser.parse_args()
    base = dataclasses.replace(read_config(options.config), report=False)
    if options.epochs:
        base = dataclasses.replace(base, detector=dataclasses.replace(base.detector, epochs=options.epochs))
    if options.renders:
        base = dataclasses.replace(base, data=dataclasses.replace(base.data, demo_renders=options.renders))
    if options.train:
        base = dataclasses.replace(base, data=dataclasses.replace(base.data, train=ImagesConfig(options.train)))
    if options.labels == "given":
        base = with_given_labels(base)
    name = f"selection{options.suffix}"
    rows, spent = earlier(RESULTS / f"{name}.json", as_dict(base))
    counts: dict[str, int] = {}
    for seed in options.seeds:
        folder = ROOT / "runs" / "benchmarks" / f"{name}-{seed}"
        images = data_facts(configured(base, variants(base)[0], seed), folder)["data"]  # the left-out digit is the seed's
        counts |= {f"{part}, seed {seed}": count for part, count in images.items()}
        wanted = [one for one in variants(base) if one["part"] in options.parts]
        missing = [one for one in wanted if not any((row["method"], row["seed"]) == (name_of(one), seed) for row in rows)]
        with handed_over(folder, dataclasses.replace(base, seed=seed), None, options.hand_over):
            for variant in missing:
                rows += run_variant(base, variant, seed, folder)
                write_result(
                    name,
                    as_dict(base),
                    sorted({row["seed"] for row in rows}),
                    rows,
                    facts={"data": counts, "labels": options.labels, "ranking": ranking(rows)},
                    spent_s=spent,
                    device=base.device,
                )
    print(table([row for row in rows if "auroc" in row]))
    for row in ranking(rows):
        print(f"{row['variant']:32s} {row['auroc_near']:.2f} +- {row['deviation']:.2f}")


if __name__ == "__main__":
    main()
