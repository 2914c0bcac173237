"""The host's benchmarks over images that are on disk: what is absent is left out and named, nothing is downloaded."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pytorch_ood.benchmark import CIFAR10_ODIN, CIFAR100_ODIN, Benchmark, CIFAR10_OpenOOD
from pytorch_ood.dataset.img import GaussianNoise, LSUNCrop, LSUNResize, TinyImageNetCrop, TinyImageNetResize, UniformNoise
from pytorch_ood.utils import ToUnknown
from torch.utils.data import Dataset, Subset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from ...data.images import spread
from ...errors import RunError, UsageError
from ..imglist import listed_images

Transform = Callable[[Image.Image], Any]
Found = tuple[Benchmark, dict[str, str]]
VALIDATION_OOD = "validation OOD"  # the host has no name for the outliers of `validation_set()`
_ODIN = {CIFAR10_ODIN: CIFAR10, CIFAR100_ODIN: CIFAR100}
_CLASSES = {"cifar10": 10, "cifar100": 100}  # by the folder of the lists


def openood_benchmark(data_root: str | Path, transform: Transform, kind: Any = CIFAR10_OpenOOD) -> Found:
    """CIFAR10_OpenOOD or CIFAR100_OpenOOD over a folder with OpenOOD's `images_classic` and `benchmark_imglist`.

    Args:
        data_root: The folder.
        transform: Applied to every image.
        kind: The host's class.

    Returns:
        (benchmark, absent): one test set for each OOD set whose list and images are all there; why the others are not, under
            VALIDATION_OOD for the outliers of `validation_set()`.

    Raises:
        RunError: Lists or images of the in-distribution data are absent, or every OOD set is.
        UsageError: Another kind, or a line of a list is none that the host can read, has a label that is no class in an ID list
            or one of 0 or more in an OOD list, which the host would count as ID.
    """
    if getattr(kind, "_subdir", None) not in _CLASSES:
        raise UsageError("kind", kind, "CIFAR10_OpenOOD or CIFAR100_OpenOOD", "take one of the two")
    root, classes = Path(data_root), _CLASSES[kind._subdir]
    lists, images = root / "benchmark_imglist" / kind._subdir, root / "images_classic"
    for file in (kind._train_imglist, kind._val_id_imglist, kind._test_id_imglist, kind._val_ood_imglist):
        if not (lists / file).is_file():
            raise RunError(
                f"data root {root}", f"no {(lists / file).relative_to(root)}", "OpenOOD's lists", "export or download them first"
            )
    for file in (kind._train_imglist, kind._val_id_imglist, kind._test_id_imglist):
        if missing := _missing(lists / file, images, classes):
            raise RunError(f"images of {lists / file}", missing, "all of them", "export or download the ID data first")
    absent = {name: why for name, file in kind._ood_imglists if (why := _missing(lists / file, images, 0))}
    present = [(name, file) for name, file in kind._ood_imglists if name not in absent]
    if not present:
        raise RunError(f"OOD sets below {root}", "none", f"one of {', '.join(absent)}", "export or download one")
    if why := _missing(lists / kind._val_ood_imglist, images, 0):
        absent[VALIDATION_OOD] = why
    with _imglists_at(root):
        return type(kind.__name__, (kind,), {"_ood_imglists": present})(str(images), transform, download=False), absent


def _missing(imglist: Path, images: Path, classes: int) -> str:
    """Why the images of a list cannot be used; empty where they can.

    Args:
        imglist: The list.
        images: What its paths are relative to.
        classes: Of an ID list; 0 for an OOD list, whose labels are below 0.

    Raises:
        UsageError: The list cannot be read.
    """
    if not imglist.is_file():
        return f"no {imglist.name}"
    if not imglist.stat().st_size:
        return f"{imglist.name} is empty"
    names = [name for _, name in listed_images(imglist, classes, ood_allowed=not classes, comments=True)]
    gone = [name for name in names if not (images / name).is_file()]
    if gone:
        return f"{len(gone)} of {len(names)} images absent, the first is {gone[0]}"
    return "" if names else f"{imglist.name} is empty"


@contextlib.contextmanager
def _imglists_at(root: Path) -> Iterator[None]:
    """The host looks for its lists in torch's hub folder and nowhere else: point that there for a moment."""
    before = torch.hub._hub_dir  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "openood_benchmark_imglist").symlink_to(root.resolve(), target_is_directory=True)
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub._hub_dir = before  # type: ignore[attr-defined]


def odin_benchmark(data_root: str | Path, transform: Transform, kind: Any = CIFAR10_ODIN) -> Found:
    """CIFAR10_ODIN or CIFAR100_ODIN over a folder with the host's archives; CIFAR may also lie as OpenOOD's `images_classic`.

    The two noise sets are drawn by the host and always there.

    Args:
        data_root: The folder.
        transform: Applied to every image.
        kind: The host's class.

    Returns:
        (benchmark, absent), as `openood_benchmark`.

    Raises:
        RunError: The in-distribution data is absent.
        UsageError: Another kind.
    """
    if kind not in _ODIN:
        raise UsageError("kind", kind, " or ".join(known.__name__ for known in _ODIN), "take one of the two")
    root = Path(data_root)
    unknown: dict[str, Any] = {"transform": transform, "target_transform": ToUnknown()}
    found: list[Any] = []
    absent = {}
    for ood in (TinyImageNetCrop, TinyImageNetResize, LSUNResize, LSUNCrop):
        try:
            found.append(ood(str(root), download=False, **unknown))
        except (RuntimeError, OSError):
            absent[ood.__name__] = f"no whole {ood.filename}, unpacked, below {root.name}"
    found += [noise(1000, size=(32, 32, 3), seed=123, **unknown) for noise in (UniformNoise, GaussianNoise)]
    made = kind.__new__(kind)  # its constructor downloads; the sets are given as they are found
    made.transform = transform
    made.train_in, made.test_in = (_cifar(_ODIN[kind], root, part, transform) for part in ("train", "test"))
    made.test_oods, made.ood_names = found, [type(dataset).__name__ for dataset in found]
    return made, absent


def _cifar(kind: Any, root: Path, part: str, transform: Transform) -> Dataset:
    with contextlib.suppress(RuntimeError):
        return kind(str(root), train=part == "train", download=False, transform=transform)
    folder = root / "images_classic" / kind.__name__.lower() / part
    if not folder.is_dir():
        raise RunError(
            f"{kind.__name__} {part}",
            f"neither {kind.base_folder} nor {folder.relative_to(root)} below {root}",
            "one of them",
            "export or download it first",
        )
    return ImageFolder(str(folder), transform)


def limit(benchmark: Any, test: int | None, train: int | None) -> Any:
    """The benchmark with at most so many images in each of its sets, spread evenly; None leaves a set whole.

    Args:
        benchmark: One of the two above, changed in place.
        test: Images of the ID test set and of every OOD set.
        train: Images of the training set.
    """

    def cut(dataset: Any, count: int | None) -> Any:
        return dataset if count is None or count >= len(dataset) else Subset(dataset, spread(len(dataset), count).tolist())

    benchmark.train_in, benchmark.test_in = cut(benchmark.train_in, train), cut(benchmark.test_in, test)
    benchmark.test_oods = [cut(dataset, test) for dataset in benchmark.test_oods]
    return benchmark
