"""Hand a run folder from one short slot on a GPU to the next, in files small enough to keep.

python -m benchmarks.handover pack RUN FOLDER
python -m benchmarks.handover unpack FOLDER RUN

Weights are kept in bfloat16, in parts below 15 MB; labels, losses, scores, rows and the records of finished stages as they
are. Left out is what the next slot makes again from those or does not need: outlier images, fakes, banks, checkpoints. A
stage whose files were left out runs again when a later stage needs it.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from sdood_plugin.artifacts import read_tensors, write_tensors

PART_BYTES = 15_000_000
LEFT_OUT = ("outliers/", "controls/", "figures/", "detector/bank.safetensors", "comparators/fake-it/fakes.safetensors")
LEFT_OUT_NAMES = ("checkpoint", "features-", "report.html")  # beginnings of file names
WEIGHTS = ".safetensors"


def pack(run: Path, folder: Path) -> None:
    """Write what is worth keeping of a run folder to `folder`, in place of what an earlier slot left there."""
    if folder.exists():
        shutil.rmtree(folder)
    for path in _kept(run):
        target = folder / path.relative_to(run)
        if path.suffix == WEIGHTS:
            tensors = read_tensors(path)
            info = _metadata(path)
            for number, names in enumerate(_parts(tensors)):
                part = {name: _narrow(tensors[name]) for name in names}
                write_tensors(target.with_name(f"{target.stem}-part{number:02d}{WEIGHTS}"), part, info)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def unpack(folder: Path, run: Path) -> None:
    """Make a run folder of what `pack` wrote; weights are float32 again."""
    whole: dict[Path, dict[str, torch.Tensor]] = {}
    info: dict[Path, dict[str, str]] = {}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        target = run / path.relative_to(folder)
        stem, _, number = path.stem.rpartition("-part")
        if path.suffix == WEIGHTS and stem and number.isdigit():
            target = target.with_name(stem + WEIGHTS)
            whole.setdefault(target, {}).update({name: _widen(value) for name, value in read_tensors(path).items()})
            info[target] = _metadata(path)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for target, tensors in whole.items():
        write_tensors(target, tensors, info[target])


def _kept(run: Path) -> Iterator[Path]:
    for path in sorted(file for file in run.rglob("*") if file.is_file()):
        inside = path.relative_to(run).as_posix()
        if inside.startswith(LEFT_OUT) or path.name.startswith(LEFT_OUT_NAMES):
            continue
        if path.name.startswith(".") and path.name != ".key":  # .key says whose files an unfinished stage's are
            continue
        if path.suffix == WEIGHTS or path.stat().st_size < PART_BYTES:
            yield path


def _parts(tensors: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        own = _narrow(tensor).nbytes
        if names and size + own > PART_BYTES - 100_000:  # the header's share
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def main() -> None:
    """Pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    (pack if options.what == "pack" else unpack)(options.source, options.target)


if __name__ == "__main__":
    main()
