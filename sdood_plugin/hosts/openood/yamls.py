"""The host YAMLs this package brings; `configs/openood/` in the repository and an exported folder are written from here.

python -m sdood_plugin.hosts.openood.yamls FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from ...artifacts import write_text

NETWORK = """# The three-head network.
# backbone: small_cnn, resnet18_cifar (the architecture of the host's resnet18_32x32) or any timm name.
# weights: where its training starts, a safetensors file of a timm model, hub (timm's own) or '' (random).
# input_size: the side images are resized to, 0 the model's own. pooling: own, or cls or mean of a transformer.
# checkpoint, with pretrained: True: a run folder, our .safetensors, best.ckpt, or a stock ResNet-18 (which has no g_bin, g_out).
network:
  name: sdood
  backbone: resnet18_cifar
  weights: ''
  input_size: 0
  pooling: own
  num_classes: '@{dataset.num_classes}'
  normalization_type: '@{dataset.normalization_type}'
  pretrained: False
  checkpoint: ''
  num_gpus: '@{num_gpus}'
"""

PIPELINE = """# ID images, controls and outliers share each batch; `python -m sdood_plugin.hosts.openood` runs it.
exp_name: "'@{dataset.name}'_'@{network.name}'_'@{trainer.name}'_e'@{optimizer.num_epochs}'\\
  _lr'@{optimizer.lr}'_'@{mark}'/s'@{seed}'"
output_dir: ./results/
save_output: True
merge_option: merge
mark: default
seed: 0

num_gpus: 1
num_workers: 8
num_machines: 1
machine_rank: 0

preprocessor:
  name: base

pipeline:
  name: train_sdood

trainer:
  name: sdood
  lambda_out: 1.0

evaluator:
  name: base

optimizer:
  name: sgd
  num_epochs: 100
  lr: 0.1
  momentum: 0.9
  weight_decay: 0.0005

recorder:
  name: base
  save_all_models: False
"""

POSTPROCESSOR = """# Distance + voting.
# outliers: an outlier-set folder, a run folder or its detector folder; empty is distance only.
# null keeps the default or what the detector folder was calibrated with; a null alpha is chosen on held-out outliers.
# On the command line what is null here takes its type: --postprocessor.postprocessor_args.k_vote 3:int
# APS_mode: True searches on the host's OOD validation set, which for cifar10 and cifar100 holds Tiny-ImageNet images.
postprocessor:
  name: sdood
  APS_mode: False
  postprocessor_args:
    outliers: ''
    k_distance: null
    k_vote: null
    alpha: null
    normalise: null
  postprocessor_sweep:
    k_distance_list: [1, 2, 5, 10]
    k_vote_list: [2, 5, 10]
    alpha_list: [0.0, 0.03, 0.1, 0.3, 1.0]
    normalise_list: [True]
"""

_OE = """# Our outliers as auxiliary data of {id_name}: give it after the host's configs/datasets/{id_name}/{id_name}.yml.
# `sdood export-openood RUN ./data` in the host's checkout writes what it names. A label is the outlier's SOURCE class.
# The host's MixOE needs batches of one size: --dataset.train.batch_size 64 --dataset.oe.batch_size 64
# The host's UDG needs its own class: --dataset.train.dataset_class UDGDataset --dataset.oe.dataset_class UDGDataset
dataset:
  name: {id_name}_sdood_oe
  split_names: [train, oe, val, test, oe_heldout]
  oe:
    dataset_class: ImglistDataset
    data_dir: ./data/images_classic/
    imglist_pth: ./data/benchmark_imglist/sdood/oe.txt
    batch_size: 256
    shuffle: True
    interpolation: bilinear
  # Outliers of images that the run held out; the host's own train list still has those images. Never trained on:
  # train_sdood chooses the weight of the votes by them; with a split controls_heldout, which an export lists where the run
  # has controls, against those too.
  oe_heldout:
    dataset_class: ImglistDataset
    data_dir: ./data/images_classic/
    imglist_pth: ./data/benchmark_imglist/sdood/oe_heldout.txt
    batch_size: 200
    shuffle: False
"""

FILES = {
    "networks/sdood_net.yml": NETWORK,
    "pipelines/train_sdood.yml": PIPELINE,
    "postprocessors/sdood.yml": POSTPROCESSOR,
    "datasets/cifar10_sdood_oe.yml": _OE.format(id_name="cifar10"),
    "datasets/cifar100_sdood_oe.yml": _OE.format(id_name="cifar100"),
}


def write_yamls(folder: Path) -> None:
    """Write all of them below `folder`."""
    for name, text in FILES.items():
        write_text(folder / name, text)


if __name__ == "__main__":
    write_yamls(Path(sys.argv[1]))
