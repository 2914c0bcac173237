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


def adopt(folder: Path, shards: Sequence[Path], recipe: Recipe) -> None:
    """Copy the blocks of all shards to `folder`, each after its files were found to be those of its hashes.

    Raises:
        RunError: A shard was made by another recipe, a block is in none of them, or a file is not what it was.
    """
    for shard in shards:
        if set_key(shard / STATE) != recipe.key:
            raise RunError(
                f"shard {shard}",
                "made with other settings, images or models",
                "a shard of this set",
                "remove it, or give the settings it was made with",
            )
    for number, block in enumerate(recipe.blocks):
        files = recipe.files(block)
        if read_part(folder, number, files) is not None:
            continue
        found = next((shard for shard in shards if part_file(shard, number).exists()), None)
        if found is None:
            raise RunError(
                f"shards {', '.join(map(str, shards))}",
                f"no block {number} ({files[0]} ...)",
                "all blocks",
                "make the missing shard",
            )
        rows = read_part(found, number, files)
        if rows is None:
            raise RunError(
                f"shard {found}",
                f"files of block {number} ({files[0]} ...) that are absent or not what they were",
                "files with the hashes they were written with",
                "give that shard's command again, which makes them again",
            )
        try:
            make_folders(folder, files)
            for name in files:
                store(folder, name, read_file(found, name))
        except OSError as error:
            raise disk_error(folder, error) from error
        write_csv(part_file(folder, number), COLUMNS, rows)
