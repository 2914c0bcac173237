"""The speed of the search: what is prepared counts in a ratio of its own, and the result says what the device multiplies."""

from __future__ import annotations

import argparse
from functools import partial

import pytest
import torch

from benchmarks import neighbours_speed
from sdood_plugin.artifacts import read_json

pytest.importorskip("faiss", reason="the benchmark compares with faiss")


@pytest.mark.parametrize("task", ["search", "score"])
def test_a_ratio_counts_what_both_prepare_for_the_task(task, monkeypatch):
    clock, made = neighbours_speed.timed, []

    def timed(call, repeats=1):
        made.append(clock(call, repeats))
        return 2.0 ** len(made), made[-1][1]  # seconds that add up to nothing else

    monkeypatch.setattr(neighbours_speed, "timed", timed)
    settings = argparse.Namespace(device="cpu", repeats=1)
    drawn = neighbours_speed.drawn_features("clustered", 40, 400, 16)
    rows = [row for row in neighbours_speed.case("clustered", *drawn, settings) if row["task"] == task]
    own = next(row for row in rows if row["method"] == "sdood")
    for name in ("faiss", "sklearn"):
        theirs = next(row for row in rows if row["method"] == name)
        assert theirs["same"] == 100
        assert theirs[f"ratio_{name}"] == theirs["seconds"] / own["seconds"]
        whole = theirs["prepare_s"] + theirs["seconds"], own["prepare_s"] + own["seconds"]
        assert theirs[f"ratio_{name}_prepared"] == whole[0] / whole[1] != theirs[f"ratio_{name}"]
    # calls of ours: prepare, first, search, prepare, first, score; two products; of each other: joint, half, search, score
    assert own["prepare_s"] == {"search": 2 + 4, "score": 16 + 32}[task]
    assert theirs["prepare_s"] == {"search": 2**13, "score": 2**13 + 2**14}[task]


@pytest.mark.parametrize("multiplies", [False, True])
def test_the_result_says_whether_the_device_multiplies_bfloat16(tmp_path, monkeypatch, multiplies):
    asked = []
    monkeypatch.setattr(neighbours_speed, "multiplies_bfloat16", lambda device: asked.append(device) or multiplies)
    monkeypatch.setattr(neighbours_speed, "case", lambda *given: [])
    monkeypatch.setattr(neighbours_speed, "write_result", partial(neighbours_speed.write_result, folder=tmp_path))
    monkeypatch.setattr("sys.argv", ["neighbours_speed", "--tiny", "--threads", str(torch.get_num_threads())])
    neighbours_speed.main()
    assert read_json(tmp_path / "neighbours_speed.json")["multiplies_bfloat16"] is multiplies
    assert set(asked) == {torch.device("cpu")}
