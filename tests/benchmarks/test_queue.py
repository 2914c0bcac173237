"""The queue: names and results are its own, what is done is left out, what does not fit is skipped, commands can be read."""

from __future__ import annotations

import importlib
import shlex

from benchmarks import queue, table2
from benchmarks.experiment import configuration
from benchmarks.queue import QUEUE, Item, following
from sdood_plugin.artifacts import write_json


def test_every_item_is_one_slot_and_has_its_own_name_and_sign_of_being_done():
    assert len({item.name for item in QUEUE}) == len(QUEUE)
    assert len({(item.result, item.seeds, item.method) for item in QUEUE}) == len(QUEUE)
    assert all(0 < item.minutes <= 10 for item in QUEUE)


def test_every_command_starts_a_benchmark_that_exists():
    for item in QUEUE:
        words = shlex.split(item.command)
        assert words[:2] == ["python", "-m"]
        assert hasattr(importlib.import_module(words[2]), "main"), item.name


def test_the_tables_of_the_queue_have_settings_that_can_be_read():
    read = set()
    for item in QUEUE:
        words = shlex.split(item.command)
        script = words[2].removeprefix("benchmarks.")
        if script.startswith(("table", "fig")):
            module = importlib.import_module(words[2])
            options = module.read_options(script, "", words[3:])
            assert item.result.startswith((f"{options.name}.json", f"handover/{options.name}-")), item.name
            settings = (script, *options.overrides)
            if settings not in read:  # parsing them takes a while
                read.add(settings)
                sizes = (table2 if script == "table3" else module).SIZES
                assert configuration(options, sizes).data.train.path.startswith("data"), item.name


def test_the_next_item_is_the_first_that_is_missing_and_fits(tmp_path):
    items = [
        Item("long", "x", 30, "", "long.json"),
        Item("seeds", "x", 5, "", "table.json", (0, 1), "sdood"),
        Item("last", "x", 10, "", "last.json"),
    ]
    assert following(10, items, tmp_path) == items[1]
    write_json(tmp_path / "table.json", {"rows": [{"seed": 0, "method": "sdood"}, {"seed": 1, "method": "dn2"}]})
    assert following(10, items, tmp_path) == items[1]
    write_json(tmp_path / "table.json", {"rows": [{"seed": seed, "method": "sdood"} for seed in (0, 1)]})
    assert following(10, items, tmp_path) == items[2]
    write_json(tmp_path / "last.json", {})
    assert following(10, items, tmp_path) is None and following(30, items, tmp_path) == items[0]


def test_it_can_be_asked(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["queue", "--next", "--minutes", "10"])
    queue.main()
    assert "python -m benchmarks." in capsys.readouterr().out
