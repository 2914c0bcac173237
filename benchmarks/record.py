"""What every benchmark writes: results/NAME.json with command, settings, device, versions, seeds, time, data and flat rows."""

from __future__ import annotations

import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sdood_plugin.artifacts import provenance, read_json, value_hash, write_json

SETTINGS = ("OMP_NUM_THREADS", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")  # of the environment: threads, TF32 in float32 products
RESULTS = Path(__file__).parent / "results"
STARTED = time.time()
ORIGIN = provenance(sys.argv)  # of the code that runs, which may not be that of the checkout hours later


def device_name(device: str = "auto") -> str:
    """The accelerator's name, or the number of CPU threads; `auto` is a GPU where there is one, as in a configuration."""
    on_gpu = torch.cuda.is_available() and device != "cpu"
    return torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"


def command_line() -> str:
    """The command that is running, to be pasted into a shell; with what of the environment it depends on (`SETTINGS`)."""
    given = [f"{name}={shlex.quote(os.environ[name])}" for name in SETTINGS if os.environ.get(name)]
    return " ".join([*given, shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])])


def config_hash(config: Any, data_root: Path = Path("data")) -> str:
    """SHA-256 of plain settings that does not depend on where the data lie."""
    return value_hash(_placeless(config, data_root))


def _placeless(value: Any, data_root: Path) -> Any:
    """Settings with what lies below `data_root` as if that were `data`, and no other absolute path but for its name."""
    if isinstance(value, Mapping):
        return {name: _placeless(one, data_root) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_placeless(one, data_root) for one in value]
    if not isinstance(value, (str, Path)):
        return value
    path = Path(value)
    if data_root.parts and path.is_relative_to(data_root):
        return str("data" / path.relative_to(data_root))
    return path.name if path.is_absolute() else str(value)


def earlier(path: Path, config: Any, data_root: Path = Path("data")) -> tuple[list[dict[str, Any]], float]:
    """Rows and seconds of the result that is there, if it was made under the same settings."""
    before = read_json(path) if path.exists() else {}
    return (before["rows"], before["wall_s"]) if before.get("config_sha256") == config_hash(config, data_root) else ([], 0.0)


def write_result(
    name: str,
    config: Any,
    seeds: Sequence[int],
    rows: Sequence[dict[str, Any]],
    facts: Mapping[str, Any],
    wall_s: float | None = None,
    spent_s: float = 0.0,
    folder: Path = RESULTS,
    device: str = "auto",
    data_root: Path = Path("data"),
) -> Path:
    """Write results/NAME.json; called again after each seed, so that a run that is cut off leaves what it finished.

    Args:
        name: Name of the result.
        config: Plain settings that the rows depend on, of which the file holds a hash.
        seeds: Seeds that have rows.
        rows: Flat records; one with `skipped` says why its method or its data set was not run.
        facts: Further entries of the file. `data`, the number of images by data set, is one of them; only a benchmark of
            random input leaves it empty and says so in its `note`.
        wall_s: Seconds it took, if not those since the process started.
        spent_s: Seconds that earlier, cut-off runs of the same command took.
        folder: Where the file goes.
        device: What the computation was given: `auto`, `cpu` or `cuda`.
        data_root: Folder that stands for `data` in the settings.

    Raises:
        ValueError: There is no `data`, or it is empty without a `note`.
    """
    if "data" not in facts or not (facts["data"] or facts.get("note")):
        raise ValueError(f"facts of {name}: {sorted(facts)}, expected `data`, {{}} only with a `note` that says why")
    origin = ORIGIN
    path = folder / f"{name}.json"
    write_json(
        path,
        {
            "command": command_line(),
            "config_sha256": config_hash(config, data_root),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "versions": origin["versions"],
            "python": origin["python"],
            "commit": origin["commit"],
            "seeds": list(seeds),
            "wall_s": round(spent_s + (time.time() - STARTED if wall_s is None else wall_s), 1),
            **facts,
            "summary": summary(rows),
            "rows": list(rows),
        },
    )
    return path


FIGURES = ("auroc", "aupr", "fpr95", "fid", "fd", "flip_rate", "stay_rate", "acc", "nmi", "ari", "knn_acc", "images_per_s",
           "ratio")  # fmt: skip
CELLS = ("start_fraction", "guidance_weight", "limit")  # numbers that tell rows apart, as every text does


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every figure, for the rows that have a seed."""
    groups: dict[tuple[tuple[str, Any], ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "seed" in row and any(name in row for name in FIGURES):
            key = tuple((name, value) for name, value in row.items() if isinstance(value, str) or name in CELLS)
            groups.setdefault(key, []).append(row)
    found = []
    for key, group in groups.items():
        record = dict(key)
        for name in FIGURES:
            if all(isinstance(row.get(name), (int, float)) for row in group):
                record[name], record[f"{name}_std"] = mean_and_deviation([row[name] for row in group])
        found.append({**record, "n_seeds": len(group)})
    return found


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
