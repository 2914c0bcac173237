"""The embedded data, several seeds: ours beside the comparators, labels hidden or given, with paired differences.

python -m benchmarks.demo --labels hidden --seeds 0 1 2 3 4
python -m benchmarks.demo --labels given --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from benchmarks.experiment import Rows, data_facts, with_given_labels
from benchmarks.paired import add_pairs, read_scores
from benchmarks.record import earlier, mean_and_deviation, write_result
from sdood_plugin.artifacts import read_json
from sdood_plugin.cli import read_config
from sdood_plugin.config import Comparator, as_dict
from sdood_plugin.context import Context
from sdood_plugin.run import run
from sdood_plugin.stages import label_quality

ROOT = Path(__file__).parent.parent


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Run the seeds one after the other and write results/demo-LABELS[-suffix].json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", choices=["hidden", "given"], required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yml")
    parser.add_argument("--suffix", default="", help="ends the names of run folders and of the result file")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--note", help="a sentence to stand in the result")
    options = parser.parse_args(arguments)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    base = dataclasses.replace(read_config(options.config), report=False)
    base = dataclasses.replace(base, compare=dataclasses.replace(base.compare, methods=list(get_args(Comparator))))
    if options.labels == "given":
        base = with_given_labels(base)
    name, results = f"demo-{options.labels}{options.suffix}", ROOT / "benchmarks" / "results"
    noted = {"note": options.note} if options.note else {}
    begun = (ROOT / "runs" / "benchmarks" / f"{name}-{options.seeds[0]}").exists()  # else all is made anew
    spent = earlier(results / f"{name}.json", as_dict(base))[1] if begun else 0.0
    rows: Rows = []
    scores, fakes = [], []  # of Fake-it's outliers how far they are from the training images
    for seed in options.seeds:
        folder = ROOT / "runs" / "benchmarks" / f"{name}-{seed}"
        config = dataclasses.replace(base, seed=seed)
        run(config, folder)
        quality = label_quality(Context(config, folder)) or {}
        extra = {"labels": options.labels, **{f"label_{key}": value for key, value in quality.items()}}
        rows += [row | extra for row in read_json(folder / "metrics.json")["rows"]]
        scores.append({ood.name: read_scores(folder, ood.name) for ood in base.data.ood})
        done = options.seeds[: options.seeds.index(seed) + 1]
        fakes.append({"seed": seed, **read_json(folder / "comparators" / "fake-it" / "fakes.json")})
        facts = {**data_facts(config, folder), **noted, "fakes": fakes}
        result = write_result(name, as_dict(base), done, rows, facts, spent_s=spent, folder=results, device=base.device)
        add_pairs(result, scores)
    print(table(rows))
    return rows


def table(rows: Rows) -> str:
    """Mean and standard deviation of the AUROC by method and test set."""
    sets = list(dict.fromkeys(row["ood"] for row in rows))
    width = max(len(row["method"]) for row in rows) + 2
    lines = ["AUROC".ljust(width) + "".join(name.rjust(16) for name in sets)]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [mean_and_deviation([r["auroc"] for r in rows if r["method"] == method and r["ood"] == name]) for name in sets]
        lines.append(method.ljust(width) + "".join(f"{mean:.1f} +- {deviation:.1f}".rjust(16) for mean, deviation in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
