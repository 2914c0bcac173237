"""The queue: names and results are its own, what is done is left out, what does not fit is skipped, commands can be read."""

from __future__ import annotations

import argparse
import importlib
import shlex
from pathlib import Path

import pytest

from benchmarks import cifar10_outliers, experiment, queue, sampling_speed, table1, table2
from benchmarks.experiment import configuration
from benchmarks.queue import QUEUE, Item, following
from sdood_plugin.artifacts import write_json
from sdood_plugin.cli import build_parser, run_config
from sdood_plugin.config import RunConfig
from sdood_plugin.stage_table import BY_NAME

GOES_ON = {  # stages of the first run that others take from it
    "table4": ("cluster", "train-reference", "train-diffusion", "generate", "train-detector", "calibrate", "train-comparators"),
    "fig2": ("cluster", "train-reference", "train-diffusion"),
    "fig3": ("cluster", "train-diffusion"),
    "table3": ("cluster",),
}


def test_every_item_is_one_slot_and_has_its_own_name_and_sign_of_being_done():
    assert len({item.name for item in QUEUE}) == len(QUEUE)
    assert len({(item.result, str(item.rows), item.file) for item in QUEUE}) == len(QUEUE)
    assert all(0 < item.minutes <= 10 for item in QUEUE)


def test_what_an_item_goes_on_from_stands_before_it():
    names: set[str] = set()
    for item in QUEUE:
        assert names.issuperset(item.after), item.name
        names.add(item.name)
    after = {item.name: item.after for item in QUEUE}
    assert after["OpenOOD protocol: compare 1"] == ("OpenOOD protocol: fake-it 1",)
    assert after["ViT-B/16: train-reference 2"] == ("unlabelled ResNet-18: generate 2",)
    assert not after["OpenOOD protocol: train-diffusion 0"]


class Read(Exception):
    """A command line was read: what a script would do then is left out."""


def test_every_command_can_be_read_by_its_benchmark(monkeypatch, capsys):
    whole = argparse.ArgumentParser.parse_args

    def parse_args(self, *words):
        raise Read(whole(self, *words))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    read = set()
    for item in QUEUE:
        words = shlex.split(item.command)
        module = importlib.import_module(words[2])
        assert words[:2] == ["python", "-m"] and hasattr(module, "main"), item.name
        if not hasattr(module, "read_options"):  # of those that have it below
            monkeypatch.setattr("sys.argv", words[2:])
            try:
                module.main()
            except Read as options:
                read.add(item.name)
                if module is sampling_speed:
                    assert len(list(sampling_speed.wanted(options.args[0]))) > 9
            except SystemExit:
                pytest.fail(f"{item.name}: {capsys.readouterr().err}")
    assert {"speed: sampling 2", "speed: diffusion", "outlier quality", "selection"} <= read


def test_the_sampling_settings_fit_the_run_they_are_tried_on():
    options = cifar10_outliers.read_options("cifar10_outliers", "", ["--size", "gpu"])
    start = configuration(options, cifar10_outliers.SIZES).outliers.start_fraction
    assert options.folder(0).name == Path(queue.RUN).name and start == 0.2
    settings = [words.split() for words in queue.OURS.removeprefix("--ours ").split(" --ours ")]
    assert {low for _, _, low, _, _ in settings} == {"0", "0.13"}
    tried = {(sampler, steps, low, w) for sampler, steps, low, _, weights in settings for w in weights.split(",")}
    assert {("dpm", "6", "0", "3"), ("dpm", "6", "0.13", "3")} <= tried  # one thing changed
    assert {("ddpm", steps, "0.13") for steps in "68"} <= {setting[:3] for setting in tried}


def test_the_tables_of_the_queue_have_settings_that_can_be_read():
    read: dict[tuple[str, ...], RunConfig] = {}
    for item in QUEUE:
        words = shlex.split(item.command)
        script, module = words[2].removeprefix("benchmarks."), importlib.import_module(words[2])
        if hasattr(module, "read_options"):
            options = module.read_options(script, "", words[3:])
            seed = options.seeds[0]
            assert options.until in (None, *BY_NAME), item.name
            assert item.result in (f"{options.name}.json", f"handover/{options.folder(seed).name}.json"), item.name
            settings = (script, *options.overrides)
            if settings not in read:  # parsing them takes a while
                sizes = (table2 if script == "table3" else module).SIZES
                read[settings] = config = configuration(options, sizes)
                assert config.data.train.path.startswith("data"), item.name
                assert ("CIFAR-100" in item.needs) == any(ood.name == "cifar100" for ood in config.data.ood), item.name
                assert config.clustering.pretext_steps <= 15000 or config.clustering.method == "given", item.name
            assert options.method in (None, *read[settings].compare.methods), item.name
    by_script = {settings[0]: config for settings, config in reversed(read.items())}  # the first of each
    for script, stages in GOES_ON.items():
        for name in stages:
            first, second = (BY_NAME[name].settings(by_script[one]) for one in ("table1", script))
            assert first == second, f"{script} would run {name} again"


def test_the_small_transformer_is_fine_tuned_by_its_own_file_on_three_seeds_of_the_resnets_clusters():
    item = next(item for item in QUEUE if item.name == "ViT-Tiny, fine-tuned")
    options = table1.read_options("table1", "", shlex.split(item.command)[3:])
    assert options.seeds == [0, 1, 2] == sorted({row["seed"] for row in item.rows})
    own = configuration(options, table1.SIZES)
    folder = experiment.ROOT / "configs"
    words = ["run", "--config", str(folder / "cifar10.yml"), "--config", str(folder / "cifar10_vit_tiny.yml"), "--out", "unused"]
    parser = build_parser()
    assert own.detector == run_config(parser.instantiate(parser.parse_args(words))["run"]).detector
    assert own.detector.frozen_blocks == 6 and own.detector.backbone == "vit_tiny_patch16_224"
    first = next(item for item in QUEUE if item.name.startswith("unlabelled ResNet-18: cluster"))
    resnet = configuration(table1.read_options("table1", "", shlex.split(first.command)[3:]), table1.SIZES)
    assert options.start_from == "table1-gpu-resnet18"
    for name in ("cluster", "train-diffusion"):
        assert BY_NAME[name].settings(own) == BY_NAME[name].settings(resnet), f"it would run {name} again"


def test_the_next_item_is_the_first_that_is_missing_and_fits(tmp_path):
    rows = tuple({"seed": seed, "cell": cell} for seed in (0, 1) for cell in "ab")
    items = [
        Item("long", "x", 30, "", "long.json"),
        Item("cells", "x", 5, "", "table.json", rows),
        Item("trained", "x", 10, "", "handover/run.json", file="stages/cluster.json"),
        Item("other", "x", 4, "", "other.json", after=("cells", "trained")),
    ]
    assert following(10, items, tmp_path) == items[1]
    write_json(tmp_path / "table.json", {"rows": [{**row, "auroc": 1.0} for row in rows[:3]]})
    assert following(10, items, tmp_path) == items[1]
    write_json(tmp_path / "table.json", {"rows": [{**row, "auroc": 1.0} for row in rows]})
    assert following(10, items, tmp_path) == items[2]
    assert following(5, items, tmp_path) is None  # `other` goes on from what is not done
    write_json(tmp_path / "handover" / "run.json", {"files": ["labels.csv"]})
    assert following(10, items, tmp_path) == items[2]
    write_json(tmp_path / "handover" / "run.json", {"files": ["labels.csv", "stages/cluster.json"]})
    assert following(5, items, tmp_path) == items[3]
    write_json(tmp_path / "other.json", {"rows": []})
    assert following(10, items, tmp_path) is None and following(30, items, tmp_path) == items[0]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("CIFAR-10 outliers: inspect 0", 2),
        ("speed: sampling 0", 2),
        ("speed: diffusion", 9),
        ("speed: neighbours", 15),
        ("speed: detector", 3),
        ("table 2", 30),
        ("table 3", 10),
        ("figure 3, seed 0", 2),
        ("frozen ViT-Tiny", 6),
        ("ViT-Tiny, fine-tuned", 18),
        ("selection", 18),
    ],
)
def test_an_item_is_done_when_its_last_seed_or_cell_is(tmp_path, name, count):
    item = next(item for item in QUEUE if item.name == name)
    assert len(item.rows) == count
    write_json(tmp_path / item.result, {"rows": item.rows[:-1]})
    assert not item.done(tmp_path)
    write_json(tmp_path / item.result, {"rows": item.rows})
    assert item.done(tmp_path)


def test_no_item_is_done_because_its_file_is_there():
    assert [item.name for item in QUEUE if not item.rows and not item.file] == []


def test_a_benchmark_that_was_killed_between_two_batches_is_offered_again(tmp_path):
    item = next(item for item in QUEUE if item.name == "speed: sampling 0")
    for images, done in ((512, False), (1024, True)):
        write_json(tmp_path / item.result, {"rows": [{**row, "images": images, "ratio": 1.0} for row in item.rows]})
        assert item.done(tmp_path) == done


def test_the_diffusion_job_stands_first():
    assert [item.name.split(": ")[0] for item in QUEUE[:4]] == ["CIFAR-10 outliers"] * 4
    assert following(10) == QUEUE[0]


def test_it_can_be_asked(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["queue", "--next", "--minutes", "10"])
    queue.main()
    assert "python -m benchmarks." in capsys.readouterr().out
