"""Writing the blocks of an outlier set while the next ones are computed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ..artifacts import disk_error, write_csv
from ..errors import RunError
from .files import encode, read_file
from .manifest import COLUMNS
from .storage import part_file

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # never through a link


class BlockWriter:
    """Writes blocks in the background, a few at a time: images first, then the rows that vouch for them by hash.

    Files are neither synchronised nor moved into place one by one, which would take longer than many a sampler: a block
    counts once its rows are there, and a file counts by its hash.
    """

    def __init__(self, folder: Path, suffix: str, *, threads: int = 4, ahead: int = 6) -> None:
        self._folder, self._suffix, self._ahead = folder, suffix, ahead
        self._pool = ThreadPoolExecutor(threads)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            for block in self._pending:
                block.result()

    def put(self, number: int, columns: Mapping[str, Sequence[object]], images: torch.Tensor) -> None:
        """Queue a block; waits while too many are queued.

        Args:
            number: Of the block.
            columns: Its rows, all columns but `sha256`.
            images: uint8 (B, 3, H, W) on the CPU.

        Raises:
            RunError: An earlier block could not be written.
        """
        while len(self._pending) >= self._ahead:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._write, number, columns, images))

    def _write(self, number: int, columns: Mapping[str, Sequence[object]], images: torch.Tensor) -> None:
        names = [str(name) for name in columns["file"]]
        hashes = []
        try:
            make_folders(self._folder, names)
            for name, image in zip(names, images, strict=True):
                data = encode(image, self._suffix)
                store(self._folder, name, data)
                hashes.append(hashlib.sha256(data).hexdigest())
        except OSError as error:
            raise disk_error(self._folder, error) from error
        filled = {**columns, "sha256": hashes}
        write_csv(part_file(self._folder, number), COLUMNS, zip(*(filled[name] for name in COLUMNS), strict=True))


def store(folder: Path, name: str, data: bytes) -> None:
    """Write a file of a set, unless it is there with these bytes; links are replaced, never followed.

    Raises:
        OSError: It cannot be written.
    """
    path = f"{folder}/{name}"
    try:
        handle = os.open(path, _NEW, 0o666)
    except FileExistsError:
        with contextlib.suppress(RunError):
            if read_file(folder, name) == data:
                return
        os.unlink(path)
        handle = os.open(path, _NEW, 0o666)
    try:
        rest = memoryview(data)
        while rest:  # plain system calls: a file object would make twice as many, and they are what this costs
            rest = rest[os.write(handle, rest) :]
    finally:
        os.close(handle)


def make_folders(folder: Path, names: Iterable[str]) -> None:
    """Make the folders that files of these names lie in.

    Raises:
        OSError: One cannot be made, or is a symbolic link.
    """
    for parent in {folder / name.rpartition("/")[0] for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
        if parent.is_symlink():
            raise OSError(f"{parent} is a symbolic link")
