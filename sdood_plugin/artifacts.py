"""Files that are whole or absent: atomic writes, content hashes, safetensors + JSON, the provenance record."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RunError

if TYPE_CHECKING:
    import torch

TENSORS_SUFFIX = ".safetensors"
_PACKAGES = ("sdood_plugin", "torch", "torchvision", "diffusers", "timm", "accelerate", "numpy", "scikit-learn", "pytorch-ood")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error.

    Raises:
        RunError: The folder cannot be written or the disk is full; `path` is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise disk_error(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def only_process(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder, made where there is none, against other processes until the block ends; nothing of the lock stays.

    Args:
        folder: The folder.
        what: What it is, for the message.

    Raises:
        RunError: Another process holds it, or it cannot be written.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise disk_error(folder, error) from error
    with os.fdopen(handle, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                raise OSError("a lock that its holder has removed since, and another one in its place")
        except OSError as error:
            busy = "in use by another process"
            raise RunError(f"{what} {folder}", busy, "one process at a time", "wait for it or choose another folder") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before it is let go: who opened it meanwhile sees that it is gone


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def disk_error(path: Path, error: OSError) -> RunError:
    """A failure to write, in one line."""
    return RunError(
        f"writing {path}",
        error.strerror or error,
        "a folder with write permission and free space",
        "free space and give the same command again; what is finished is kept",
    )


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        RunError: The file is absent or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise RunError(
            f"file {path}", "nothing there", "a JSON file written by an earlier stage", "run that stage first"
        ) from error
    except ValueError as error:
        raise RunError(f"file {path}", error, "valid JSON", "delete it and run the stage that writes it again") from error


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV with one header line, atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV with a header line, as strings by column name.

    Raises:
        RunError: The file is absent or is no CSV.
    """
    try:
        with path.open(newline="") as stream:
            return list(csv.DictReader(stream))
    except FileNotFoundError as error:
        raise RunError(f"file {path}", "nothing there", "a CSV written by an earlier stage", "run that stage first") from error
    except (ValueError, csv.Error) as error:
        raise RunError(f"file {path}", error, "a CSV in UTF-8", "mend or replace it") from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], info: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors, atomically; any shape and dtype, moved to the CPU. Equal contents, equal bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file(_apart(tensors), temporary, dict(info or {}))
        except SafetensorError as error:  # how a full disk shows here
            raise OSError(str(error)) from error
        if info:
            _sort_metadata(temporary)


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, those that share an earlier one's memory, as tied weights do, copied: the library takes none."""
    found: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        found[name] = own.clone() if place in places else own
        places.add(place)
    return found


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in a safetensors header: the library writes it in another order each time."""
    with path.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same items in another order are not longer"
        stream.seek(8)
        stream.write(text.ljust(size))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        RunError: The file is absent, truncated or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise RunError(
            f"file {path}", "nothing there", "a safetensors file", "check the path or run the stage that writes it"
        ) from error
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"file {path}", error, "a whole safetensors file", "copy it again, or delete it and run the stage that writes it"
        ) from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def value_hash(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What of `new` differs from `old`, both what something is made of, in words."""
    found = []
    for name, after in new.items():
        before = old.get(name)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += [
                f"{name}.{k} changed from {before.get(k)} to {after.get(k)}" for k in after if before.get(k) != after.get(k)
            ]
        else:
            found.append(f"{name} changed" + (f" from {before} to {after}" if isinstance(after, (int, float)) else ""))
    return "; ".join(found)


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's shape, type and values."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def provenance(command: Sequence[str]) -> dict[str, Any]:
    """Who made this: command, package versions, commit of the checkout, Python and platform."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "command": list(command),
        "versions": versions,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _commit() -> str | None:
    """The checkout's commit, with `-dirty` where code or settings differ from it; other files, such as results, do not count."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.yml", "*.j2")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    return None
