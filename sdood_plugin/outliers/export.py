"""An outlier set in one file of arrays, or in tar shards as webdataset reads them."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ..artifacts import atomic_path, write_bytes
from ..errors import UsageError
from .dataset import OutlierSet
from .files import checked_file, read_file
from .manifest import open_manifest

SAMPLES_A_TAR = 10_000
_NOT_FOLDERS = (".tar", ".tgz", ".gz", ".zip", ".npy")
_CHUNK = 4096  # images in memory at once
_INTEGERS = {
    *("source_index", "copy", "source_label", "heldout", "target", "target2", "sampling_steps", "seed"),
    *("predicted_after", "nearest_train_index"),
}
_NUMBERS = {
    *("guidance_weight", "start_fraction", "own_confidence_before", "own_confidence_after", "confidence_after"),
    *("distance_to_source", "nearest_train_distance"),
}


def export_set(folder: Path, dest: Path) -> str:
    """Write a whole set to `dest`: an .npz, or a new folder of tar files; equal sets give equal bytes.

    Every image is checked against its hash on the way, and at no time are all in memory.

    Args:
        folder: The outlier set.
        dest: A path ending in .npz (arrays `images` uint8 (N, H, W, 3), `labels` and `sources` int64 (N,), each column of the
            manifest by its name, -1 or NaN where a number is absent, and the texts `card` and `meta`), or a folder for
            outliers-000000.tar and so on, each sample an image as it is in the set, `.cls` (label) and `.json` (its row),
            beside the set's meta.json and data card.

    Returns:
        What was written, in words.

    Raises:
        UsageError: `dest` exists, lies in the set, or is a file of another kind.
        RunError: The set is broken, or the disk is full.
    """
    if dest.exists():
        raise UsageError("--to", dest, "a path where nothing is", "choose another path; nothing was written")
    if dest.resolve().is_relative_to(folder.resolve()):
        raise UsageError("--to", dest, "a path outside the outlier set", "choose another path; nothing was written")
    if dest.suffix in _NOT_FOLDERS:
        raise UsageError("--to", dest, "x.npz, or a new folder for tar files", "give a name without that ending")
    made = OutlierSet(folder)
    if dest.suffix == ".npz":
        _write_arrays(made, dest)
        return f"{len(made)} images in {dest}"
    count = sum(1 for _ in _write_tars(made, dest))
    for name in ("README.md", "examples.png", "meta.json"):
        if (folder / name).exists():
            write_bytes(dest / name, read_file(folder, name))
    return f"{len(made)} images in {count} tar files in {dest}"


def _write_arrays(made: OutlierSet, path: Path) -> None:
    """An .npz as np.savez writes it, the images a chunk at a time."""
    size = made.meta["image_size"]
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(made), size, size, 3)}
            np.lib.format.write_array_header_2_0(stream, header)
            for rows in torch.arange(len(made)).split(_CHUNK):
                stream.write(made.read(rows).permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        for name, values in _columns(made):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, values, allow_pickle=False)


def _columns(made: OutlierSet) -> Iterator[tuple[str, np.ndarray]]:
    """What an .npz holds beside the images, an array at a time."""
    yield "labels", made.labels.numpy()
    yield "sources", made.sources.numpy()
    for name in made.manifest.columns:
        (values,) = open_manifest(made.folder / "manifest.csv", [name])[1]
        if name in _INTEGERS:
            yield name, np.array([int(value or -1) for value in values], dtype=np.int64)
        elif name in _NUMBERS:
            yield name, np.array([float(value or "nan") for value in values])
        else:
            yield name, np.array(values, dtype=np.str_)
    for name, file in (("card", "README.md"), ("meta", "meta.json")):
        if (made.folder / file).exists():
            yield name, np.array(read_file(made.folder, file).decode())


def _write_tars(made: OutlierSet, dest: Path) -> Iterator[Path]:
    """Tar files of 10,000 samples; yields each when it is whole."""
    rows = iter(made.manifest)
    for number, start in enumerate(range(0, len(made), SAMPLES_A_TAR)):
        path = dest / f"outliers-{number:06d}.tar"
        with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
            for _ in range(min(SAMPLES_A_TAR, len(made) - start)):
                row = next(rows)
                name, suffix = Path(row["file"]).stem, Path(row["file"]).suffix
                _add(archive, f"{name}{suffix}", checked_file(made.folder, row["file"], row["sha256"]))
                _add(archive, f"{name}.cls", row["source_label"].encode())
                _add(archive, f"{name}.json", json.dumps(row).encode())
        yield path


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # of the year 1970, so that the same set gives the same bytes
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
