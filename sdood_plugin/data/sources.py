"""Images from a folder, an imglist, CIFAR batches, an array file or the embedded data, as one `ImageSet`."""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..config import DataConfig, ImagesConfig
from ..errors import RunError, UsageError
from ..progress import progress_bar
from . import demo
from .images import ImageSet, spread

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}


def load_images(source: ImagesConfig, data: DataConfig, seed: int) -> ImageSet:
    """Read one set of images as `data` says.

    Args:
        source: Where the set is.
        data: Image size and the options of the embedded data.
        seed: Root seed; only the embedded data depends on it.

    Raises:
        UsageError: The path is none of the four forms.
        RunError: The set is empty or an image in it cannot be used.
    """
    if source.path == "demo":
        return demo.draw(
            source.split, rho=data.demo_rho, renders=data.demo_renders, seed=seed, left_out=data.demo_left_out
        ).limited(source.limit)
    path = Path(source.path)
    if path.is_dir() and (path / "data_batch_1").exists():
        parts = [f"data_batch_{i}" for i in range(1, 6)] if source.split == "train" else ["test_batch"]
        return _from_batches(path, parts, b"labels", "batches.meta", b"label_names", source, data.image_size)
    if path.is_dir() and (path / "meta").exists() and (path / "train").is_file():
        return _from_batches(path, [source.split], b"fine_labels", "meta", b"fine_label_names", source, data.image_size)
    if path.is_dir():
        return _from_folder(path, source.limit, data.image_size)
    if path.suffix == ".npz" and path.exists():
        return _from_npz(path, source.limit, data.image_size)
    if path.suffix == ".txt" and path.exists():
        return _from_imglist(path, Path(source.root or path.parent), source.limit, data.image_size)
    raise UsageError(
        "images",
        source.path,
        "a folder of images, an imglist (.txt), CIFAR python batches, an .npz, or `demo`",
        "check the path" if not path.exists() else "use one of these forms",
    )


def _from_folder(folder: Path, limit: int | None, size: int | None) -> ImageSet:
    shown = [p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    files = sorted(p for p in shown if p.suffix.lower() in SUFFIXES)
    if not files:
        raise RunError(f"folder {folder}", "no images", f"files ending in {', '.join(sorted(SUFFIXES))}", "check the path")
    parents = [file.relative_to(folder).parts[:-1] for file in files]
    classes = sorted({parent[0] for parent in parents if parent})
    labelled = all(parents) and len(classes) > 1
    labels = [classes.index(parent[0]) for parent in parents] if labelled else None
    names = [file.relative_to(folder).as_posix() for file in files]
    unreadable = next((name for name in names if name != name.encode(errors="ignore").decode()), None)
    if unreadable is not None:
        raise RunError(f"image in {folder}", f"the name {unreadable!a}", "a name in UTF-8", "rename the file")
    made = _decode(files, names, labels, classes if labelled else [], limit, size)
    others = Counter(p.suffix.lower() or p.name for p in shown if p.suffix.lower() not in SUFFIXES and p.is_file())
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5)) + (", ..." if len(others) > 5 else "")
    left = [f"{others.total()} files are no images and left out: {kinds}"] if others else []
    return replace(made, notes=[*made.notes, *left])


def _from_imglist(imglist: Path, root: Path, limit: int | None, size: int | None) -> ImageSet:
    names, labels = [], []
    try:
        text = imglist.read_text()
    except ValueError as error:
        raise RunError(f"imglist {imglist}", error, "a text file of `relative/path label` lines", "give an imglist") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        where = f"imglist {imglist} line {number}"
        if not name or not re.fullmatch("-?[0-9]{1,9}", label):
            raise RunError(where, repr(line), "`relative/path label` with an integer label", "mend that line")
        if " " in name or name.startswith("/") or ".." in Path(name).parts:
            raise RunError(where, repr(name), "a relative path without spaces or `..`", "rename the file or mend the line")
        names.append(name)
        labels.append(int(label))
    if not names:
        raise RunError(f"imglist {imglist}", "no lines", "`relative/path label` lines", "check the file")
    return _decode([root / name for name in names], names, labels, [], limit, size)


def _decode(
    files: list[Path], names: list[str], labels: list[int] | None, classes: list[str], limit: int | None, size: int | None
) -> ImageSet:
    keep = range(len(files)) if limit is None or limit >= len(files) else spread(len(files), limit).tolist()
    with ThreadPoolExecutor() as pool, progress_bar("reading images", len(keep), "image", delay=2.0) as bar:
        found = []
        for one in pool.map(lambda i: _read(files[i], size), keep):
            found.append(one)
            bar.update()
    decoded = _whole(found, [files[i] for i in keep])
    shapes = Counter(array.shape[:2] for array, _ in decoded)
    if len(shapes) > 1:
        common, odd = (
            shapes.most_common(1)[0][0],
            next(i for i, (a, _) in zip(keep, decoded, strict=True) if a.shape[:2] != shapes.most_common(1)[0][0]),
        )
        raise RunError(
            f"image sizes ({files[odd]})",
            f"{len(shapes)} different sizes",
            f"{common[1]} x {common[0]} like most",
            "give --data.image_size to resize and crop all of them",
        )
    _require_square(decoded[0][0], str(files[0].parent))
    notes = Counter(note for _, note in decoded if note)
    pixels = torch.from_numpy(np.stack([array for array, _ in decoded])).permute(0, 3, 1, 2).contiguous()
    true = None if labels is None else torch.tensor([labels[i] for i in keep], dtype=torch.int64)
    return ImageSet(pixels, [names[i] for i in keep], true, classes, [f"{count} images: {note}" for note, count in notes.items()])


class _Broken(NamedTuple):
    """Why an image could not be read, as `RunError` puts it."""

    value: str
    expected: str
    remedy: str


def _whole(found: list[tuple[np.ndarray, str] | _Broken], files: list[Path]) -> list[tuple[np.ndarray, str]]:
    """What was read, where everything could be; else an error that names what could not, or the first twenty of them."""
    broken = [(file, one) for file, one in zip(files, found, strict=True) if isinstance(one, _Broken)]
    if broken:
        first, why = broken[0]
        others = ", ".join(str(file) for file, _ in broken[1:20]) + (", ..." if len(broken) > 20 else "")
        rest = f" ({len(broken)} of {len(found)} images cannot be used; the others: {others})" if others else ""
        raise RunError(f"image {first}", f"{why.value}{rest}", why.expected, why.remedy)
    return [one for one in found if not isinstance(one, _Broken)]


def _read(file: Path, size: int | None) -> tuple[np.ndarray, str] | _Broken:
    try:
        with Image.open(file) as opened:
            image, note = _to_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        return _Broken("no such file", "the image the list names", "check the list and its root")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return _Broken(str(error), "a readable, whole image", "remove or replace such files")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
    return np.asarray(image), note


def _to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """An RGB image of 8 bits, and what had to be done."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" or values.max(initial=0) > 65535 or values.min(initial=0) < 0:
            raise ValueError(f"{image.mode} pixels from {values.min()} to {values.max()}, not 8 or 16 bits")
        return Image.fromarray((values / 257.0).round().astype(np.uint8)).convert("RGB"), "16-bit grey scaled to 8 bits"
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB"), "transparency laid over white"
    if image.mode == "RGB":
        return image, ""
    return image.convert("RGB"), f"mode {image.mode} converted to RGB"


def _require_square(image: np.ndarray, where: str) -> None:
    height, width = image.shape[:2]
    if height != width:
        raise RunError(
            f"images in {where}", f"{width} x {height}", "square images", "give --data.image_size to resize and crop them"
        )


def _from_arrays(
    arrays: np.ndarray, labels: np.ndarray | None, where: str, classes: list[str], limit: int | None, size: int | None
) -> ImageSet:
    if arrays.dtype != np.uint8 or arrays.ndim != 4 or arrays.shape[3] != 3 or not len(arrays):
        raise RunError(
            f"images in {where}", f"{arrays.dtype} {arrays.shape}", "uint8 (N, H, W, 3), N > 0", "save the array in that form"
        )
    if labels is not None and (labels.shape != (len(arrays),) or labels.dtype.kind not in "iu"):
        raise RunError(
            f"labels in {where}", f"{labels.dtype} {labels.shape}", f"integers ({len(arrays)},)", "save one label an image"
        )
    keep = np.arange(len(arrays)) if limit is None or limit >= len(arrays) else spread(len(arrays), limit).numpy()
    arrays = arrays[keep]
    if size is not None and arrays.shape[1:3] != (size, size):
        fitted = [ImageOps.fit(Image.fromarray(a), (size, size), method=Image.Resampling.BICUBIC) for a in arrays]
        arrays = np.stack([np.asarray(image) for image in fitted])
    _require_square(arrays[0], where)
    pixels = torch.from_numpy(np.ascontiguousarray(arrays.transpose(0, 3, 1, 2)))
    true = None if labels is None else torch.from_numpy(labels[keep].astype(np.int64))
    return ImageSet(pixels, [f"{i:06d}" for i in keep.tolist()], true, classes)


def _from_npz(path: Path, limit: int | None, size: int | None) -> ImageSet:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if "images" not in file:
                raise RunError(
                    f"file {path}", f"arrays {sorted(file)}", "an array named `images`", "save it with np.savez(images=...)"
                )
            images, labels = file["images"], file["labels"] if "labels" in file else None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"file {path}", error, "a whole .npz of plain arrays", "save it again") from error
    return _from_arrays(images, labels, str(path), [], limit, size)


class _ArraysOnly(pickle.Unpickler):
    """CIFAR batches are pickles; this reads lists, strings and numpy arrays and nothing that could run."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR batch")
        return super().find_class(module, name)


def _unpickle(path: Path, *keys: bytes) -> dict[bytes, Any]:
    try:
        with path.open("rb") as stream:
            batch = _ArraysOnly(stream, encoding="bytes").load()
        return {key: batch[key] for key in keys}
    except Exception as error:  # bytes that are no pickle can fail in any way
        raise RunError(f"CIFAR batch {path}", error, "a CIFAR python batch", "download the python version again") from error


def _from_batches(
    folder: Path, parts: list[str], label_key: bytes, meta: str, classes_key: bytes, source: ImagesConfig, size: int | None
) -> ImageSet:
    batches = [_unpickle(folder / part, b"data", label_key) for part in parts]
    arrays = np.concatenate([np.asarray(batch[b"data"]) for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = np.concatenate([np.asarray(batch[label_key], dtype=np.int64) for batch in batches])
    classes = [name.decode() for name in _unpickle(folder / meta, classes_key)[classes_key]] if (folder / meta).exists() else []
    return _from_arrays(arrays, labels, str(folder), classes, source.limit, size)
