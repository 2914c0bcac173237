"""README.md of an outlier set: what it is, how it was made, what its labels mean, under which terms; and a few examples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.utils import make_grid

from ..artifacts import atomic_path, write_text
from ..data.images import spread
from .dataset import OutlierSet
from .manifest import MEANINGS

EXAMPLES, SHOWN_SIDE = 12, 64

_CARD = """# {count:,} {what}

![Examples]({figure})

One column an image, from top to bottom: {strips}.

Made by `sdood generate` (sdood_plugin {version}): every source image was noised to S and denoised by a class-conditional
diffusion model, guided {guided}.

| | |
|---|---|
{facts}

## What is here

- `images/`: {format}, {side} x {side}, a folder for every 1,000 sources.
- `imglist.txt`: `file label`, one line an image. **The label is the SOURCE image's pseudo-label**, not what the image shows.
- `manifest.csv`: one row an image, columns below.
- `meta.json`: settings, hashes of the models, of the sources and of the manifest, versions.

Nothing was selected: images that still show their source's class and images that plainly show another are among these; the
manifest says which (`sdood select` makes a subset).

| column | |
|---|---|
{columns}

## By label

| label | images |{seen_head}
|---|---|{seen_rule}
{labels}

## Terms

The images derive from the source images and inherit their licence and terms; nothing is added to them here. They are made for
training and testing out-of-distribution detectors. They carry over what the sources show, people and private things included.
"""
_GUIDED = {
    "other": "towards one wrong class, drawn at random",
    "away": "away from the source's own class",
    "blend": "between two wrong classes, drawn at random",
    "same": "towards the source's own class",
}


def write_card(folder: Path, sources: torch.Tensor, controls: Path | None = None) -> None:
    """Write README.md and examples.png beside the lists of a finished set.

    Args:
        folder: The set.
        sources: uint8 (N, 3, H, W), the images it was made of.
        controls: A finished set of same-class controls to show between sources and outliers.
    """
    made = OutlierSet(folder)
    strips = _examples(made, sources, OutlierSet(controls) if controls is not None else None)
    _write_figure(folder / "examples.png", list(strips.values()))
    counts = Counter(made.labels.tolist())
    stayed = Counter(int(row["source_label"]) for row in made.manifest if row["predicted_after"] == row["source_label"])
    judged = bool(made.meta["reference_sha256"])
    config, mode = made.meta["config"], made.meta["config"]["mode"]
    facts = {
        "mode": mode,
        "guidance weight w": "unused" if mode == "same" else config["guidance_weight"],
        "S / T": config["start_fraction"],
        "sampler": f"{config['sampler']}, {config['sampling_steps']} steps",
        "sources": f"{len(made.sources.unique()):,}, {config['per_source']} each",
        "classes": made.meta["classes"],
        "seed": made.meta["seed"],
        "U-Net": f"`{made.meta['unet_sha256'][:12]}`",
        "reference classifier": f"`{made.meta['reference_sha256'][:12]}`, trained on training images only" if judged else "none",
    }
    text = _CARD.format(
        count=len(made),
        what="same-class controls" if mode == "same" else "semantic-discrepant outliers",
        figure="examples.png",
        strips=", ".join(strips),
        version=made.meta["versions"]["sdood_plugin"],
        guided=_GUIDED[mode],
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        format={"png": "PNG", "webp": "lossless WebP"}[config["format"]],
        side=made.meta["image_size"],
        columns="\n".join(f"| `{name}` | {MEANINGS[name]} |" for name in made.manifest.columns),
        seen_head=" still seen as it |" if judged else "",
        seen_rule="---|" if judged else "",
        labels="\n".join(
            f"| {label} | {counts[label]:,} |" + (f" {stayed[label]:,} |" if judged else "") for label in sorted(counts)
        ),
    )
    write_text(folder / "README.md", text)


def _examples(made: OutlierSet, sources: torch.Tensor, controls: OutlierSet | None) -> dict[str, torch.Tensor]:
    """Source, control and outlier of a few sources spread over the set: uint8 (K, 3, H, W) each."""
    rows = spread(len(made), min(EXAMPLES, len(made)))
    strips = {"source": sources[made.sources[rows]]}
    if controls is not None:
        position = {source: row for row, source in enumerate(controls.sources.tolist())}
        strips["same-class control"] = controls.read(torch.tensor([position[source] for source in made.sources[rows].tolist()]))
    strips["control" if made.meta["config"]["mode"] == "same" else "outlier"] = made.read(rows)
    return strips


def image_grid(strips: list[torch.Tensor]) -> Image.Image:
    """One row of pictures for each uint8 (K, 3, H, W), small images enlarged."""
    factor = max(1, SHOWN_SIDE // strips[0].shape[-1])
    images = F.interpolate(torch.cat(strips).float(), scale_factor=factor, mode="nearest").to(torch.uint8)
    grid = make_grid(images, nrow=len(strips[0]), padding=2, pad_value=255)
    return Image.fromarray(np.ascontiguousarray(grid.permute(1, 2, 0).numpy()))


def _write_figure(path: Path, strips: list[torch.Tensor]) -> None:
    with atomic_path(path) as temporary:
        image_grid(strips).save(temporary, format="PNG")
