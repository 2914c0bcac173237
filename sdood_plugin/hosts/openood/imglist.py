"""Imglists looked through before the host reads them; what would crash an epoch later is one line now."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import UsageError

_LABEL = re.compile(r"-?(0|[1-9][0-9]*)")  # the host reads a label as a Python literal


def check_imglist(imglist: str | Path, data_dir: str | Path, classes: int, *, ood_allowed: bool = True) -> int:
    """The number of images in an imglist whose every line the host can read.

    Args:
        imglist: Lines `relative/path label`; a label below 0 is OOD.
        data_dir: What the paths are relative to.
        classes: C; the host makes one-hot labels, so none may reach it.
        ood_allowed: Whether a label may be below 0; where it is a class to learn or to count right, it may not.

    Raises:
        UsageError: The file is absent, empty or no text, or a line has a space in its path, a leading slash, a label that is
            no integer of the allowed range, or names a file that is not there.
    """
    path, root = Path(imglist), Path(data_dir)
    lines = _lines(path)
    for number, line in enumerate(lines, 1):
        where = f"imglist {path} line {number}"
        name, _, label = line.rpartition(" ")
        if not name or not _LABEL.fullmatch(label):
            raise UsageError(where, repr(line), "`relative/path label` with an integer label", "mend that line")
        if " " in name or name.startswith("/"):
            raise UsageError(
                where, repr(name), "a relative path without spaces", "rename the file: the host splits a line at its first space"
            )
        if int(label) >= classes or (int(label) < 0 and not ood_allowed):
            raise UsageError(
                where,
                f"label {label}",
                f"at most {classes - 1}, {'or below 0 for OOD' if ood_allowed else 'and not below 0'}",
                f"the data set has {classes} classes: check num_classes and the list",
            )
        if not (root / name).is_file():
            raise UsageError(where, f"no file {root / name}", "an image", "check data_dir")
    return len(lines)


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
            "check the dataset YAML",
        ) from error
    if not lines:
        raise UsageError(f"imglist {path}", "no lines", "`relative/path label` lines", "write it again")
    return lines
