"""Generate an outlier set: every source image noised to S and denoised by a guidance mode, as images, lists and a data card."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ..artifacts import file_hash, read_json, write_csv
from ..progress import progress_bar
from .blocks import identities
from .card import write_card
from .dataset import read_images
from .manifest import COLUMNS, open_manifest, write_lists
from .merge import adopt, check_shards
from .recipe import Recipe
from .sample import sample_batch
from .storage import META, drop_lists, finished, made_on, note_devices, only_writer, part_file, prepare, read_part, set_key
from .verdicts import Judge, Referee
from .writer import BlockWriter


def generate(
    recipe: Recipe,
    unet: UNet2DModel,
    folder: Path,
    *,
    accelerator: Accelerator,
    judge: Judge | None = None,
    shard: tuple[int, int] | None = None,
    shards: Sequence[Path] = (),
    controls: Path | None = None,
    name: str = "outliers",
) -> None:
    """Write an outlier set to `folder`; blocks that are there already, by the hashes of their files, are kept.

    Every process makes its share of the blocks; the main one writes the lists and the data card at the end. In the
    lists an outlier carries its SOURCE's pseudo-label. The files do not depend on the number of processes or shards,
    nor on how often the work was killed.

    Args:
        recipe: What to make, and of what.
        unet: The diffusion model on the accelerator's device.
        folder: Where it goes: a new folder, an empty one, or an outlier set, which is replaced if its recipe is another.
        accelerator: Device and processes.
        judge: The reference classifier of the recipe's `reference_sha256`.
        shard: (i, n): make only every n-th block, from the i-th on (from 1), and write no lists.
        shards: Folders with all n shards of this recipe, whose blocks are taken over once their hashes are verified.
        controls: A finished set of same-class controls, for the data card.
        name: Name on the progress bar.

    Raises:
        UsageError: The folder holds something else.
        RunError: Another process writes there, a shard is incomplete, or the disk is full.
    """
    main, earlier = accelerator.is_main_process, {}
    with only_writer(folder, main):
        if main:
            found = check_shards(shards, recipe) if shards else []  # before anything of the folder is touched
            earlier = _open(folder, recipe)
            if shards:
                note_devices(folder, [device for shard_folder in shards for device in made_on(shard_folder)])
                adopt(folder, found, recipe)
        accelerator.wait_for_everyone()
        first, step = (shard[0] - 1, shard[1]) if shard is not None else (0, 1)
        mine = range(first, len(recipe.blocks), step)[accelerator.process_index :: accelerator.num_processes]
        _make(recipe, unet, folder, mine, accelerator, judge, name)
        accelerator.wait_for_everyone()
        if main and shard is None:
            meta = {**recipe.meta, **earlier, "made_on": made_on(folder)}
            write_lists(folder, _rows(folder, len(recipe.blocks)), COLUMNS, meta)
            write_card(folder, recipe.sources.images, controls)
            finished(folder)
        accelerator.wait_for_everyone()


def _open(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Prepare the folder; a finished set of this recipe is taken apart into blocks again, so that each can be checked.

    Returns:
        The `commit` that such a set was made with, which stays its own when a file of it is made again.
    """
    again = set_key(folder / META) == recipe.key
    prepare(folder, recipe.meta)
    if not again:
        return {}
    manifest, meta = folder / "manifest.csv", read_json(folder / META)
    if manifest.is_file() and file_hash(manifest) == meta.get("manifest_sha256"):
        rows = (list(row.values()) for row in open_manifest(manifest, COLUMNS[:1])[0])
        for number, block in enumerate(recipe.blocks):
            write_csv(part_file(folder, number), COLUMNS, islice(rows, len(block.jobs)))
    drop_lists(folder)
    return {"commit": meta["commit"]} if "commit" in meta else {}


def _make(
    recipe: Recipe, unet: UNet2DModel, folder: Path, mine: Sequence[int], accelerator: Accelerator, judge: Judge | None, name: str
) -> None:
    """Make those of the blocks that are not there; those judged by another classifier are judged again."""
    todo: list[tuple[int, bool]] = []
    for number in mine:
        rows = read_part(folder, number, recipe.files(recipe.blocks[number]))
        if rows is None or any(row[COLUMNS.index("reference")] != recipe.reference for row in rows):
            todo.append((number, rows is not None))
    if not todo:
        return
    if accelerator.is_main_process:
        note_devices(folder, [_described(accelerator.device)])
    referee = Referee(recipe.sources.images, judge, accelerator.device)
    total = sum(len(recipe.blocks[number].jobs) for number, _ in todo)
    with (
        progress_bar(name, total, "image") as bar,
        BlockWriter(folder, recipe.config.format) as writer,
    ):
        for number, there in todo:
            block = recipe.blocks[number]
            count, size = len(block.jobs), recipe.batch_size
            if there:
                made = read_images(folder, recipe.files(block))
            else:
                made = sample_jobs(recipe, unet, block.jobs, accelerator.device, size)
            judged = _padded(block.jobs[:, 0], size)
            verdicts = referee(_padded(made, size), judged, recipe.labels[judged])
            columns = {**recipe.columns(block), **{column: values[:count] for column, values in verdicts.items()}}
            writer.put(number, columns, made)
            bar.update(count)


def _described(device: torch.device) -> dict[str, Any]:
    """What of a device the last bits of an image may depend on."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": device.type, "threads": torch.get_num_threads()}


def sample_jobs(recipe: Recipe, unet: UNet2DModel, jobs: torch.Tensor, device: torch.device, size: int) -> torch.Tensor:
    """uint8 (B, 3, H, W) on the CPU: the outliers of jobs int64 (B, 2) of one S, denoised in one batch padded to `size`."""
    padded = _padded(jobs, size)
    made = sample_batch(
        unet,
        recipe.sources.images[padded[:, 0]].to(device),
        recipe.labels[padded[:, 0]].to(device),
        identities(padded),
        recipe.config,
        recipe.diffusion,
        classes=recipe.classes,
        seed=recipe.seed,
        precision=recipe.precision,
    )
    return made[: len(jobs)].cpu()


def _padded(rows: torch.Tensor, size: int) -> torch.Tensor:
    """The rows with the last one repeated up to `size`."""
    return torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])


def _rows(folder: Path, count: int) -> Iterator[list[str]]:
    """The rows of all blocks, one block in memory at a time."""
    for number in range(count):
        with part_file(folder, number).open(newline="", encoding="utf-8") as stream:
            yield from islice(csv.reader(stream), 1, None)
