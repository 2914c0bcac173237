"""The folder of an outlier set while it is made: whose it is, who writes in it, and which blocks of it are whole."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..artifacts import disk_error, only_process, read_json, write_json
from ..errors import RunError, UsageError
from .files import read_file
from .manifest import COLUMNS

STATE, META, PARTS = "in-progress.json", "meta.json", "parts"
_OWN = {META, STATE}  # what marks a folder as ours


def require_ours(folder: Path) -> None:
    """Make sure that a set may be written to `folder`.

    Raises:
        UsageError: It holds something that is no outlier set, or is no folder.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"folder {folder}", "a link or a file", "a folder", "move it away; nothing was written")
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if any(not name.startswith(".") for name in present) and not present & _OWN:
        raise UsageError(
            f"folder {folder}",
            f"{sorted(present)[0]} and no {META}",
            "a new folder, an empty one or an outlier set",
            "choose another folder or move that away; nothing was written",
        )


@contextlib.contextmanager
def only_writer(folder: Path, is_main: bool = True) -> Iterator[None]:
    """Hold the folder against other writers; the other processes of one launch rely on the main one.

    Raises:
        RunError: Another process writes in it, or nobody can.
    """
    if not is_main:
        yield
        return
    require_ours(folder)
    with only_process(folder, "outlier set"):
        yield


def prepare(folder: Path, key: str) -> None:
    """Make the folder one in which the set of `key` is being made; images of another key are removed, its own are kept.

    Raises:
        RunError: A folder in it is a symbolic link, or the disk refuses.
    """
    link = next((folder / name for name in ("images", PARTS) if (folder / name).is_symlink()), None)
    if link is not None:
        raise RunError(f"folder {link}", "a symbolic link", "a folder", "remove the link")
    try:
        for left in folder.glob(".*.*"):  # half-written lists of a kill
            left.unlink()
        if key not in (set_key(folder / META), set_key(folder / STATE)):
            write_json(folder / STATE, {"key": "removing another set"})  # a kill from here on leaves a folder that is ours
            for name in ("images", PARTS):
                if (folder / name).exists():
                    shutil.rmtree(folder / name)
            drop_lists(folder)
        write_json(folder / STATE, {"key": key})
    except OSError as error:
        raise disk_error(folder, error) from error


def drop_lists(folder: Path) -> None:
    """Remove what says that the set is finished."""
    for name in (META, "manifest.csv", "imglist.txt", "README.md", "examples.png"):
        (folder / name).unlink(missing_ok=True)


def finished(folder: Path) -> None:
    """Remove what only a set in the making needs."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def remove_set(folder: Path) -> None:
    """Remove an outlier set that is not wanted any more.

    Raises:
        UsageError: The folder holds something else.
    """
    if folder.exists():
        require_ours(folder)
        prepare(folder, "")
        shutil.rmtree(folder)


def set_key(path: Path) -> str | None:
    """The key in a meta.json or in-progress.json; None where there is none."""
    try:
        return read_json(path).get("key") if path.exists() else None
    except (RunError, AttributeError):  # half a file, or no object
        return None


def part_file(folder: Path, number: int) -> Path:
    """Where the manifest's rows of a block wait until the set is finished."""
    return folder / PARTS / f"{number:07d}.csv"


def read_part(folder: Path, number: int, files: Sequence[str]) -> list[list[str]] | None:
    """The rows of a block that was written whole; None where rows or files are absent or are not what they were.

    Args:
        folder: The set.
        number: The block.
        files: Names of its files, in order.
    """
    try:
        with part_file(folder, number).open(newline="", encoding="utf-8") as stream:
            header, *rows = csv.reader(stream)
    except (OSError, ValueError, csv.Error):
        return None
    if tuple(header) != COLUMNS or [row[0] for row in rows if len(row) == len(COLUMNS)] != list(files) or len(rows) != len(files):
        return None
    try:
        whole = all(hashlib.sha256(read_file(folder, row[0])).hexdigest() == row[1] for row in rows)
    except RunError:
        return None
    return rows if whole else None
