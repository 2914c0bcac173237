"""What a GPU should run, in order: `python -m benchmarks.queue --next --minutes 10` prints the next item that fits.

An item is done when its result has rows of all its seeds, methods and cells or, for a training, when the weights that it ends
with were handed over; it is printed only when the items that it goes on from are done. Minutes are estimates for one modern
GPU (the first measured time replaces the guess); an item that takes more than a slot of ten comes next again until it is
whole, and goes on from its last checkpoint, comparator or cell. End a slot with `timeout -s INT 540 COMMAND`: what is
finished is packed below results/handover/ in the minute that is left.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import outlier_quality, real_vit_tiny, selection, table2
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
        methods: Methods that the result then has rows of.
    """

    name: str
    minutes: int
    file: str = ""
    methods: tuple[str, ...] = ()

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
        rows = tuple({"seed": seed, "method": method} for method in step.methods)
        before = (items[-1].name,) if items else (after,) if after else ()
        items.append(Item(f"{name} {step.name} {seed}", command, step.minutes, needs, result, rows, step.file, before))
    return items


CLUSTER = Step("cluster", 10, "stages/cluster.json")
DIFFUSION = Step("train-diffusion", 10, "stages/train-diffusion.json")
REFERENCE = Step("train-reference", 7, "stages/train-reference.json")
GENERATE = Step("generate", 6, "stages/generate.json")
DETECTOR = Step("train-detector", 10, "stages/train-detector.json")
EVALUATE = Step("evaluate", 4, methods=("sdood",))
NETWORKS = [  # trained comparators; those left out train nothing
    Step("mscl", 10, "comparators/mscl/backbone.safetensors"),
    Step("multi-class", 10, "comparators/multi-class/network.safetensors"),
    Step("fake-it", 10, "comparators/fake-it/network.safetensors"),
]
PRETEXT = Step("dn2", 10, "comparators/pretext/pretext.safetensors")  # SimCLR, which the others of its protocol start from
NOISE = Step("oe-noise", 10, "comparators/oe-noise/network.safetensors")
NEW = ("distance", "dn2", "mscl", "multi-class", "fake-it")
POSTHOC = ("msp", "energy", "knn", "mahalanobis", "vim")
HIDDEN = [CLUSTER, DIFFUSION, REFERENCE, GENERATE, DETECTOR, EVALUATE, *NETWORKS, Step("compare", 4, methods=NEW)]
OWN = [REFERENCE, GENERATE, DETECTOR, EVALUATE, *NETWORKS, Step("compare", 6, methods=NEW)]
GIVEN = [DIFFUSION, REFERENCE, GENERATE, DETECTOR, EVALUATE, PRETEXT, NOISE, *NETWORKS,
         Step("compare", 6, methods=(*NEW, *POSTHOC, "oe-noise"))]  # fmt: skip
PAIR = "--config configs/cifar10_resnet18_unlabelled.yml --clustering.pretext_steps 15000 --diffusion.steps 10000"
VIT = PAIR.replace("cifar10_resnet18_unlabelled", "cifar10_vit_b16") + " --detector.epochs 8 --start-from table1-gpu-resnet18"
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
CELLS = tuple({"seed": 0, **cell, "method": "sdood"} for cell in table2.grid("gpu"))
FIRST_RUN = "runs/benchmarks/table1-gpu-resnet18-0"
QUEUE = [
    *RESNET,
    Item("table 4", f"python -m benchmarks.table4 --size gpu {SHARED} --data.ood [] --seeds 0", 10, CIFAR10, "table4-gpu.json",
         tuple({"seed": 0, "method": method} for method in ("sdood", *NEW)), after=(f"{FIRST} compare 0",)),
    Item("figure 2", f"python -m benchmarks.fig2 --size gpu {SHARED} --seeds 0", 10, CIFAR10, "fig2-gpu.json", ({"seed": 0},),
         after=(f"{FIRST} compare 0",)),
    *LABELLED,
    *TRANSFORMER,
    Item("speed: sampling", f"python -m benchmarks.sampling_speed {FIRST_RUN} --batch-size 512 --images 4096 --compile --suffix=-gpu",
         6, f"the first run's folder: `python -m benchmarks.handover unpack benchmarks/results/handover {FIRST_RUN}`",
         "sampling_speed-gpu.json", after=(f"{FIRST} train-reference 0",)),
    Item("speed: diffusion", "python -m benchmarks.diffusion_cost --part training sampling --batch-size 256 --train-steps 20 --compile "
         "--suffix=-gpu", 5, "nothing", "diffusion_cost-gpu.json"),
    Item("speed: neighbours", "python -m benchmarks.neighbours_speed --device cuda --threads 16 --large-queries 10000 --suffix=-gpu", 8,
         "nothing", "neighbours_speed-gpu.json"),
    Item("speed: detector", "python -m benchmarks.detector_speed --data data --networks resnet18_cifar --compile --suffix=-gpu", 10,
         f"{CIFAR10}; OPENOOD_ROOT, a checkout of OpenOOD", "detector_speed-gpu.json"),
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
    Item("figure 3", f"python -m benchmarks.fig3 --size gpu {SHARED} --seeds 0 --detector.epochs 20", 10, TREE, "fig3-gpu.json",
         tuple({"seed": 0, "training": name} for name in ("early", "late")), after=(f"{FIRST} generate 0",)),
    *[item for seed in (1, 2) for items in _tables(seed) for item in items],
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
