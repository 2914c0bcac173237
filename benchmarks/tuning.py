"""Settings of the comparators on the embedded data, each the best with an ID digit left out as the near OOD.

python -m benchmarks.tuning

No test scan is used (`data.demo_left_out`), as for our own settings. One setting after the other: each is tried with the
best of those before it, and the winners are printed as the `compare` section of configs/demo.yml.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.experiment import data_facts
from benchmarks.record import write_result
from sdood_plugin.artifacts import read_json
from sdood_plugin.cli import read_config
from sdood_plugin.config import CompareConfig, RunConfig, as_dict
from sdood_plugin.run import run

ROOT = Path(__file__).parent.parent
TRIALS: list[tuple[str, str, list[Any]]] = [  # method, setting, values
    ("multi-class", "multi_class_lr", [2e-3, 6e-4, 2e-4, 6e-5]),
    ("mscl", "mscl_lr", [1e-2, 1e-3, 1e-4, 1e-5]),
    ("mscl", "mscl_angular", [0.0, 1.0]),
    ("fake-it", "fake_it_lr", [2e-3, 6e-4, 2e-4, 6e-5, 2e-5]),
    ("fake-it", "fake_it_steps", [90, 175, 350, 700]),
    ("fake-it", "fake_it_frozen_blocks", [0, 1]),
]


def near_auroc(config: RunConfig, folder: Path, method: str) -> float:
    """A method's AUROC against the left-out digit."""
    run(config, folder, "compare")
    rows = read_json(folder / "comparison" / "rows.json")
    return next(row["auroc"] for row in rows if row["method"] == method and row["group"] == "near")


def main() -> None:
    """Try every value and write results/tuning.json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digit", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yml")
    options = parser.parse_args()
    base = read_config(options.config)
    base = dataclasses.replace(
        base,
        report=False,
        seed=options.seed,
        data=dataclasses.replace(base.data, demo_left_out=options.digit),
        clustering=dataclasses.replace(base.clustering, clusters=5),
        compare=CompareConfig(),
    )
    folder = ROOT / "runs" / "benchmarks" / f"tuning-{options.digit}-{options.seed}"
    best, rows = base.compare, list[dict[str, Any]]()
    for method, setting, values in TRIALS:
        found = {}
        for value in values:
            compare = dataclasses.replace(best, methods=[method], **{setting: value})
            found[value] = near_auroc(dataclasses.replace(base, compare=compare), folder, method)
            rows.append({"method": method, "setting": setting, "value": value, "seed": base.seed, "auroc": found[value]})
            write_result(
                "tuning", as_dict(base), [base.seed], rows, facts={**data_facts(base, folder), "left_out": options.digit}
            )
        best = dataclasses.replace(best, **{setting: max(found, key=lambda value: found[value])})
    print("\n".join(f"  {setting}: {getattr(best, setting)}" for _, setting, _ in TRIALS))


if __name__ == "__main__":
    main()
