"""What a GPU should run, in order: `python -m benchmarks.queue --next --minutes 10` prints the next item that fits.

An item is done when its result has rows of all its seeds, methods, sizes and cells or, for a training, when the weights that it ends
with were handed over; it is printed only when the items that it goes on from are done. Minutes are estimates for one modern
GPU (the first measured time replaces the guess); an item that takes more than a slot of ten comes next again until it is
whole, and goes on from its last checkpoint, comparator or cell. End a slot with `timeout -s INT 540 COMMAND`: what is
finished is packed below results/handover/ in the minute that is left. Features are computed in float32; on a GPU
`export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1` should make a transformer's several times as fast, and the exact search allows
for the rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    cifar10_outliers,
    diffusion_cost,
    neighbours_speed,
    outlier_quality,
    real_vit_tiny,
    sampling_speed,
    selection,
    table2,
)
from benchmarks.experiment import with_given_labels
from benchmarks.record import RESULTS
from sdood_plugin.artifacts import read_json
from sdood_plugin.config import RunConfig

CIFAR10, CIFAR100, TIN, VIT_B, VIT_TINY = "CIFAR-10", "CIFAR-100 test", "Tiny-ImageNet val", "ViT-B/16 (21k)", "ViT-Tiny"
TREE = f"{CIFAR10}, {CIFAR100}, {TIN} in OpenOOD's tree below data/"
Rows = tuple[Mapping[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Item:
    """One slot's work.

    Attributes:
        name: Short, unique.
        command: From the repository root.
        minutes: Expected on one modern GPU.
        needs: On disk, beside the repository.
        result: File below benchmarks/results/ that says whether it is done.
        rows: Columns of rows that the result must have, a mapping for each.
        file: File of the run folder that the result, a handover, must list.
        after: Names of the items that must be done before.
    """

    name: str
    command: str
    minutes: int
    needs: str
    result: str
    rows: Rows = ()
    file: str = ""
    after: tuple[str, ...] = ()

    def done(self, results: Path = RESULTS) -> bool:
        """Whether the result is there and whole."""
        path = results / self.result
        if not path.exists():
            return False
        result = read_json(path)
        if self.file:
            return self.file in result["files"]
        return all(any(wanted.items() <= row.items() for row in result["rows"]) for wanted in self.rows)


@dataclasses.dataclass(frozen=True)
class Step:
    """One slot of a table's run.

    Attributes:
        name: Stage or, where `file` is a comparator's, comparator.
        minutes: Expected on one modern GPU.
        file: File of the run folder that is there when it is done; empty where rows say so.
        rows: Columns of rows that the result then has for the seed, a mapping for each.
    """

    name: str
    minutes: int
    file: str = ""
    rows: Rows = ()

    @property
    def words(self) -> str:
        """What it adds to the table's command line."""
        return f"--method {self.name}" if self.file.startswith("comparators/") else f"--until {self.name}"


def _staged(name: str, table: str, words: str, seed: int, needs: str, steps: Sequence[Step], after: str = "") -> list[Item]:
    """A table's run of one seed, a slot a step, each after the one before and the first after another item, if any."""
    script = table.split("-gpu")[0]
    items: list[Item] = []
    for step in steps:
        command = f"python -m benchmarks.{script} --size gpu {words} --seeds {seed} {step.words}"
        result = f"handover/{table}-{seed}.json" if step.file else f"{table}.json"
        rows = tuple({"seed": seed, **row} for row in step.rows)
        before = (items[-1].name,) if items else (after,) if after else ()
        items.append(Item(f"{name} {step.name} {seed}", command, step.minutes, needs, result, rows, step.file, before))
    return items


def _methods(*names: str) -> Rows:
    return tuple({"method": name} for name in names)


CLUSTER = Step("cluster", 10, "stages/cluster.json")
DIFFUSION = Step("train-diffusion", 10, "stages/train-diffusion.json")
REFERENCE = Step("train-reference", 7, "stages/train-reference.json")
GENERATE = Step("generate", 6, "stages/generate.json")
DETECTOR = Step("train-detector", 10, "stages/train-detector.json")
EVALUATE = Step("evaluate", 4, rows=_methods("sdood"))
NETWORKS = [  # trained comparators; those left out train nothing
    Step("mscl", 10, "comparators/mscl/backbone.safetensors"),
    Step("multi-class", 10, "comparators/multi-class/network.safetensors"),
    Step("fake-it", 10, "comparators/fake-it/network.safetensors"),
]
PRETEXT = Step("dn2", 10, "comparators/pretext/pretext.safetensors")  # SimCLR, which the others of its protocol start from
NOISE = Step("oe-noise", 10, "comparators/oe-noise/network.safetensors")
NEW = ("distance", "dn2", "mscl", "multi-class", "fake-it")
POSTHOC = ("msp", "energy", "knn", "mahalanobis", "vim")
HIDDEN = [CLUSTER, DIFFUSION, REFERENCE, GENERATE, DETECTOR, EVALUATE, *NETWORKS, Step("compare", 4, rows=_methods(*NEW))]
OWN = [REFERENCE, GENERATE, DETECTOR, EVALUATE, *NETWORKS, Step("compare", 6, rows=_methods(*NEW))]
GIVEN = [DIFFUSION, REFERENCE, GENERATE, DETECTOR, EVALUATE, PRETEXT, NOISE, *NETWORKS,
         Step("compare", 6, rows=_methods(*NEW, *POSTHOC, "oe-noise"))]  # fmt: skip
PAIR = "--config configs/cifar10_resnet18_unlabelled.yml --clustering.pretext_steps 15000 --diffusion.steps 10000"
VIT = PAIR.replace("cifar10_resnet18_unlabelled", "cifar10_vit_b16") + " --detector.epochs 8 --start-from table1-gpu-resnet18"
TINY_VIT = PAIR.replace("cifar10_resnet18_unlabelled", "cifar10_vit_tiny") + " --start-from table1-gpu-resnet18"
SHARED = f"{PAIR} --start-from table1-gpu-resnet18"
OPENOOD = "--clustering.pretext_steps 15000 --diffusion.steps 10000"
FIRST = "unlabelled ResNet-18:"


def _tables(seed: int) -> tuple[list[Item], list[Item], list[Item]]:
    """The three protocols of one seed; the ViT's begins with the ResNet's clusters and outliers, its 8 epochs fit a slot."""
    return (
        _staged(FIRST, "table1-gpu-resnet18", f"--suffix=-resnet18 {PAIR}", seed, TREE, HIDDEN),
        _staged("OpenOOD protocol:", "table1_openood-gpu", OPENOOD, seed, TREE, GIVEN),
        _staged("ViT-B/16:", "table1-gpu", VIT, seed, f"{TREE}; {VIT_B}, whole SVHN, LSUN", OWN, f"{FIRST} generate {seed}"),
    )


RESNET, LABELLED, TRANSFORMER = _tables(0)
SMALL_TRANSFORMER = Item(  # every seed fine-tuned on that seed's clusters of the ResNet: several slots of one command
    "ViT-Tiny, fine-tuned", f"python -m benchmarks.table1 --size gpu --suffix=-vit-tiny {TINY_VIT} --seeds 0 1 2", 10,
    f"{TREE}; {VIT_TINY}, whole SVHN, LSUN", "table1-gpu-vit-tiny.json",
    tuple({"seed": seed, "method": method} for seed in (0, 1, 2) for method in ("sdood", *NEW)),
    after=tuple(f"{FIRST} generate {seed}" for seed in (0, 1, 2)))  # fmt: skip
CELLS = tuple({"seed": 0, **cell, "method": "sdood"} for cell in table2.grid("gpu"))
OUTLIERS = _staged("CIFAR-10 outliers:", "cifar10_outliers-gpu", "--data data", 0, f"{CIFAR10} in OpenOOD's tree below data/; 1 GB", [
    DIFFUSION, Step("train-reference", 4, "stages/train-reference.json"), Step("generate", 7, "stages/generate.json"),
    Step("inspect", 7, rows=tuple({"set": name, "count": 50_000} for name in cifar10_outliers.SETS))])  # fmt: skip
RUN = "runs/benchmarks/cifar10_outliers-gpu-0"
# fmt: off
OURS = " ".join(f"--ours {words}" for words in (
    "dpm 8 0 1 2,2.5,3,4", "dpm 5 0 1 2,2.5,3,4", "dpm 6 0 1 2,2.5,3,4,5", "dpm 6 0.13 1 2,2.5,3,4,5",  # with and without an interval
    "ddpm 6 0.13 1 3,4,6", "ddpm 8 0.13 1 3,4,6"))  # S is 0.2 T, as on the CPU, where guidance from 0.13 T was best
# fmt: on
NETWORK = {"network": "resnet18_cifar", "by": "ours / theirs", "part": "whole"}
BANKS = (*((kind, "50000 x 512") for kind in neighbours_speed.KINDS), ("clustered", "1000000 x 384"))


def _sampling(seed: int) -> Item:
    """Half of the 2,048 sources choose a setting, the figures are of the other half."""
    words = f"--batch-size 512 --images 2048 {OURS} --compile --seeds {seed} --suffix=-gpu"
    unpack = f"python -m benchmarks.handover unpack benchmarks/results/handover {RUN}"
    rows = tuple({"seed": seed, "baseline": name, "method": name, "images": 1024} for name in sampling_speed.BASELINES)
    return Item(f"speed: sampling {seed}", f"python -m benchmarks.sampling_speed {RUN} {words}", 9,
                f"{CIFAR10} as above; the folder of its outliers: `{unpack}`", "sampling_speed-gpu.json", rows,
                after=("CIFAR-10 outliers: train-reference 0",))  # fmt: skip


def _figure3(seed: int) -> Item:
    """A detector of fewer epochs than Table 1's, early and late."""
    rows = tuple({"seed": seed, "training": name} for name in ("early", "late"))
    return Item(f"figure 3, seed {seed}", f"python -m benchmarks.fig3 --size gpu {SHARED} --seeds {seed} --detector.epochs 20", 10, TREE,
                "fig3-gpu.json", rows, after=(f"{FIRST} generate {seed}",))  # fmt: skip


QUEUE = [
    *OUTLIERS,
    *RESNET,
    Item("table 4", f"python -m benchmarks.table4 --size gpu {SHARED} --data.ood [] --seeds 0", 10, CIFAR10, "table4-gpu.json",
         tuple({"seed": 0, "method": method} for method in ("sdood", *NEW)), after=(f"{FIRST} compare 0",)),
    Item("figure 2", f"python -m benchmarks.fig2 --size gpu {SHARED} --seeds 0", 10, CIFAR10, "fig2-gpu.json", ({"seed": 0},),
         after=(f"{FIRST} compare 0",)),
    *LABELLED,
    *TRANSFORMER,
    _sampling(0),
    Item("speed: diffusion", "python -m benchmarks.diffusion_cost --part training sampling --batch-size 256 --train-steps 100 --compile "
         "--suffix=-gpu", 8, "nothing", "diffusion_cost-gpu.json",
         (*({"part": "training", "size": size, "batch_size": 256, "compiled": compiled}
            for size in diffusion_cost.SIZES for compiled in (False, True)),
          *({"part": "sampling", "size": size, "batch_size": 256} for size in diffusion_cost.SIZES))),
    Item("speed: neighbours", "python -m benchmarks.neighbours_speed --device cuda --threads 16 --large-queries 10000 --suffix=-gpu", 8,
         "nothing", "neighbours_speed-gpu.json", tuple({"method": method, "features": features, "bank": bank}
                                                       for features, bank in BANKS for method in ("sdood", "faiss", "sklearn"))),
    Item("speed: detector", "python -m benchmarks.detector_speed --data data --networks resnet18_cifar --compile --suffix=-gpu", 10,
         f"{CIFAR10}; OPENOOD_ROOT, a checkout of OpenOOD", "detector_speed-gpu.json",
         tuple({**NETWORK, "seed": seed} for seed in (0, 1, 2))),
    Item("outlier quality", "python -m benchmarks.outlier_quality --images data/benchmark_imglist/cifar10/train_cifar10.txt "
         "--root data/images_classic --inception data/weights-inception-2015-12-05-6726825d.pth --count 2000 "
         "--config configs/cifar10.yml --steps 10000 --suffix=-gpu", 10, f"{CIFAR10}; torch-fidelity's Inception weights",
         "outlier_quality-gpu.json",
         tuple({"mode": mode, "start_fraction": s, "guidance_weight": w} for mode, s, w in outlier_quality.SETTINGS)),
    Item("frozen ViT-Tiny", "python -m benchmarks.real_vit_tiny data --weights data/vit_tiny_patch16_224.safetensors "
         "--train-images 50000 --device cuda --cache runs/vit_features --suffix=-gpu", 6, f"{TREE}; {VIT_TINY}",
         "real_vit_tiny-gpu.json", tuple({"seed": seed, "ood": ood} for seed in (0, 1, 2) for ood in real_vit_tiny.OODS)),
    Item("selection", "python -m benchmarks.selection --config configs/cifar10.yml --suffix=-cifar10 --labels given --epochs 10 "
         "--seeds 0 --hand-over", 10, TREE, "selection-cifar10.json",
         tuple({"seed": 0, "method": selection.name_of(variant)} for variant in selection.variants(with_given_labels(RunConfig())))),
    Item("table 3", f"python -m benchmarks.table3 --size gpu {SHARED} --seeds 0 --detector.epochs 20", 10, TREE, "table3-gpu.json",
         tuple(cell for cell in CELLS if cell["guidance_weight"] == 2), after=(f"{FIRST} cluster 0",)),
    Item("table 2", f"python -m benchmarks.table2 --size gpu {SHARED} --seeds 0 --detector.epochs 20", 10, TREE, "table2-gpu.json",
         CELLS, after=("table 3",)),
    _figure3(0),
    *[item for seed in (1, 2) for items in _tables(seed) for item in items],
    SMALL_TRANSFORMER,
    *map(_sampling, (1, 2)),
    *map(_figure3, (1, 2)),
]  # fmt: skip


def following(minutes: float, queue: Sequence[Item] = QUEUE, results: Path = RESULTS) -> Item | None:
    """The first item that is not done, fits, and goes on from nothing that is missing; None when there is none."""
    done = {item.name for item in queue if item.done(results)}
    return next(
        (item for item in queue if item.name not in done and item.minutes <= minutes and done.issuperset(item.after)), None
    )


def main() -> None:
    """Print the next item, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--next", action="store_true", help="the first that is missing and fits; without it all are listed")
    parser.add_argument("--minutes", type=float, default=10, help="how long the slot is")
    options = parser.parse_args()
    if options.next:
        item = following(options.minutes)
        print(f"# {item.name}: {item.minutes} min; needs {item.needs}\n{item.command}" if item else "# nothing is left that fits")
        return
    for item in QUEUE:
        print(f"{'done' if item.done() else f'{item.minutes:3d} m'}  {item.name}: {item.command}")


if __name__ == "__main__":
    main()
