"""The image files of an outlier set: read without leaving the folder, decoded, encoded."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import RunError


def check_name(name: str, where: object) -> None:
    """Make sure that a file name of a list stays inside its folder.

    Raises:
        RunError: It is empty, absolute, climbs out, or no portable path of ASCII letters.
    """
    parts = name.split("/")
    if (
        not name.isascii()
        or not all(parts)
        or ".." in parts
        or "." in parts
        or any(bad in name for bad in ("\\", "\0", "\n", ":"))
    ):
        raise RunError(f"file name in {where}", repr(name), "a path inside the folder, in ASCII", "do not use this outlier set")


def read_file(folder: Path, name: str) -> bytes:
    """The bytes of a set's file; neither it nor the folders between may be symbolic links.

    Raises:
        RunError: It is absent, leaves the folder or is no plain file.
    """
    check_name(name, folder)
    path = folder / name
    try:
        for parent in list(path.parents)[: name.count("/")]:
            if parent.is_symlink():
                raise OSError(f"{parent} is a symbolic link")
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise OSError("no plain file")
            return stream.read()
    except OSError as error:
        kind = path.suffix.lstrip(".").upper()
        raise RunError(f"image {path}", error, f"a readable, whole {kind}", "generate the outlier set again") from error


def checked_file(folder: Path, name: str, sha256: str | None) -> bytes:
    """The bytes of a set's file, after making sure that they have this hash, if one is given.

    Raises:
        RunError: They have not, or the file cannot be read.
    """
    data = read_file(folder, name)
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise RunError(f"image {folder / name}", f"SHA-256 {found}", f"{sha256} as in the manifest", "generate the set again")
    return data


def decode(data: bytes, path: Path) -> np.ndarray:
    """uint8 (H, W, 3) of an image file's bytes.

    Raises:
        RunError: They are no whole image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        kind = path.suffix.lstrip(".").upper()
        raise RunError(f"image {path}", error, f"a readable, whole {kind}", "generate the outlier set again") from error


def encode(image: torch.Tensor, suffix: str) -> bytes:
    """A uint8 (3, H, W) image as PNG or lossless WebP."""
    data = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    if suffix == "png":
        picture.save(data, format="PNG")
    else:
        picture.save(data, format="WEBP", lossless=True, method=0)  # slower methods save 4 % and take ten times as long
    return data.getvalue()
