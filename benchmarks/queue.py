"""What a GPU should run, in order: `python -m benchmarks.queue --next --minutes 10` prints the next item that fits.

An item is done when its result file is there and, where the item names a stage, when that stage's record is. Minutes are
estimates for one modern GPU (the first measured time replaces the guess). Every item fits a slot of ten minutes; what goes
on longer is cut into stages (`--until`), each of which finds what the one before handed over below results/handover/. End a
slot with `timeout -s INT 590 COMMAND`: what is finished, down to a single comparator or a cell of a table, is packed, and the
same item comes next again until it is whole.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import RESULTS
from sdood_plugin.artifacts import read_json

CIFAR10, CIFAR100, TIN, VIT_B, VIT_TINY = "CIFAR-10", "CIFAR-100 test", "Tiny-ImageNet val", "ViT-B/16 (21k)", "ViT-Tiny"
TREE = f"{CIFAR10}, {CIFAR100}, {TIN} in OpenOOD's tree below data/"


@dataclasses.dataclass(frozen=True)
class Item:
    """One slot's work.

    Attributes:
        name: Short, unique.
        command: From the repository root.
        minutes: Expected on one modern GPU.
        needs: On disk, beside the repository.
        result: File below benchmarks/results/ that says it is done.
        seeds: Seeds that the result must hold.
        method: Method that the result must have rows of.
    """

    name: str
    command: str
    minutes: int
    needs: str
    result: str
    seeds: tuple[int, ...] = ()
    method: str = ""

    def done(self, results: Path = RESULTS) -> bool:
        """Whether the result file is there and holds what it should."""
        path = results / self.result
        if not path.exists():
            return False
        if not self.seeds and not self.method:
            return True
        rows = read_json(path)["rows"]
        return all(any(row.get("seed") == seed and self.method in ("", row.get("method")) for row in rows) for seed in self.seeds)


def _staged(name: str, table: str, words: str, seed: int, needs: str, minutes: dict[str, int]) -> list[Item]:
    """A table's run of one seed, a slot a stage; the last ones are judged by rows, those before by the stage's record."""
    result = f"{table}.json"
    script = table.split("-gpu")[0]
    items = []
    for stage, expected in minutes.items():
        until = {"detector": "evaluate", "comparators": "compare"}.get(stage, stage)
        record = f"handover/{table}-{seed}/stages/{until}.json"
        command = f"python -m benchmarks.{script} --size gpu {words} --seeds {seed} --until {until}".replace("  ", " ")
        judged = {"evaluate": "sdood", "compare": "multi-class"}.get(until)
        where = {"result": result, "seeds": (seed,), "method": judged} if judged else {"result": record}
        items.append(Item(f"{name} {stage} {seed}", command, expected, needs, **where))  # type: ignore[arg-type]
    return items


PAIR = "--config configs/cifar10_resnet18_unlabelled.yml --clustering.pretext_steps 15000 --diffusion.steps 10000"
VIT = PAIR.replace("cifar10_resnet18_unlabelled", "cifar10_vit_b16") + " --detector.epochs 8 --start-from table1-gpu-resnet18"
SHARED = f"{PAIR} --start-from table1-gpu-resnet18"
HIDDEN = {"cluster": 10, "train-diffusion": 10, "train-reference": 4, "detector": 10, "comparators": 10}
VIT_STAGES = {"train-reference": 7, "detector": 10, "comparators": 10}  # 8 of the paper's 30 epochs: what a slot holds
GIVEN = {"train-diffusion": 10, "train-reference": 4, "detector": 10, "comparators": 10}
QUEUE = [
    *_staged("unlabelled ResNet-18:", "table1-gpu-resnet18", f"--suffix=-resnet18 {PAIR}", 0, TREE, HIDDEN),
    Item("table 4", f"python -m benchmarks.table4 --size gpu {SHARED} --seeds 0", 10, CIFAR10, "table4-gpu.json", (0,)),
    Item("figure 2", f"python -m benchmarks.fig2 --size gpu {SHARED} --seeds 0", 10, CIFAR10, "fig2-gpu.json"),
    *_staged("OpenOOD protocol:", "table1_openood-gpu", "--diffusion.steps 10000", 0, TREE, GIVEN),
    *_staged("ViT-B/16:", "table1-gpu", VIT, 0, f"{TREE}; {VIT_B}, whole SVHN, LSUN", VIT_STAGES),
    Item("speed: sampling", "python -m benchmarks.sampling_speed runs/benchmarks/table1-gpu-resnet18-0 --batch-size 512 --images 4096 "
         "--compile --suffix=-gpu", 6, "the first run's folder", "sampling_speed-gpu.json"),
    Item("speed: diffusion", "python -m benchmarks.diffusion_cost --part training sampling --batch-size 256 --train-steps 20 --compile "
         "--suffix=-gpu", 5, "nothing", "diffusion_cost-gpu.json"),
    Item("speed: neighbours", "python -m benchmarks.neighbours_speed --device cuda --large-queries 10000 --suffix=-gpu", 6, "nothing",
         "neighbours_speed-gpu.json"),
    Item("speed: detector", "python -m benchmarks.detector_speed --data data --networks resnet18_cifar --compile --suffix=-gpu", 10,
         f"{CIFAR10}; OPENOOD_ROOT, a checkout of OpenOOD", "detector_speed-gpu.json"),
    Item("outlier quality", "python -m benchmarks.outlier_quality --images data/benchmark_imglist/cifar10/train_cifar10.txt "
         "--root data/images_classic --inception data/weights-inception-2015-12-05-6726825d.pth --count 2000 "
         "--config configs/cifar10.yml --steps 10000 --suffix=-gpu", 10, f"{CIFAR10}; torch-fidelity's Inception weights",
         "outlier_quality-gpu.json"),
    Item("frozen ViT-Tiny", "python -m benchmarks.real_vit_tiny data --weights data/vit_tiny_patch16_224.safetensors "
         "--train-images 50000 --device cuda --cache runs/vit_features --suffix=-gpu", 6, f"{TREE}; {VIT_TINY}",
         "real_vit_tiny-gpu.json"),
    Item("selection", "python -m benchmarks.selection --config configs/cifar10.yml --suffix=-cifar10 --labels given --epochs 10 --seeds 0",
         10, TREE, "selection-cifar10.json"),
    Item("table 2, cells until cut off", f"python -m benchmarks.table2 --size gpu {SHARED} --seeds 0 --detector.epochs 20", 10, TREE,
         "table2-gpu.json"),
    Item("table 3", f"python -m benchmarks.table3 --size gpu {PAIR} --seeds 0 --detector.epochs 20", 10, "table 2's run folder",
         "table3-gpu.json"),
    Item("figure 3", f"python -m benchmarks.fig3 --size gpu {SHARED} --seeds 0 --detector.epochs 20", 10, TREE, "fig3-gpu.json"),
    *[item for seed in (1, 2) for item in (
        *_staged("unlabelled ResNet-18:", "table1-gpu-resnet18", f"--suffix=-resnet18 {PAIR}", seed, TREE, HIDDEN),
        *_staged("OpenOOD protocol:", "table1_openood-gpu", "--diffusion.steps 10000", seed, TREE, GIVEN),
        *_staged("ViT-B/16:", "table1-gpu", VIT, seed, f"{TREE}; {VIT_B}, whole SVHN, LSUN", VIT_STAGES),
    )],
]  # fmt: skip


def following(minutes: float, queue: Sequence[Item] = QUEUE, results: Path = RESULTS) -> Item | None:
    """The first item that is not done and fits, None when there is none."""
    return next((item for item in queue if item.minutes <= minutes and not item.done(results)), None)


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
