"""Imglists looked through before a host reads them; what would crash or be miscounted an epoch later is one line now."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import UsageError

_LABEL = re.compile(r"-?(0|[1-9][0-9]*)")  # OpenOOD reads a label as a Python literal


def check_imglist(imglist: str | Path, data_dir: str | Path, classes: int, *, ood_allowed: bool = True) -> int:
    """The number of images in an imglist whose every line the host can read.

    Args:
        imglist: Lines `relative/path label`; a label below 0 is OOD.
        data_dir: What the paths are relative to.
        classes: C; the host makes one-hot labels, so none may reach it.
        ood_allowed: Whether a label may be below 0; where it is a class to learn or to count right, it may not.

    Raises:
        UsageError: As `listed_images`, or a line names a file that is not there.
    """
    listed = listed_images(imglist, classes, ood_allowed=ood_allowed)
    for number, name in listed:
        if not (Path(data_dir) / name).is_file():
            raise UsageError(f"imglist {imglist} line {number}", f"no file {Path(data_dir) / name}", "an image", "check data_dir")
    return len(listed)


def listed_images(
    imglist: str | Path, classes: int, *, ood_allowed: bool = True, comments: bool = False
) -> list[tuple[int, str]]:
    """The (line number, relative path) of every image in an imglist, which need not be there.

    Args:
        imglist: Lines `relative/path label`; a label below 0 is OOD.
        classes: C, which no label may reach; 0 for a list of OOD images alone.
        ood_allowed: Whether a label may be below 0.
        comments: Pass over blank lines and those that begin with #, as pytorch-ood does and OpenOOD does not.

    Raises:
        UsageError: The file is absent, without lines or no text, or a line has a space in its path, a leading slash, or a label
            that is no integer of the allowed range.
    """
    path = Path(imglist)
    listed = []
    for number, line in enumerate(_lines(path), 1):
        if comments and line.strip()[:1] in ("", "#"):
            continue
        where = f"imglist {path} line {number}"
        name, _, label = line.rpartition(" ")
        if not name or not _LABEL.fullmatch(label):
            raise UsageError(where, repr(line), "`relative/path label` with an integer label", "mend that line")
        if " " in name or name.startswith("/"):
            raise UsageError(
                where, repr(name), "a relative path without spaces", "rename the file: the host splits a line at its first space"
            )
        _require_label(where, int(label), classes, ood_allowed)
        listed.append((number, name))
    return listed


def _require_label(where: str, label: int, classes: int, ood_allowed: bool) -> None:
    if label < classes and (label >= 0 or ood_allowed):
        return
    if not classes:
        raise UsageError(where, f"label {label}", "one below 0 in a list of OOD images", "write -1: the host counts others as ID")
    raise UsageError(
        where,
        f"label {label}",
        f"at most {classes - 1}, {'or below 0 for OOD' if ood_allowed else 'and not below 0'}",
        f"the data set has {classes} classes: check num_classes and the list",
    )


def is_absent(imglist: str | Path, data_dir: str | Path) -> bool:
    """Whether a data set is not there: no list, or none of the images it names (the host's lists come in one archive).

    Raises:
        UsageError: The list is empty or no text.
    """
    path, root = Path(imglist), Path(data_dir)
    return not path.is_file() or not any((root / line.partition(" ")[0]).is_file() for line in _lines(path))


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"imglist {path}",
            getattr(error, "strerror", error),
            "a text file of `relative/path label` lines",
            "check the path of the list",
        ) from error
    if not lines:
        raise UsageError(f"imglist {path}", "no lines", "`relative/path label` lines", "write it again")
    return lines
