"""What every benchmark writes: results/NAME.json with command, configuration, device, versions, seeds, time and flat rows."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sdood_plugin.artifacts import provenance, value_hash, write_json

RESULTS = Path(__file__).parent / "results"
STARTED = time.time()
ORIGIN = provenance(sys.argv)  # of the code that runs, which may not be that of the checkout hours later


def device_name() -> str:
    """The accelerator's name, or the number of CPU threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def write_result(
    name: str,
    config: Any,
    seeds: Sequence[int],
    rows: Sequence[dict[str, Any]],
    wall_s: float | None = None,
    facts: Mapping[str, Any] | None = None,
    spent_s: float = 0.0,
    folder: Path = RESULTS,
) -> Path:
    """Write results/NAME.json; called again after each seed, so that a run that is cut off leaves what it finished.

    A row with `skipped` says why its method or its data set was not run. `facts` are further entries of the file,
    `spent_s` is time that earlier, cut-off runs of the same command took.
    """
    origin = ORIGIN
    path = folder / f"{name}.json"
    command = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    write_json(
        path,
        {
            "command": " ".join(command),
            "config_sha256": value_hash(config),
            "device": device_name(),
            "versions": origin["versions"],
            "python": origin["python"],
            "commit": origin["commit"],
            "seeds": list(seeds),
            "wall_s": round(spent_s + (time.time() - STARTED if wall_s is None else wall_s), 1),
            **(facts or {}),
            "summary": summary(rows),
            "rows": list(rows),
        },
    )
    return path


FIGURES = ("auroc", "aupr", "fpr95", "fid", "fd", "flip_rate", "stay_rate", "acc", "nmi", "ari", "images_per_s", "ratio")
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
