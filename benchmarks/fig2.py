"""Fig. 2: outliers of the same sources by five makers, side by side.

`source`; `other`, the paper's; `ours`, the configuration's own mode; `same-class`, as SDEdit (Meng et al. 2022) would: the
own class at twice the noise; `unconditional`, the null class from the same S; `fake-it`, an early-stopped unconditional
model from pure noise, which has no source. The result holds the pictures; the figure is drawn from it alone.

python -m benchmarks.fig2 --size cpu --seeds 0
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.experiment import TINY, Options, Rows, cells, configuration, data_facts, drawn, read_options
from sdood_plugin.artifacts import read_json, read_tensors
from sdood_plugin.config import OutliersConfig, RunConfig
from sdood_plugin.context import Context
from sdood_plugin.data.images import spread, to_unit
from sdood_plugin.detector.network import load_network
from sdood_plugin.diffusion.unet import load_unet
from sdood_plugin.features import evaluating, extract
from sdood_plugin.outliers.sample import sample_batch
from sdood_plugin.run import run

SIZES = {
    "tiny": ["demo.yml", *TINY],
    "cpu": ["demo.yml", "--diffusion.max_start_fraction", "0.4"],
    "gpu": ["cifar10.yml", "cifar10_resnet18_unlabelled.yml", "--data.ood", "[]"],
}
PICTURES = 10


def makers(config: RunConfig) -> dict[str, OutliersConfig]:
    """The settings of each maker that starts from a source."""
    base = dataclasses.replace(config.outliers, guidance_interval=[0.0, 1.0])
    twice = min(2 * float(_first(base.start_fraction)), config.diffusion.max_start_fraction)
    return {
        "other": dataclasses.replace(base, mode="other", guidance_weight=2.0),
        "ours": base,
        "same-class": dataclasses.replace(base, mode="same", start_fraction=twice),
        "unconditional": dataclasses.replace(base, mode="other", guidance_weight=-1.0),
    }


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def pictures(config: RunConfig, options: Options) -> dict[str, torch.Tensor]:
    """By maker, uint8 (P, 3, H, W)."""
    folder = options.folder(config.seed)
    context = Context(config, folder)
    labels, images, device = context.labels, context.train.images, context.accelerator.device
    path = folder / "diffusion" / "unet.safetensors"
    unet = load_unet(path, config.diffusion, classes=labels.classes, image_size=images.shape[-1]).to(device)
    rows = spread(len(images), PICTURES)
    found = {"source": images[rows]}
    for name, own in makers(config).items():
        sources = (images[rows].to(device), labels.labels[rows].to(device), rows.to(device))
        seed = context.seed("fig2")
        found[name] = sample_batch(unet, *sources, own, config.diffusion, classes=labels.classes, seed=seed).cpu()
    fakes = read_tensors(folder / "comparators" / "fake-it" / "fakes.safetensors")["images"]
    return found | {"fake-it": fakes[spread(len(fakes), PICTURES)]}


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Make the pictures of a seed, results/fig2-SIZE.json and figures/fig2-SIZE.png."""
    options = read_options("fig2", __doc__, arguments, seeds=(0,))
    config = configuration(options, SIZES)
    config = dataclasses.replace(config, compare=dataclasses.replace(config.compare, methods=["fake-it"]))

    def work(seed: int, _cell: dict[str, Any]) -> Rows:
        own = dataclasses.replace(config, seed=seed)
        run(own, options.folder(seed), "train-diffusion")
        run(own, options.folder(seed), "train-comparators")
        made = pictures(own, options)
        reference = load_network(options.folder(seed) / "reference" / "reference.safetensors")
        rows: Rows = []
        for maker, images in made.items():
            with evaluating(reference):
                seen = reference.g_in(extract(reference.backbone, images, device=torch.device("cpu"))).argmax(dim=1).tolist()
            away = (to_unit(images) - to_unit(made["source"])).square().mean(dim=(1, 2, 3)).sqrt().tolist()
            rows.append(
                {"maker": maker, "pictures": [_encode(one) for one in images], "seen_as": seen, "distance_to_source": away}
            )
        return rows

    rows = cells(options, config, [{}], work, lambda seeds: data_facts(config, options.folder(seeds[-1])))
    draw(read_json(options.result), options)
    return rows


def _encode(image: torch.Tensor) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def draw(result: dict[str, Any], options: Options) -> None:
    """figures/NAME.png: a row a maker, a column a source, with what a classifier of real images sees."""
    rows = [row for row in result["rows"] if row["seed"] == result["seeds"][0]]
    with drawn(options, (0.75 * PICTURES + 1, 0.95 * len(rows))) as figure:
        for line, row in enumerate(rows):
            for column, (text, seen) in enumerate(zip(row["pictures"], row["seen_as"], strict=True)):
                axes = figure.add_subplot(len(rows), PICTURES, line * PICTURES + column + 1)
                axes.imshow(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.set_xlabel(f"seen as {seen}", fontsize=6, labelpad=1)
                if column == 0:
                    axes.set_ylabel(row["maker"], fontsize=7)
        figure.subplots_adjust(hspace=0.35, wspace=0.05)


if __name__ == "__main__":
    main()
