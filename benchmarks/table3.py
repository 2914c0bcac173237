"""Table 3: distance, vote and both by the start step S at w = 2, taken from the cells of `benchmarks.table2`.

python -m benchmarks.table3 --size cpu
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks import table2
from benchmarks.experiment import Rows, data_facts, read_options
from benchmarks.record import write_result
from sdood_plugin.artifacts import read_json
from sdood_plugin.config import as_dict

WEIGHT = 2.0


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Make table2's cells of w = 2 where they are missing, and write results/table3-SIZE.json of them."""
    options = read_options("table3", __doc__, arguments)
    grid = dataclasses.replace(options, script="table2")
    made = table2.run_cells(grid, [cell for cell in table2.grid(options.size) if cell["guidance_weight"] == WEIGHT])
    rows = [row for row in made if row["guidance_weight"] == WEIGHT]
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    config, source = table2.settings(options), read_json(grid.result)
    facts = {**data_facts(config, options.folder(seeds[0])), "published": table2.PAPER, "from": source["command"]}
    where = {"folder": options.results, "device": config.device, "data_root": options.data}
    write_result(options.name, as_dict(config), seeds, rows, wall_s=source["wall_s"], facts=facts, **where)
    return rows


if __name__ == "__main__":
    main()
