"""The lists of an outlier set: manifest.csv, imglist.txt and meta.json, written and read without holding them in memory."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..artifacts import atomic_path, file_hash, write_json
from ..errors import RunError
from .verdicts import VERDICTS

COLUMNS = (
    "file",
    "sha256",
    "source_index",
    "copy",
    "source",
    "source_label",
    "heldout",
    "target",
    "target2",
    "mode",
    "guidance_weight",
    "start_fraction",
    "sampler",
    "sampling_steps",
    "seed",
    "reference",
    *VERDICTS,
)
MEANINGS = {
    "file": "the image, relative to this folder",
    "sha256": "of the file's bytes",
    "source_index": "position of the source among the images the set was made from",
    "copy": "which of the source's outliers this is, from 0",
    "source": "the source's path or name",
    "source_label": "the source's label, a given one or a cluster's number, and the outlier's label",
    "heldout": "1: the source was kept from the training of diffusion model and reference classifier; empty where unknown",
    "target": "the class guidance pointed to; empty where the mode has none",
    "target2": "the second such class, of the modes that blend",
    "mode": "what guidance points to: other, away, blend, blend-own or same",
    "guidance_weight": "w; diffusers' guidance_scale is 1 + w (unused by mode `same`)",
    "start_fraction": "S / T, how far the source was noised",
    "sampler": "ddpm, ddim or dpm",
    "sampling_steps": "denoising steps from S to 0",
    "seed": "of the random numbers",
    "reference": "first 12 digits of the reference classifier's hash; empty without one, as are the next four",
    "own_confidence_before": "P(source_label | source)",
    "own_confidence_after": "P(source_label | outlier)",
    "predicted_after": "the class the reference classifier sees in the outlier",
    "confidence_after": "its probability",
    "distance_to_source": "root mean square difference of pixels, images in [-1, 1]",
    "nearest_train_index": "position of the training image nearest in pixels (averaged down to 16 px at most)",
    "nearest_train_distance": "root mean square difference of pixels to it, images in [-1, 1]",
}


def write_lists(folder: Path, rows: Iterable[Sequence[Any]], columns: Sequence[str], meta: Mapping[str, Any]) -> None:
    """Write manifest.csv, imglist.txt and, last, meta.json with `count` and the manifest's hash: then the set is finished.

    Args:
        folder: The set.
        rows: Values by column, one row an outlier, taken one by one.
        columns: Names of the columns, `file` and `source_label` among them.
        meta: What else meta.json says.
    """
    file, label, count = columns.index("file"), columns.index("source_label"), 0
    with atomic_path(folder / "manifest.csv") as manifest, atomic_path(folder / "imglist.txt") as imglist:
        with manifest.open("w", newline="", encoding="utf-8") as table, imglist.open("w", newline="", encoding="utf-8") as names:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(columns)
            for row in rows:
                writer.writerow(row)
                names.write(f"{row[file]} {row[label]}\n")
                count += 1
    write_json(folder / "meta.json", {**meta, "count": count, "manifest_sha256": file_hash(folder / "manifest.csv")})


@dataclasses.dataclass(frozen=True)
class Manifest(Sequence[dict[str, str]]):
    """Rows of one or more manifest.csv files, strings by column name; read from disk when asked for.

    Attributes:
        paths: The files.
        columns: Their common columns.
        which: int32 (N,), each row's file.
        offsets: int64 (N,), where in it the row begins.
    """

    paths: list[Path]
    columns: tuple[str, ...]
    which: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[dict[str, str]]:
        streams = [path.open("rb") for path in self.paths]
        try:
            for which, offset in zip(self.which.tolist(), self.offsets.tolist(), strict=True):
                streams[which].seek(offset)
                lines = (line.decode() for line in iter(streams[which].readline, b""))
                yield dict(zip(self.columns, next(csv.reader(lines)), strict=True))
        finally:
            for stream in streams:
                stream.close()

    @overload
    def __getitem__(self, index: int) -> dict[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> Manifest: ...
    def __getitem__(self, index: int | slice) -> dict[str, str] | Manifest:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return next(iter(self.take(np.array([index]))))

    def take(self, rows: np.ndarray) -> Manifest:
        """The manifest of rows int64 (M,), in that order."""
        return dataclasses.replace(self, which=self.which[rows], offsets=self.offsets[rows])

    def __add__(self, other: Manifest) -> Manifest:
        return Manifest(
            [*self.paths, *other.paths],
            self.columns,
            np.concatenate([self.which, other.which + len(self.paths)]),
            np.concatenate([self.offsets, other.offsets]),
        )


def open_manifest(path: Path, wanted: Sequence[str]) -> tuple[Manifest, list[list[str]]]:
    """A manifest and whole columns of it, in one pass.

    Args:
        path: manifest.csv.
        wanted: Names of the columns to return.

    Raises:
        RunError: The file is absent, is no such CSV, or lacks a column.
    """
    offsets: list[int] = []
    values: list[list[str]] = [[] for _ in wanted]
    try:
        with path.open("rb") as stream:
            reader = csv.reader(line.decode() for line in iter(stream.readline, b""))
            columns = tuple(next(reader, []))
            missing = [name for name in wanted if name not in columns]
            if missing:
                raise RunError(f"manifest {path}", f"no {missing[0]}", "manifest.csv of `sdood generate`", "generate it again")
            places = [(columns.index(name), column) for name, column in zip(wanted, values, strict=True)]
            offset = stream.tell()
            for row in reader:
                if len(row) != len(columns):
                    raise RunError(
                        f"manifest {path}", f"{len(row)} values in row {len(offsets) + 1}", f"{len(columns)}", "replace it"
                    )
                offsets.append(offset)
                offset = stream.tell()
                for place, column in places:
                    column.append(row[place])
    except FileNotFoundError as error:
        raise RunError(f"file {path}", "nothing there", "the manifest of a finished outlier set", "generate it first") from error
    except (ValueError, csv.Error) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"file {path}", error, "a CSV in UTF-8", "mend or replace it") from error
    return Manifest([path], columns, np.zeros(len(offsets), dtype=np.int32), np.array(offsets, dtype=np.int64)), values
