"""Shards of an outlier set, made apart, put together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..artifacts import disk_error, write_csv
from ..errors import RunError
from .files import read_file
from .manifest import COLUMNS
from .recipe import Recipe
from .storage import STATE, part_file, read_part, set_key
from .writer import make_folders, store


def check_shards(shards: Sequence[Path], recipe: Recipe) -> list[Path]:
    """The shard of every block, after its files were found to be those of their hashes; nothing is written.

    Raises:
        RunError: A shard was made by another recipe or not begun, a block is in none of them, or a file is not what it was.
    """
    for shard in shards:
        key = set_key(shard / STATE)
        if key is None:
            raise RunError(f"shard {shard}", "one that was not begun", "a whole shard", "give that shard's command again")
        if key != recipe.key:
            raise RunError(
                f"shard {shard}",
                "made with other settings, images or models",
                "a shard of this set",
                "remove it, or give the settings it was made with",
            )
    found = []
    for number, block in enumerate(recipe.blocks):
        files = recipe.files(block)
        shard_of_it = next((shard for shard in shards if part_file(shard, number).exists()), None)
        if shard_of_it is None:
            raise RunError(
                f"shards {', '.join(map(str, shards))}",
                f"no block {number} ({files[0]} ...)",
                "all blocks",
                "make the missing shard",
            )
        _rows(shard_of_it, number, files)
        found.append(shard_of_it)
    return found


def adopt(folder: Path, found: Sequence[Path], recipe: Recipe) -> None:
    """Copy to `folder` every block that is not there, each from its shard as `check_shards` gave it.

    Raises:
        RunError: A file is not what it was, or the disk is full.
    """
    for number, (block, shard) in enumerate(zip(recipe.blocks, found, strict=True)):
        files = recipe.files(block)
        if read_part(folder, number, files) is not None:
            continue
        rows = _rows(shard, number, files)
        try:
            make_folders(folder, files)
            for name in files:
                store(folder, name, read_file(shard, name))
        except OSError as error:
            raise disk_error(folder, error) from error
        write_csv(part_file(folder, number), COLUMNS, rows)


def _rows(shard: Path, number: int, files: Sequence[str]) -> list[list[str]]:
    """The rows of a block, whose files are what they were."""
    rows = read_part(shard, number, files)
    if rows is None:
        raise RunError(
            f"shard {shard}",
            f"files of block {number} ({files[0]} ...) that are absent or not what they were",
            "files with the hashes they were written with",
            "give that shard's command again, which makes them again",
        )
    return rows
