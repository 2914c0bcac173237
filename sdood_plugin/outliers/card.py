"""README.md of an outlier set: what it is, how it was made, what its labels mean, under which terms; and a few examples."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.utils import make_grid

from ..artifacts import atomic_path, write_text
from ..config import KINDS, SelectionConfig
from ..data.images import spread
from .dataset import OutlierSet
from .manifest import MEANINGS
from .quality import NEAR_DUPLICATE
from .select import kinds, read_verdicts

EXAMPLES, SHOWN_SIDE = 12, 64

_CARD = """# {title}

![Examples](examples.png)

One column an image, from top to bottom: {strips}.

Made by `sdood generate` (sdood_plugin {version}{commit}): every source image was noised to S and denoised by a
class-conditional diffusion model, guided {guided}. To make it again: `sdood generate --config config.yaml --out NEW`, with
config.yaml of the run folder and the source images.

{facts}

## What is here

- `images/`: {format}, {side} x {side}, a folder for every 1,000 sources.
- `imglist.txt`: `file label`, one line an image. **The label is that of the SOURCE image ({label})**, not what the image shows.
- `manifest.csv`: one row an image, columns below.
- `meta.json`: settings, hashes of the models, of the sources and of the manifest, versions.

{selected}

{heldout}

{columns}

## By label

{labels}

Frechet distance (FID with Inception weights), kernel distance, precision, recall and diversity, each with its n, are in
`inspection/quality.json` of the run folder; `sdood inspect FOLDER --quality --images SOURCES --out REPORT` measures them again.

## Terms and citation

The images derive from the source images{data}: the licence and the terms of the SOURCE images hold for them, nothing is
added to them here. They are made for training and testing out-of-distribution detectors. They carry over what the sources
show, people and private things included.

Cite the source images as their authors ask, and the method: Yoon et al., *Diffusion-based Semantic-Discrepant Outlier
Generation for Out-of-Distribution Detection*; made with sdood_plugin {version}.
"""
_GUIDED = {
    "other": "towards one wrong class, drawn at random",
    "away": "away from the source's own class",
    "blend": "between two wrong classes, drawn at random",
    "blend-own": "between the source's own class and a wrong one, drawn at random",
    "same": "towards the source's own class",
}


def write_card(folder: Path, sources: torch.Tensor | None = None, controls: Path | None = None) -> None:
    """Write README.md and examples.png beside the lists of a finished set.

    Args:
        folder: The set.
        sources: uint8 (N, 3, H, W), the images it was made of, to show above their outliers.
        controls: A finished set of same-class controls to show between sources and outliers.
    """
    made = OutlierSet(folder)
    meta, config = made.meta, made.meta["config"]
    strips = _examples(made, sources, OutlierSet(controls) if controls is not None else None)
    _write_figure(folder / "examples.png", list(strips.values()))
    what = "same-class controls" if config["mode"] == "same" else "semantic-discrepant outliers"
    chosen, data = meta.get("selections", []), meta.get("data")
    text = _CARD.format(
        title=f"{len(made):,} {what}" + (f", selected from {chosen[0]['of']['count']:,}" if chosen else ""),
        strips=", ".join(strips),
        version=meta["versions"]["sdood_plugin"],
        commit=f", commit {meta['commit']}" if meta.get("commit") else "",
        guided=_GUIDED[config["mode"]],
        facts=_table(("", ""), _facts(made).items()),
        format={"png": "PNG", "webp": "lossless WebP"}[config["format"]],
        side=meta["image_size"],
        label=_label(meta),
        selected=_selected(chosen),
        heldout=_heldout(meta),
        columns=_table(("column", ""), ((f"`{name}`", MEANINGS[name]) for name in made.manifest.columns)),
        labels=_by_label(made),
        data=f" ({data})" if data else "",
    )
    write_text(folder / "README.md", text)


def _facts(made: OutlierSet) -> dict[str, Any]:
    """What a set was made with, by name."""
    meta, config = made.meta, made.meta["config"]
    total = f" of the {meta['training_images']:,} training images" if "training_images" in meta else ""
    weights = _trained_from(meta.get("reference_weights"))
    judge = f"`{meta['reference_sha256'][:12]}`, {meta.get('reference_backbone', 'a network')} {weights}"
    started = meta.get("label_weights")
    clusterer = f" on features of {meta['label_backbone']} {_trained_from(started)}" if started else ""
    return {
        "data": meta.get("data", "not recorded"),
        "sources": f"{len(made.sources.unique()):,}{total}, outliers made of each: {config['per_source']}",
        "labels": _label(meta) + clusterer,
        "classes": meta["classes"],
        "mode": config["mode"],
        "guidance weight w": "unused" if config["mode"] == "same" else config["guidance_weight"],
        "S / T": config["start_fraction"],
        "T": meta["diffusion"]["timesteps"],
        "sampler": f"{config['sampler']}, {config['sampling_steps']} steps",
        "seed": meta["seed"],
        "U-Net": f"`{meta['unet_sha256'][:12]}`, trained from random weights",
        "reference classifier": judge if meta["reference_sha256"] else "none",
    }


def _label(meta: dict[str, Any]) -> str:
    """What a set's labels are."""
    source = meta.get("label_source")
    return {None: "of an origin that was not recorded", "given": "a given label"}.get(
        source, f"a pseudo-label: its cluster by {source}"
    )


def _trained_from(weights: str | None) -> str:
    """How a network came to its weights; `weights` as in meta.json."""
    if weights is None:
        return "trained on training images; what weights it started from was not recorded"
    if weights == "random":
        return "trained on training images only"
    if weights == "clustering":
        return "trained on training images, from the clustering's weights"
    return f"fine-tuned on training images from pre-trained weights {'of timm' if weights == 'hub' else f'`{weights[:12]}`'}"


def _selected(chosen: list[dict[str, Any]]) -> str:
    """What was dropped, selection by selection."""
    if not chosen:
        return (
            "Nothing was selected: images that still show their source's class and images that plainly show another are among\n"
            "these; the manifest says which (`sdood select` makes a subset)."
        )
    lines = ["Made smaller by `sdood select`; what the cards of the sets before say is not repeated here.", ""]
    for step in chosen:
        of, near = step["of"], step["duplicate_distance"]
        dropped = ", ".join(f"{count:,} {name}" for name, count in step["dropped"].items()) or "nothing"
        lines.append(
            f"- of {of['count']:,} (manifest `{of['manifest_sha256'][:12]}`) kept {' and '.join(step['keep'])},"
            f" a flip being another class with more than {step['flip_confidence']} confidence"
            + (f", no duplicate nearer than {near}" if near is not None else "")
            + f"; dropped {dropped}"
        )
    return "\n".join(lines)


def _heldout(meta: dict[str, Any]) -> str:
    """Which sources the models have not seen."""
    if "heldout_images" not in meta:
        return "Which sources were held out of the training of the models was not recorded."
    return (
        f"{meta['heldout_images']:,} of the {meta['training_images']:,} training images were held out when diffusion model and\n"
        "reference classifier were trained (a clustering sees all, without labels), and are among the sources all the same\n"
        "(column `heldout`). The protocol: train a detector on the outliers of the others, calibrate it on those of held-out\n"
        "sources."
    )


def _by_label(made: OutlierSet) -> str:
    """Images of each label and, where a reference classifier has judged them, of each kind."""
    labels, total = made.labels, made.labels >= 0
    columns = {"images": total}
    note = ""
    if made.meta["reference_sha256"]:
        verdicts, sure = read_verdicts(made.manifest, made.folder), SelectionConfig().flip_confidence
        found = kinds(verdicts, sure)
        columns |= {name: found == number for number, name in enumerate(KINDS)}
        columns["near copies"] = verdicts.nearest < NEAR_DUPLICATE
        note = (
            f"\n\nstay: the reference classifier sees the source's label; flip: another class with more than {sure} confidence;\n"
            f"ambiguous: neither; near copies: nearer than {NEAR_DUPLICATE} to a training image."
        )
    groups = {**{str(label): labels == label for label in labels.unique().tolist()}, "all": total}
    rows = ((name, *(f"{int((group & column).sum()):,}" for column in columns.values())) for name, group in groups.items())
    return _table(("label", *columns), rows) + note


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", r"\|")


def _examples(made: OutlierSet, sources: torch.Tensor | None, controls: OutlierSet | None) -> dict[str, torch.Tensor]:
    """Outliers spread over the set, with their sources and controls where these are given: uint8 (K, 3, H, W) each."""
    rows = spread(len(made), min(EXAMPLES, len(made)))
    strips = {"source": sources[made.sources[rows]]} if sources is not None else {}
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
