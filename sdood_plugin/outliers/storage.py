"""The folder of an outlier set while it is made: whose it is, who writes in it, and which blocks of it are whole."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifacts import changes, disk_error, only_process, read_json, write_json
from ..errors import RunError, UsageError
from .files import read_file
from .manifest import COLUMNS

STATE, META, PARTS = "in-progress.json", "meta.json", "parts"
LISTS = (META, "manifest.csv", "imglist.txt", "README.md", "examples.png")
_REMOVED = "0" * 64  # the key of no recipe: a set that is being removed

log = logging.getLogger(__name__)


def require_ours(folder: Path) -> None:
    """Make sure that a set may be written to `folder`.

    Raises:
        UsageError: It holds something that is no outlier set, or is no folder.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"folder {folder}", "a link or a file", "a folder", "move it away; nothing was written")
    own = {folder / ".lock", *_half_written(folder)}
    strange = sorted(path.name for path in folder.iterdir() if path not in own) if folder.exists() else []
    if strange and set_key(folder / META) is None and set_key(folder / STATE) is None:
        raise UsageError(
            f"folder {folder}",
            f"{strange[0]} and no {META} of ours",
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


def _half_written(folder: Path) -> list[Path]:
    """Lists that a kill left half-written, by the names `atomic_path` gives them."""
    return [path for name in (*LISTS, STATE) for path in folder.glob(f".{name}.*")]


def prepare(folder: Path, meta: Mapping[str, Any], *, replace: bool = True) -> None:
    """Make the folder one in which the set of `meta` is being made; images of another key are removed, its own are kept.

    Args:
        folder: The set; it is ours.
        meta: What its meta.json will say, `key` among it.
        replace: Whether a set of another key may be removed.

    Raises:
        UsageError: There is a set of another key, which may not be removed.
        RunError: A folder in it is a symbolic link, or the disk refuses.
    """
    link = next((folder / name for name in ("images", PARTS) if (folder / name).is_symlink()), None)
    if link is not None:
        raise RunError(f"folder {link}", "a symbolic link", "a folder", "remove the link")
    there = [read_json(path) for path in (folder / META, folder / STATE) if set_key(path) is not None]
    same = next((found for found in there if found["key"] == meta["key"]), None)
    if there and same is None and not replace:
        raise UsageError(f"folder {folder}", "another outlier set", "a new or empty folder", "choose another folder")
    try:
        for left in _half_written(folder):
            left.unlink()
        if same is None:
            if there and meta["key"] != _REMOVED:
                log.info("%s: another set is removed: %s", folder, _difference(there[0], meta))
            write_json(folder / STATE, {"key": _REMOVED})  # a kill from here on leaves a folder that is ours
            for name in ("images", PARTS):
                if (folder / name).exists():
                    shutil.rmtree(folder / name)
            drop_lists(folder)
        write_json(folder / STATE, {**meta, "made_on": (same or meta).get("made_on", [])})
    except OSError as error:
        raise disk_error(folder, error) from error


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Which parts of a recipe changed, in words."""
    known = {name: value for name, value in new.items() if name in old and name not in ("key", "reference_sha256", "made_on")}
    return changes(old, known) or "nothing is known of how it was made"


def made_on(folder: Path) -> list[dict[str, Any]]:
    """The devices that the images of a set in the making were made on so far."""
    return read_json(folder / STATE).get("made_on", [])  # type: ignore[no-any-return]


def note_devices(folder: Path, devices: Iterable[dict[str, Any]]) -> None:
    """Add to what in-progress.json says of the devices, and say so where they are not all alike."""
    known = made_on(folder)
    found = [*known]
    for device in devices:
        if device not in found:
            found.append(device)
    if len(found) > max(1, len(known)):
        log.warning("%s: made on %s: the last bits of its images may depend on which", folder, " and on ".join(map(str, found)))
    write_json(folder / STATE, {**read_json(folder / STATE), "made_on": found})


def drop_lists(folder: Path) -> None:
    """Remove what says that the set is finished."""
    for name in LISTS:
        (folder / name).unlink(missing_ok=True)


def finished(folder: Path) -> None:
    """Remove what only a set in the making needs."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def remove_set(folder: Path) -> None:
    """Remove an outlier set that is not wanted any more, but nothing else that lies in its folder.

    Raises:
        UsageError: The folder holds something else.
    """
    if folder.exists():
        require_ours(folder)
        prepare(folder, {"key": _REMOVED})
        for name in (STATE, ".lock"):
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def set_key(path: Path) -> str | None:
    """The key in a meta.json or in-progress.json that we wrote; None where there is none."""
    try:
        found = read_json(path)
    except (RunError, OSError):  # absent, half a file, a folder
        return None
    hashes = ("key", "manifest_sha256") if path.name == META else ("key",)
    ours = isinstance(found, dict) and all(re.fullmatch("[0-9a-f]{64}", str(found.get(name))) for name in hashes)
    return found["key"] if ours else None


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
