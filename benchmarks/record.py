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
) -> Path:
    """Write results/NAME.json; called again after each seed, so that a run that is cut off leaves what it finished.

    A row with `skipped` says why its method or its data set was not run. `facts` are further entries of the file.
    """
    origin = ORIGIN
    path = RESULTS / f"{name}.json"
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
            "wall_s": round(time.time() - STARTED if wall_s is None else wall_s, 1),
            **(facts or {}),
            "rows": list(rows),
        },
    )
    return path


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
