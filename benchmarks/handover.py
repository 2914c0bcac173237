"""Hand a run folder from one short slot on a GPU to the next, in files small enough to keep.

python -m benchmarks.handover pack RUN FOLDER
python -m benchmarks.handover unpack FOLDER RUN

FOLDER/NAME.json lists what is kept of the run folder NAME: zip archives, cut into parts below 15 MB that lie beside it and are
named by the archive's hash. What did not change keeps its parts, runs that share files share them, and a kill while packing
leaves the earlier handover whole. All but figures and report is kept, outlier images and the checkpoints of unfinished
trainings byte by byte, so that a finished stage stays finished. Weights are rounded to bfloat16 and feature banks to float16,
in the run folder too: a stage reads the same bytes whether it goes on there or from what was kept.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from sdood_plugin.artifacts import TENSORS_SUFFIX, file_hash, read_json, read_tensors, write_bytes, write_json, write_tensors
from sdood_plugin.errors import RunError, UsageError

PART_BYTES = 15_000_000
PARTS_A_CALL, BYTES_A_CALL = 8, 4 * PART_BYTES  # what one call to a lent GPU brings back
SMALL_BYTES = 1_000_000  # folders with less share an archive
LEFT_OUT = ("figures/", "report.html")
IMAGES = (".png", ".webp")
BANK = "bank.safetensors"


def pack(run: Path, folder: Path) -> list[Path]:
    """Keep a run folder in `folder`, in place of what an earlier slot kept of it; rounds its weights and banks.

    Returns:
        The files that are new in `folder`; what another slot must be given are these and those it has.
    """
    before = set(folder.glob("*"))
    files = sorted(_kept(run))
    for path in files:
        if path.suffix == TENSORS_SUFFIX:
            _round(path)
    archives = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, members in _groups(run, files).items():
            archive = Path(temporary) / name
            _write_archive(run, members, archive)
            archives[name] = _cut(archive, folder)
            archive.unlink()
    listed = [path.relative_to(run).as_posix() for path in files if path.suffix not in IMAGES]
    index = folder / f"{run.name}.json"
    write_json(index, {"archives": archives, "files": listed})
    _remove_unlisted(folder)
    return [index, *sorted(set(folder.glob("*")) - before - {index})]


def unpack(folder: Path, name: str, run: Path) -> None:
    """Make the run folder `run`, whole or not at all, of what `pack` kept of the one called `name`.

    Raises:
        UsageError: `run` is there already.
        RunError: A part is absent or was changed.
    """
    if run.exists():
        raise UsageError("run folder", run, "a folder that is not there yet", "move it away or choose another")
    fresh = run.with_name(f".{run.name}.unpacking")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for archive, parts in read_json(folder / f"{name}.json")["archives"].items():
        with tempfile.NamedTemporaryFile() as whole:
            for part in parts:
                if not (folder / part).exists():
                    raise RunError(f"part {folder / part}", "nothing there", f"all parts that {name}.json lists", "bring it too")
                whole.write((folder / part).read_bytes())
            whole.flush()
            if not parts[0].startswith(_part_name(Path(whole.name), archive)):
                raise RunError(
                    f"parts of {archive} in {folder}", "other bytes than were packed", "whole parts", "copy them again"
                )
            with zipfile.ZipFile(whole) as content:
                content.extractall(fresh)
    for path in fresh.rglob(f"*{TENSORS_SUFFIX}"):
        _write_like(path, path, _widened(path, read_tensors(path)))
    fresh.rename(run)


def in_words(name: str, new: Sequence[Path]) -> str:
    """What `pack` did, and in how many calls the new files come back where one does not do."""
    size = sum(path.stat().st_size for path in new)
    text = f"{name}: {len(new)} new files in {new[0].parent}, {size / 1e6:.0f} MB"
    calls = max(-(-len(new) // PARTS_A_CALL), -(-size // BYTES_A_CALL))
    if calls > 1:
        most = f"{PARTS_A_CALL} files or {BYTES_A_CALL / 1e6:.0f} MB"
        text += f"; more than the {most} that one call brings back, copy them in {calls} calls"
    return text


def _kept(run: Path) -> Iterator[Path]:
    """All files but those left out, half-written ones and the run folder's own lock."""
    for path in run.rglob("*"):
        inside = path.relative_to(run).as_posix()
        if path.is_file() and not path.match(".*.*") and inside != ".lock" and not inside.startswith(LEFT_OUT):
            yield path


def _groups(run: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Which files share an archive: those of one folder, or of one comparator; the small ones all together."""
    groups: dict[str, list[Path]] = {}
    for path in files:
        groups.setdefault("-".join(path.relative_to(run).parts[:-1][:2]), []).append(path)
    large = {name: group for name, group in groups.items() if sum(path.stat().st_size for path in group) >= SMALL_BYTES}
    small = [path for name, group in groups.items() if name not in large for path in group]
    return {**large, "rest": small} if small else large


def _write_archive(run: Path, files: Sequence[Path], archive: Path) -> None:
    """A zip of the files, weights and banks narrow; the same files give the same bytes."""
    narrow = archive.with_name(f"{archive.name}-narrow")
    with zipfile.ZipFile(archive, "w") as content:
        for path in files:
            data = path
            if path.suffix == TENSORS_SUFFIX:
                _write_like(path, narrow, _narrowed(path, read_tensors(path)))
                data = narrow
            how = zipfile.ZIP_STORED if path.suffix in IMAGES else zipfile.ZIP_DEFLATED
            content.writestr(zipfile.ZipInfo(path.relative_to(run).as_posix()), data.read_bytes(), how, compresslevel=1)
    narrow.unlink(missing_ok=True)


def _cut(archive: Path, folder: Path) -> list[str]:
    """Write the archive's parts, those that are not there, and name them all."""
    names: list[str] = []
    with archive.open("rb") as stream:
        while block := stream.read(PART_BYTES):
            names.append(f"{_part_name(archive, archive.name)}-{len(names):02d}")
            if not (folder / names[-1]).exists():
                write_bytes(folder / names[-1], block)
    return names


def _part_name(content: Path, archive: str) -> str:
    return f"{archive}-{file_hash(content)[:16]}"


def _remove_unlisted(folder: Path) -> None:
    """Remove parts that no run folder's list names any more, and half-written files of a kill."""
    indices = set(folder.glob("[!.]*.json"))
    listed = {part for index in indices for parts in read_json(index)["archives"].values() for part in parts}
    for path in set(folder.iterdir()) - indices:
        if path.name not in listed:
            path.unlink()


def _round(path: Path) -> None:
    """Write weights or banks as they will come back, where that is not what they are."""
    tensors = read_tensors(path)
    rounded = _widened(path, _narrowed(path, tensors))
    if not all(torch.equal(rounded[name], value) for name, value in tensors.items()):
        _write_like(path, path, rounded)


def _narrow_type(path: Path) -> torch.dtype:
    return torch.float16 if path.name == BANK else torch.bfloat16


def _narrowed(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file as they are kept; a bank's held-out terms are no features and stay exact."""

    def kept(value: torch.Tensor) -> torch.Tensor:
        exact = value.dtype != torch.float32 or (path.name == BANK and value.ndim < 2)
        return value if exact else value.to(_narrow_type(path))

    return {name: kept(value) for name, value in tensors.items()}


def _widened(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.float() if value.dtype == _narrow_type(path) else value for name, value in tensors.items()}


def _write_like(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors with the metadata of `source`."""
    from safetensors import safe_open

    with safe_open(source, "pt") as file:
        info = file.metadata()
    write_tensors(target, tensors, info)


def main() -> None:
    """Pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    if options.what == "pack":
        print(in_words(options.source.name, pack(options.source, options.target)))
    else:
        unpack(options.source, options.target.name, options.target)


if __name__ == "__main__":
    main()
