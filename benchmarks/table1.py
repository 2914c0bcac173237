"""Table 1: unlabelled CIFAR-10 against CIFAR-100, SVHN and LSUN; ours beside every comparator.

Whole test sets, as the paper has them; a set that is not there, or only in part, is named so.
tiny  the embedded data, a few steps of everything: shows that the script runs
cpu   1,000 real images and 500 of each test set, the pre-trained ViT-Tiny's last two blocks, outliers of a diffusion model
      trained on the CPU for minutes: shows what the method does with poor outliers
gpu   the paper's ViT-B/16

python -m benchmarks.table1 --size cpu --data data
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.experiment import TINY, Options, Rows, configuration, methods_table, read_options, with_present_sets
from sdood_plugin.config import ImagesConfig, OODConfig, RunConfig

NEW = "[distance,dn2,mscl,multi-class,fake-it]"
VIT_TINY = "data/vit_tiny_patch16_224.safetensors"
SIZES = {
    "tiny": ["demo.yml", *TINY],
    "cpu": f"""cifar10.yml cifar10_vit_tiny.yml --data.train.limit 1000 --clustering.backbone vit_tiny_patch16_224
        --clustering.weights {VIT_TINY} --detector.frozen_blocks 10 --detector.augmentation none --detector.epochs 5
        --detector.batch_size 32 --diffusion.size demo --diffusion.steps 300 --diffusion.batch_size 64 --diffusion.lr 0.001
        --diffusion.ema_decay 0.99 --outliers.mode away --outliers.guidance_weight 3 --outliers.start_fraction 0.2
        --outliers.sampler dpm --outliers.sampling_steps 6 --outliers.batch_size 100 --compare.methods {NEW}""".split(),
    "gpu": [
        "cifar10.yml",
        "cifar10_vit_b16.yml",
        "--data.test.path",
        "data/images_classic/cifar10/test",
        "--compare.methods",
        NEW,
    ],
}
PAPER = [  # unlabelled CIFAR-10, AUROC in per cent: CIFAR-100, SVHN, LSUN; None where the paper has none
    ("Likelihood", "PixelCNN++", 52.6, 8.3, None),
    ("Likelihood ratio", "PixelCNN++", None, 91.2, None),
    ("Input complexity", "Glow", 73.6, 95.0, None),
    ("Rot", "ResNet-18", 79.0, 97.6, 89.2),
    ("GOAD", "ResNet-18", 77.2, 96.3, 89.3),
    ("CSI", "ResNet-18", 89.2, 99.8, 97.5),
    ("SSD", "ResNet-18", 89.6, None, None),
    ("DN2", "ResNet-18", 83.3, 88.9, 91.0),
    ("DN2", "ResNet-152", 86.5, 96.2, 88.7),
    ("MSCL", "ResNet-152", 90.0, 98.6, 90.6),
    ("Multi-class AD", "ResNet-18", 90.8, 98.6, 98.6),
    ("Multi-class AD", "ResNet-152", 93.3, 99.8, 95.4),
    ("Multi-class AD", "ViT-B/16", 96.7, 99.9, 99.3),
    ("Fake-it", "ViT-B/16", 95.7, 99.9, 99.4),
    ("Ours", "ViT-B/16", 98.0, 99.9, 99.9),
]
SETS = [
    OODConfig("cifar100", "near", ImagesConfig("data/images_classic/cifar100/test")),
    OODConfig("tin", "near", ImagesConfig("data/benchmark_imglist/cifar10/test_tin.txt", "data/images_classic")),
    OODConfig("svhn", "far", ImagesConfig("data/images_classic/svhn/test")),
    OODConfig("lsun-resize", "far", ImagesConfig("data/images_classic/lsun_resize")),
    OODConfig("lsun-fix", "far", ImagesConfig("data/images_classic/lsun_fix")),
]
CPU_LIMIT = 500


def settings(options: Options) -> tuple[RunConfig, list[str]]:
    """The configuration and the sets that are absent."""
    config = configuration(options, SIZES)
    if options.size == "tiny":
        return config, []
    limit = CPU_LIMIT if options.size == "cpu" else None
    wanted = [dataclasses.replace(one, images=dataclasses.replace(one.images, limit=limit)) for one in SETS]
    if config.data.test is not None and limit is not None and config.data.test.limit is None:
        test = dataclasses.replace(config.data.test, limit=limit)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, test=test))
    return with_present_sets(config, wanted, options)


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Run the seeds and write results/table1-SIZE.json after each, with paired differences."""
    options = read_options("table1", __doc__, arguments)
    config, absent = settings(options)
    return methods_table(options, config, absent, PAPER)


if __name__ == "__main__":
    main()
