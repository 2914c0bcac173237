"""The sampling benchmark at its smallest: each saving has a row, one half of the sources chooses and the other reports."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial

import pytest
import torch

from benchmarks import readme, sampling_speed
from benchmarks.queue import QUEUE
from benchmarks.sampling_speed import HALVES, Method, halves, methods, summarise
from benchmarks.savings import choose, chosen, savings
from sdood_plugin.artifacts import read_json
from sdood_plugin.config import ClusteringConfig
from sdood_plugin.run import run

from ..test_run import tiny_config

SAVINGS = ["steps", "batched forward", "interval", "precision", "compile"]
OURS = ["--ours", "dpm", "2", "0", "1", "1,3", "--ours", "dpm", "2", "0.01", "1", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config, folder = tiny_config(clustering=ClusteringConfig(method="given")), tmp_path_factory.mktemp("speed")
    for stage in ("train-reference", "train-diffusion"):
        run(dataclasses.replace(config, detector=dataclasses.replace(config.detector, epochs=1)), folder, stage)
    return folder


def test_a_seed_has_a_row_a_method_and_baseline_beside_those_of_earlier_seeds(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling_speed, "RESULTS", tmp_path)
    for seed in ("0", "1"):
        words = ["speed", str(folder), "--images", "14", "--batch-size", "4", "--start", "0.03", *OURS, "--seeds", seed]
        monkeypatch.setattr("sys.argv", words)
        sampling_speed.main()
    result = read_json(tmp_path / "sampling_speed.json")
    assert result["seeds"] == [0, 1] and len(result["rows"]) == 2 * 2 * 6
    assert {row["images"] for row in result["rows"]} == {4}  # of half of the sources, whole batches alone
    assert {"chosen_by", "features", "outliers", "data", "chosen_settings", "savings"} <= result.keys()
    for baseline in sampling_speed.BASELINES:
        own = [row for row in result["rows"] if row["baseline"] == baseline and row["chosen"]]
        picked = [{row["method"] for row in own if row["seed"] == seed} for seed in (0, 1)]
        assert picked[0] == picked[1], baseline  # one choice for all seeds
    assert [row["saving"] for row in result["savings"]] == SAVINGS
    item = next(item for item in QUEUE if item.name == "speed: sampling 0")
    assert all(any(wanted.keys() <= row.keys() for row in result["rows"]) for wanted in item.rows)
    first, second = ([row["fd"] for row in result["rows"] if row["seed"] == seed] for seed in (0, 1))
    assert first != second


def test_a_half_chooses_and_the_other_reports():
    chosen = halves(100, 20, seed=0)
    assert [len(rows) for rows in chosen.values()] == [10, 10] and len(set(torch.cat([*chosen.values()]).tolist())) == 20
    assert not torch.equal(chosen["choosing"], halves(100, 20, seed=1)["choosing"])

    flips = {"choosing": [50.0, 51.0, 60.0, 51.0], "reported": [40.0, 48.0, 40.0, 41.0]}
    found = [Method(name, lambda setting, batch: batch.images) for name in ("naive", "ours: a", "ours: b", "ours: c")]
    for method, seconds in zip(found, (8.0, 1.0, 0.5, 2.0), strict=True):
        for half in HALVES:
            method.seconds[half], method.made[half] = [seconds], [torch.full((10, 3, 4, 4), found.index(method))]

    def judge(images, labels):
        half = HALVES[int(labels[0])]
        return {"flip_rate": flips[half][int(images[0, 0, 0, 0])], "stay_rate": 0.0, "fd": 1.0}

    labels = {half: torch.full((10,), number) for number, half in enumerate(HALVES)}
    rows = choose([{"seed": 0, **row} for row in summarise(found, judge, labels, batch_size=10)])
    assert [row["chosen"] for row in rows] == [False, True, False, False]  # the fastest that is equal where it was chosen
    assert [row["equal"] for row in rows] == [True, False, True, True]  # what it is on the other half is said as it is
    assert rows[1]["ratio"] == 8.0 and rows[1]["flips_above"] == pytest.approx(8.0)


def rows_of(method, choosing, *, baseline="naive", equal=True, speed=1.0):
    """A row a seed, of (flips above, Frechet distance above in per cent, ratio) on the choosing half."""
    names = ("choosing_flips_above", "choosing_fd_above_percent", "choosing_ratio")
    said = {"baseline": baseline, "method": method, "ratio": 3.0, "flips_above": 1.0, "fd_above_percent": 6.0, "equal": equal}
    return [
        {"seed": seed, **said, "images_per_s": speed, **dict(zip(names, row, strict=True))} for seed, row in enumerate(choosing)
    ]


def test_one_setting_is_chosen_on_the_halves_of_all_seeds():
    rows = [
        *rows_of("naive", [(0, 0, 1)] * 3),
        *rows_of("ours: fast, unequal in the mean", [(0, 4, 50), (0, 4, 50), (0, 9, 50)]),
        *rows_of("ours: lucky in its one seed", [(0, 0, 60)]),
        *rows_of("ours: unequal in one seed, not in the mean", [(2.5, 6, 20), (-1, 1, 20), (-1, 1, 20)], equal=False),
        *rows_of("ours: equal in every seed", [(0, 0, 19), (0, 0, 30), (0, 0, 10)]),
    ]
    picked = [(row["seed"], row["method"]) for row in choose(rows) if row["chosen"]]
    assert picked == [(seed, "ours: unequal in one seed, not in the mean") for seed in range(3)]
    (said,) = chosen(choose(rows))
    assert said["equal"] == "0 of 3" and said["ratio"] == 3.0 and said["ratio_std"] == 0  # as it is on the other halves
    assert chosen(choose(rows_of("ours: far", [(9, 9, 9)])))[0]["method"] == "none is equal"
    assert "0 of 3" in readme.chosen([said, {"baseline": "informed", "method": "none is equal"}])


def test_each_saving_is_told_alone():
    plain, equal = "ours: dpm, 6 steps, w = 3", [(0, 0, 4)]
    rows = [
        *rows_of("naive", equal, baseline="informed", speed=1),
        *rows_of("naive, batched forward", equal, baseline="informed", speed=2),
        *rows_of("informed", equal, baseline="informed", speed=10),
        *rows_of(plain, equal, baseline="informed", speed=30),
        *rows_of(f"{plain}, guided from 0.13 to 1 T", [(0, 0, 6)], baseline="informed", speed=45),
    ]
    said = {row["saving"]: row.get("ratio", row.get("said")) for row in savings(rows)}
    assert list(said) == SAVINGS
    assert [*said.values()][:3] == [3.0, 2.0, 1.5]
    assert said["precision"] == "not applicable: float32" and said["compile"] == "not measured: no --compile"
    rows += rows_of("informed, float32", equal, baseline="informed", speed=4)
    rows += rows_of(f"{plain}, compiled", [(0, 0, 9)], baseline="informed", speed=60)
    said = {row["saving"]: row["ratio"] for row in savings(rows)}
    assert [*said.values()] == [3.0, 2.0, 1.5, 2.5, 2.0]
    assert readme.savings(savings(rows)).count("\n| ") == 2 + len(SAVINGS)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_saving_has_a_row_of_its_own(device):
    options = argparse.Namespace(ours=[("dpm", "8", "0", "1", "2"), ("dpm", "8", "0.1", "1", "2")], only=None)
    names = [method.name for method in methods(object(), options, torch.device(device))]
    plain = ["ours: dpm, 8 steps, w = 2", "ours: dpm, 8 steps, w = 2, guided from 0.1 to 1 T"]
    assert set(names) >= {"naive", "naive, batched forward", "informed", *plain, *(f"{name}, compiled" for name in plain)}
    found = {method.name: method.make for method in methods(None, options, torch.device(device))}
    assert ("informed, float32" in found) == (device == "cuda")  # where informed itself is bf16
    if device == "cuda":
        assert isinstance(found["informed, float32"], partial) and found["informed, float32"].keywords == {"half": False}
