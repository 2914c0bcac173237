"""A subset of an outlier set as a set of its own, without generating anything again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from ..artifacts import disk_error, value_hash
from ..config import SelectionConfig
from ..errors import RunError, UsageError
from .card import write_card
from .dataset import OutlierSet
from .files import checked_file
from .manifest import write_lists
from .select import Selection, choose, read_verdicts
from .storage import finished, only_writer, prepare
from .writer import make_folders, store


def select_set(folder: Path, dest: Path, config: SelectionConfig) -> str:
    """Write the outliers of `folder` that `config` keeps to `dest`, as an outlier set of its own.

    Images are hard links to those of `folder` where the file system can and copies elsewhere; each is checked against its
    hash on the way. A call that was killed goes on when it is given again.

    Args:
        folder: A finished outlier set with a reference classifier's verdicts.
        dest: A new or empty folder, or what an earlier call for the same selection left.
        config: What to keep.

    Returns:
        What was kept and what was dropped, in words.

    Raises:
        UsageError: One folder lies in the other, or `dest` holds something else.
        RunError: `folder` is no whole set, or nothing is left of it.
    """
    if dest.resolve().is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(dest.resolve()):
        raise UsageError("DEST", dest, f"a folder apart from {folder}", "choose another folder")
    whole = OutlierSet(folder)
    chosen = select(whole, config)
    settings = {**dataclasses.asdict(config), "of": {name: whole.meta[name] for name in ("key", "count", "manifest_sha256")}}
    key = value_hash(settings)
    kept = whole.manifest.take(chosen.kept.nonzero()[:, 0].numpy())
    linked = 0

    def rows() -> Iterator[list[str]]:
        nonlocal linked
        for row in kept:
            linked += _place(folder, dest, row["file"], row["sha256"])
            yield list(row.values())

    with only_writer(dest):
        selections = [*whole.meta.get("selections", []), {**settings, "dropped": chosen.dropped}]
        meta = {**whole.meta, "key": key, "selections": selections}
        prepare(dest, meta, replace=False)
        write_lists(dest, rows(), kept.columns, meta)
        write_card(dest)
        finished(dest)
    how = "hard links" if linked == len(kept) else "copies" if not linked else f"{linked} hard links, the others copies"
    return f"{dest}: {len(kept)} of {len(whole)} outliers ({how}); dropped {_words(chosen)}"


def select(made: OutlierSet, config: SelectionConfig) -> Selection:
    """Which outliers of a set `config` keeps.

    Raises:
        RunError: None, or the set has no verdicts and something is to be dropped.
    """
    if config.keeps_all:
        return Selection(made.labels >= 0, {})
    chosen = choose(read_verdicts(made.manifest, made.folder), config)
    if not chosen.kept.any():
        raise RunError(
            f"selection of {made.folder}", f"no outlier left (dropped {_words(chosen)})", "one or more", "keep more kinds"
        )
    return chosen


def _words(chosen: Selection) -> str:
    return ", ".join(f"{count} {name}" for name, count in chosen.dropped.items()) or "nothing"


def _place(folder: Path, dest: Path, name: str, sha256: str) -> bool:
    """Link or copy one file, checked by its hash; whether it is a link."""
    data, path = checked_file(folder, name, sha256), dest / name
    try:
        make_folders(dest, [name])
        path.unlink(missing_ok=True)
        try:
            os.link(folder / name, path, follow_symlinks=False)
            return True
        except OSError:  # another file system, or one without links
            store(dest, name, data)
            return False
    except OSError as error:
        raise disk_error(path, error) from error
