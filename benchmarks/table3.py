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


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Make table2's cells of w = 2 where they are missing, and write results/table3-SIZE.json of them."""
    options = read_options("table3", __doc__, arguments)
    table2.main(
        [
            "--size",
            options.size,
            "--suffix",
            options.suffix,
            "--data",
            str(options.data),
            "--seeds",
            *map(str, options.seeds),
            *options.overrides,
        ]
    )
    made = read_json(dataclasses.replace(options, script="table2").result)
    rows = [row for row in made["rows"] if row["guidance_weight"] == 2]
    config = table2.settings(options)
    facts = {**data_facts(config, options.folder(options.seeds[0])), "published": table2.PAPER, "from": made["command"]}
    where = {"folder": options.results, "device": config.device, "data_root": options.data}
    write_result(options.name, as_dict(config), options.seeds, rows, wall_s=made["wall_s"], facts=facts, **where)
    return rows


if __name__ == "__main__":
    main()
