"""An outlier set on disk, read back: as a torch Dataset, as tensors on a device, in parts; every file by its hash."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..artifacts import file_hash, read_json
from ..errors import RunError, UsageError
from .files import check_name, checked_file, decode
from .manifest import Manifest, open_manifest
from .storage import LISTS, PARTS, STATE

_CHUNK = 256  # files a thread reads at once
_META = {  # what others rely on
    "key": str,
    "count": int,
    "manifest_sha256": str,
    "image_size": int,
    "classes": int,
    "sources_sha256": str,
    "labels_sha256": str,
}
_COLUMNS = ("file", "sha256", "source_label", "source_index", "guidance_weight", "start_fraction")


class Tensors(NamedTuple):
    """Whole columns of a set, on one device."""

    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor  # int64 (N,), the sources' pseudo-labels
    sources: torch.Tensor  # int64 (N,), indices of the source images


def read_images(folder: Path, files: Sequence[str], hashes: Sequence[str] | None = None) -> torch.Tensor:
    """uint8 (N, 3, H, W) of image files below `folder`, all of one size.

    Args:
        folder: The set.
        files: Names of the files.
        hashes: Their SHA-256, where they are to be checked.

    Raises:
        RunError: A file is absent, broken, not of its hash, of another size, or its path leaves the folder.
    """

    def read(start: int) -> np.ndarray:
        rows = range(start, min(start + _CHUNK, len(files)))
        data = [checked_file(folder, files[row], hashes[row] if hashes else None) for row in rows]
        arrays = [decode(content, folder / files[row]) for content, row in zip(data, rows, strict=True)]
        odd = next((row for row, array in zip(rows, arrays, strict=True) if array.shape != arrays[0].shape), None)
        if odd is not None:
            raise _odd_size(folder / files[odd])
        return np.stack(arrays)

    if not files:
        raise RunError(f"folder {folder}", "no images", "an outlier set with images", "generate it again")
    with ThreadPoolExecutor() as pool:
        chunks = list(pool.map(read, range(0, len(files), _CHUNK)))
    other = next((number for number, chunk in enumerate(chunks) if chunk.shape[1:] != chunks[0].shape[1:]), None)
    if other is not None:
        raise _odd_size(folder / files[other * _CHUNK])
    return torch.from_numpy(np.concatenate(chunks)).permute(0, 3, 1, 2).contiguous()


def _odd_size(path: Path, expected: str = "that of the first image") -> RunError:
    return RunError(f"image {path}", "another size", expected, "generate the outlier set again")


def _check(path: Path, name: str, column: Sequence[str], holds: Callable[[str], bool], expected: str) -> None:
    """Make sure that every value of a manifest's column is what it must be."""
    odd = next((row for row, value in enumerate(column, 1) if not holds(value)), None)
    if odd is not None:
        raise RunError(f"{name} in row {odd} of {path}", repr(column[odd - 1]), expected, "generate it again")


def _is_finite(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


class OutlierSet(Dataset):
    """The outliers of a folder written by `sdood generate`, or of several.

    An item is (image uint8 (3, H, W), source pseudo-label, source index). Files are read when asked for and refused
    unless they are what they were when the set was made; `images` and `tensors` read them all.

    Args:
        folder: The set.

    Attributes:
        folder: The set; of a joined one the first.
        meta: The settings it was made with.
        manifest: The manifest's rows, strings by column name, read from disk when asked for.
        labels: int64 (N,), each outlier's SOURCE pseudo-label.
        sources: int64 (N,), index of the source image.

    Raises:
        RunError: The folder is no finished outlier set, or its lists were changed or say what cannot be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        meta = self.folder / "meta.json"
        if not meta.is_file():
            ours = "a finished outlier set, as `sdood generate` writes it"
            raise RunError(f"folder {folder}", "no meta.json", ours, "check the path; a run's set is its OUT/outliers")
        self.meta: dict[str, Any] = read_json(meta)
        if not isinstance(self.meta, dict):
            raise RunError(f"file {meta}", type(self.meta).__name__, "an object", "copy the whole folder again")
        again = "copy the whole folder again, or generate it again"
        for name, kind in _META.items():
            if not isinstance(self.meta.get(name), kind):
                raise RunError(f"`{name}` in {meta}", repr(self.meta.get(name)), f"a value of type {kind.__name__}", again)
        path = self.folder / "manifest.csv"
        self.manifest: Manifest
        self.manifest, (files, hashes, labels, sources, *numbers) = open_manifest(path, _COLUMNS)
        for file in files:
            check_name(file, self.folder)
        if len(files) != self.meta.get("count"):
            raise RunError(f"manifest {path}", f"{len(files)} rows", f"{self.meta.get('count')} as in meta.json", again)
        if file_hash(path) != self.meta.get("manifest_sha256"):
            raise RunError(f"manifest {path}", "other bytes than when it was made", "its SHA-256 as in meta.json", again)
        if len(set(files)) != len(files):
            raise RunError(f"manifest {path}", "a file twice", "each file once", again)
        _check(path, "sha256", hashes, lambda value: bool(re.fullmatch("[0-9a-f]{64}", value)), "64 hex digits")
        for name, column in (("source_label", labels), ("source_index", sources)):
            _check(path, name, column, lambda value: bool(re.fullmatch("[0-9]{1,18}", value)), "integers from 0 on")
        for name, column in zip(_COLUMNS[4:], numbers, strict=True):
            _check(path, name, column, _is_finite, "finite numbers")
        self._files, self._hashes = np.array(files, dtype=bytes), np.array(hashes, dtype=bytes)
        self.labels = torch.tensor([int(value) for value in labels], dtype=torch.int64)
        self.sources = torch.tensor([int(value) for value in sources], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        image = self.images[index] if "images" in self.__dict__ else self.read(torch.tensor([index % len(self)]))[0]
        return image, int(self.labels[index]), int(self.sources[index])

    @cached_property
    def images(self) -> torch.Tensor:
        """uint8 (N, 3, H, W), all of them, kept from then on."""
        return self.read(torch.arange(len(self)))

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """uint8 (M, 3, H, W): the images at int64 positions (M,), read from disk.

        Raises:
            RunError: A file is absent or not what it was when the set was made.
        """
        chosen = rows.numpy()
        which = self.manifest.which[chosen]
        parts = []
        for number in dict.fromkeys(which.tolist()):  # the folders of a joined set
            mine = which == number
            files, hashes = ([value.decode() for value in column[chosen[mine]]] for column in (self._files, self._hashes))
            folder, side = self.manifest.paths[number].parent, self.meta["image_size"]
            parts.append((mine, read_images(folder, files, hashes)))
            if parts[-1][1].shape[2:] != (side, side):
                raise _odd_size(folder / files[0], f"{side} x {side} as in meta.json")
        if len(parts) <= 1:
            return parts[0][1] if parts else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        made = torch.empty(len(chosen), *parts[0][1].shape[1:], dtype=torch.uint8)
        for mine, images in parts:
            made[torch.from_numpy(mine)] = images
        return made

    def tensors(self, device: torch.device | str = "cpu") -> Tensors:
        """The whole set on a device."""
        return Tensors(self.images.to(device), self.labels.to(device), self.sources.to(device))

    def take(self, rows: torch.Tensor) -> OutlierSet:
        """The outliers at int64 positions (M,) or where bool (N,) holds, in order, as a set of their own; no file is copied."""
        chosen = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        made = copy.copy(self)
        made.__dict__.pop("images", None)
        made.manifest = self.manifest.take(chosen.numpy())
        made._files, made._hashes = self._files[chosen.numpy()], self._hashes[chosen.numpy()]
        made.labels, made.sources = self.labels[chosen], self.sources[chosen]
        return made

    def split(self, share: float, *, generator: torch.Generator) -> tuple[OutlierSet, OutlierSet]:
        """Two sets, `share` of the sources in the first; outliers of one source stay together.

        Raises:
            UsageError: A share that leaves one of them empty.
        """
        distinct = self.sources.unique()
        count = round(share * len(distinct))
        if not 0 < count < len(distinct):
            raise UsageError(
                "share of the sources", share, f"1 to {len(distinct) - 1} of {len(distinct)}", "choose another share"
            )
        first = torch.isin(self.sources, distinct[torch.randperm(len(distinct), generator=generator)[:count]])
        return self.take(first), self.take(~first)

    def join(self, other: OutlierSet) -> OutlierSet:
        """This set and another one made of the same images with the same pseudo-labels, one after the other.

        Raises:
            UsageError: Sources, labels or the manifest's columns differ.
        """
        for name in ("sources_sha256", "labels_sha256", "classes", "image_size"):
            if self.meta.get(name) != other.meta.get(name):
                raise UsageError(f"joining {other.folder}", f"another {name}", f"that of {self.folder}", "join sets of one run")
        if self.manifest.columns != other.manifest.columns:
            raise UsageError(f"joining {other.folder}", "other columns", f"those of {self.folder}", "join sets of one version")
        made = copy.copy(self)
        made.__dict__.pop("images", None)
        made.manifest = self.manifest + other.manifest
        made._files, made._hashes = (
            np.concatenate(pair) for pair in ((self._files, other._files), (self._hashes, other._hashes))
        )
        made.labels, made.sources = torch.cat([self.labels, other.labels]), torch.cat([self.sources, other.sources])
        return made

    def verify(self) -> None:
        """Check every file of the set against the manifest, and that there is no other one.

        Raises:
            RunError: A file is absent, was changed or was added, or the imglist is not the manifest's.
        """
        which = self.manifest.which
        with ThreadPoolExecutor() as pool:
            rows = range(len(self))
            folders = [path.parent for path in self.manifest.paths]
            for start in range(0, len(self), 1 << 14):  # a queue of a million would be a large one
                list(pool.map(lambda row: self._check_file(folders[which[row]], row), rows[start : start + (1 << 14)]))
        for folder in folders:
            _verify_lists(folder)

    def _check_file(self, folder: Path, row: int) -> None:
        checked_file(folder, self._files[row].decode(), self._hashes[row].decode())


def _verify_lists(folder: Path) -> None:
    """Make sure that a folder's imglist says what its manifest says, and that it holds the files of both and nothing else."""
    _, (files, labels) = open_manifest(folder / "manifest.csv", ("file", "source_label"))
    expected = "".join(f"{file} {label}\n" for file, label in zip(files, labels, strict=True))
    try:
        same = (folder / "imglist.txt").read_text() == expected
    except (OSError, ValueError):
        same = False
    if not same:
        raise RunError(f"imglist of {folder}", "other lines than the manifest's", "those of the manifest", "generate it again")
    known = {*files, *LISTS, STATE, ".lock"}
    found = [path for path in folder.iterdir() if path.name not in ("images", PARTS) or path.is_symlink()]
    found += [path for path in (folder / "images").rglob("*") if path.is_symlink() or not path.is_dir()]
    for path in found:
        name = path.relative_to(folder).as_posix()
        if name not in known or path.is_symlink():
            what = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "a file"
            raise RunError(f"outlier set {folder}", f"{what} {name}", "the files of the manifest alone", "remove it")
