"""Imglists looked through before the host reads them; what would crash an epoch later is one line now."""

from __future__ import annotations

from pathlib import Path

from ...errors import UsageError


def check_imglist(imglist: str | Path, data_dir: str | Path, classes: int) -> int:
    """The number of images in an imglist whose every line the host can read.

    Args:
        imglist: Lines `relative/path label`; a label below 0 is OOD.
        data_dir: What the paths are relative to.
        classes: C; the host makes one-hot labels, so none may reach it.

    Raises:
        UsageError: The file is absent or empty, or a line has a space in its path, a leading slash, a label that is no
            integer below C, or names a file that is not there.
    """
    path, root = Path(imglist), Path(data_dir)
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UsageError(
            f"imglist {path}", error.strerror, "a text file of `relative/path label` lines", "check the dataset YAML"
        ) from error
    if not lines:
        raise UsageError(f"imglist {path}", "no lines", "`relative/path label` lines", "write it again")
    for number, line in enumerate(lines, 1):
        where = f"imglist {path} line {number}"
        name, _, label = line.rpartition(" ")
        if not name or not label.removeprefix("-").isdigit():
            raise UsageError(where, repr(line), "`relative/path label` with an integer label", "mend that line")
        if " " in name or name.startswith("/"):
            raise UsageError(
                where, repr(name), "a relative path without spaces", "rename the file: the host splits a line at its first space"
            )
        if int(label) >= classes:
            raise UsageError(
                where,
                f"label {label}",
                f"at most {classes - 1}, or below 0 for OOD",
                f"the data set has {classes} classes: check num_classes",
            )
        if not (root / name).is_file():
            raise UsageError(where, f"no file {root / name}", "an image", "check data_dir")
    return len(lines)
