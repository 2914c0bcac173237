"""Table 1 under OpenOOD's protocol: labelled CIFAR-10, its official lists, ResNet-18 from scratch.

These are subsets (9,000 ID and 9,000 CIFAR-100 test images): never beside the whole-set numbers of table1. The rates are
given in both conventions; OpenOOD's own takes OOD as positive (`fpr95_ood_positive`). A list that is not there, or whose
images are only in part, is named by its count under `data`.
tiny  the embedded data, labels given, a few steps of everything
cpu   real images, a small network, few images: no OpenOOD number
gpu   OpenOOD's recipe: 100 epochs of ResNet-18

python -m benchmarks.table1_openood --size gpu --data data
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.experiment import TINY, Options, Rows, configuration, methods_table, read_options, with_present_sets
from sdood_plugin.config import ImagesConfig, OODConfig, RunConfig

ALL = "[distance,msp,energy,knn,mahalanobis,vim,oe-noise,dn2,mscl,multi-class,fake-it]"
SIZES = {
    "tiny": ["demo.yml", *TINY, "--clustering.method", "given", "--compare.methods", "[distance,msp,knn]"],
    "cpu": """cifar10.yml cifar10_resnet18.yml --data.train.limit 4000 --data.test.limit 2000 --detector.backbone small_cnn
        --detector.epochs 15 --detector.optimizer adamw --detector.lr 0.002 --diffusion.size demo --diffusion.steps 1500
        --diffusion.batch_size 64 --clustering.pretext_steps 300 --clustering.backbone small_cnn""".split(),
    "gpu": ["cifar10.yml", "cifar10_resnet18.yml", "--compare.methods", ALL],
}
NAMES = [("cifar100", "near"), ("tin", "near"), ("mnist", "far"), ("svhn", "far"), ("texture", "far"), ("places365", "far")]
LEADERBOARD = [  # OpenOOD v1.5, ResNet-18 from scratch: mean near and far AUROC in per cent; the paper has nothing of this
    ("MSP", 88.03, 90.73),
    ("KNN", 90.64, 92.96),
    ("ViM", 88.68, 93.48),
    ("OE, real Tiny-ImageNet outliers", 94.82, 96.00),
    ("ASCOOD + T2FNorm, synthetic outliers", 93.03, 97.35),
    ("OAL, Stable Diffusion outliers of 224 px", 92.99, 96.28),
]
CPU_LIMIT = 2000


def settings(options: Options) -> tuple[RunConfig, list[str]]:
    """The configuration and the official lists that are absent."""
    config = configuration(options, SIZES)
    if options.size == "tiny":
        return config, []
    limit = CPU_LIMIT if options.size == "cpu" else None
    lists = "data/benchmark_imglist/cifar10/test_{}.txt"
    wanted = [
        OODConfig(name, group, ImagesConfig(lists.format(name), "data/images_classic", limit=limit))  # type: ignore[arg-type]
        for name, group in NAMES
    ]
    config, absent = with_present_sets(config, wanted, options)
    if config.clustering.method != "given":
        config = dataclasses.replace(config, clustering=dataclasses.replace(config.clustering, method="given"))
    return config, absent


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Run the seeds and write results/table1_openood-SIZE.json after each, with paired differences."""
    options = read_options("table1_openood", __doc__, arguments)
    config, absent = settings(options)
    return methods_table(options, config, absent, LEADERBOARD)


if __name__ == "__main__":
    main()
