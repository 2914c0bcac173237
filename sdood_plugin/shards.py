"""An outlier set made on several machines, and a look at a few outliers before any is made: what a run's stages do not cover."""

from __future__ import annotations

from pathlib import Path

from .artifacts import atomic_path
from .config import RunConfig
from .context import Context
from .errors import UsageError
from .generation import make_sets, sample_triplets
from .outliers.card import image_grid
from .run import is_current, locked, run
from .stage_table import BY_NAME

FOLDER = "shards"


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`.

    Raises:
        UsageError: It is not that, or i is none of 1 to n.
    """
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise UsageError("--shard", text, "i/n with i from 1 to n, such as 2/3", "give one of the n parts")
    return int(first), int(second)


def generate_shard(config: RunConfig, folder: Path, shard: tuple[int, int]) -> Path:
    """Make one of n parts of the outlier set, below RUN/shards; several may work at once, on copies of a run folder too.

    Args:
        config: The settings, the same for all shards.
        folder: A run folder with reference network and diffusion model.
        shard: (i, n).

    Returns:
        The shard's folder.

    Raises:
        UsageError: Something that `generate` needs is not trained, or was trained with other settings.
    """
    context = _trained(config, folder)
    into = folder / FOLDER / f"{shard[0]}-of-{shard[1]}"
    make_sets(context, into, shard=shard)
    return into


def merge_shards(config: RunConfig, folder: Path) -> Path:
    """Put the shards below RUN/shards together: every file is verified, nothing is generated; the shards stay.

    Returns:
        The outlier set.

    Raises:
        UsageError: There are none.
        RunError: A shard is missing, was changed, or was made with other settings.
    """
    context = _trained(config, folder)
    shards = sorted(path for path in (folder / FOLDER).glob("*-of-*") if path.is_dir())
    if not shards:
        raise UsageError("--merge", f"no shards in {folder / FOLDER}", "all of them", "make them with --shard i/n")
    with locked(folder, context.is_main):
        make_sets(context, folder, shards=shards)
    run(config, folder, "generate")  # finds all of it whole, and records that it is done
    return folder / "outliers"


def draw_preview(config: RunConfig, folder: Path, count: int) -> Path:
    """RUN/preview.png: a column for each of a few sources, below it the same-class control and the outlier.

    Raises:
        UsageError: Something that `generate` needs is not trained, or no image is asked for.
    """
    if count < 1:
        raise UsageError("--preview", count, "1 or more", "say how many triplets to draw")
    strips = sample_triplets(_trained(config, folder), count)
    with atomic_path(folder / "preview.png") as temporary:
        image_grid(strips).save(temporary, format="PNG")
    return folder / "preview.png"


def _trained(config: RunConfig, folder: Path) -> Context:
    """The run, after making sure that all that `generate` needs is there."""
    context = Context(config, folder)
    for name in BY_NAME["generate"].needs:
        if not is_current(BY_NAME[name], context):
            raise UsageError(
                f"run folder {folder}",
                f"no result of `{name}` with these settings",
                "trained models",
                "run `sdood train-reference` and `sdood train-diffusion` with them first",
            )
    return context
