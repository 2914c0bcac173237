"""What a result file says of its run: a command to paste, settings without places, the device that was used, the images."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import demo, record
from benchmarks.experiment import configuration, read_options
from benchmarks.record import config_hash, device_name, earlier, write_result
from benchmarks.table1 import SIZES
from sdood_plugin.artifacts import read_json, write_json
from sdood_plugin.config import as_dict

FACTS = {"data": {"train": 3}}


def test_the_command_can_be_pasted_and_gives_the_same_words_and_environment(tmp_path, monkeypatch):
    script = tmp_path / "benchmarks" / "printing.py"
    script.parent.mkdir()
    script.write_text(f"import os, sys\nprint(*map(os.environ.get, {record.SETTINGS}), sys.argv[1:])\n")
    words = ["--note", "two words, a 'quote' and $HOME", "--limit", "[1, 2]"]
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    for name, value in zip(record.SETTINGS, "12", strict=True):
        monkeypatch.setenv(name, value)
    command = record.command_line()
    (tmp_path / "python").symlink_to(sys.executable)
    for name in record.SETTINGS:
        monkeypatch.delenv(name)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": ""}
    said = subprocess.run(command, shell=True, cwd=tmp_path, env=path, capture_output=True, text=True, check=True)
    assert said.stdout == f"1 2 {words}\n"
    assert shlex.split(record.command_line()) == ["python", "-m", "benchmarks.printing", *words]


def test_the_hash_of_the_settings_knows_no_place_but_everything_else(tmp_path):
    def of(data, *more):
        options = read_options("table1", "", ["--size", "cpu", "--data", str(data), *more])
        return config_hash(as_dict(configuration(options, SIZES)), options.data)

    assert of("data") == of(tmp_path / "one") == of("elsewhere/images")
    assert of("data") != of("data", "--diffusion.steps", "7")
    assert of("data") != of("data", "--data.train.path", "data/images_classic/cifar100/train")
    assert config_hash("data/cifar10/test") == config_hash("/a/cifar10/test", Path("/a")) != config_hash("data/cifar100/test")
    assert config_hash({"run": Path("/a/set")}) == config_hash({"run": "/b/c/set"}) != config_hash({"run": "/b/c/other"})
    assert config_hash({"sizes": (1, 2.5, None), "name": "demo"}) == config_hash({"sizes": [1, 2.5, None], "name": "demo"})


def test_a_result_is_gone_on_with_under_the_same_settings_wherever_the_data_lie(tmp_path):
    settings = {"path": "/here/lists/train.txt"}
    file = write_result("x", settings, [0], [{"seed": 0}], FACTS, wall_s=5, folder=tmp_path, data_root=Path("/here"))
    assert earlier(file, {"path": "/there/lists/train.txt"}, Path("/there")) == ([{"seed": 0}], 5.0)
    assert earlier(file, {"path": "/there/lists/test.txt"}, Path("/there")) == ([], 0.0)
    assert earlier(tmp_path / "none.json", settings) == ([], 0.0)


def test_the_device_is_the_one_that_was_used(monkeypatch):
    assert device_name("auto") == device_name("cpu") == f"cpu, {torch.get_num_threads()} threads"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert device_name("auto") == device_name("cuda") == "a GPU"
    assert device_name("cpu") == f"cpu, {torch.get_num_threads()} threads"


def test_a_result_without_images_says_why(tmp_path):
    for facts in ({}, {"note": "why"}, {"data": {}}):
        with pytest.raises(ValueError, match="expected `data`"):
            write_result("x", {}, [0], [], facts, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    made = read_json(write_result("x", {}, [0], [], {"data": {}, "note": "random input"}, folder=tmp_path))
    assert made["threads"] == torch.get_num_threads() and made["note"] == "random input"


def test_the_demo_goes_on_counting_seconds_where_its_runs_are_there(tmp_path, monkeypatch):
    spent = []

    def run(config, folder):
        write_json(folder / "metrics.json", {"rows": [{"method": "sdood", "ood": "near", "seed": config.seed, "auroc": 99.0}]})
        write_json(folder / "comparators" / "fake-it" / "fakes.json", {"steps": 175})

    def keep(*arguments, spent_s, **more):
        spent.append(spent_s)
        return write_result(*arguments, spent_s=spent_s, wall_s=7.0, **more)

    for name, fake in {
        "ROOT": tmp_path,
        "run": run,
        "label_quality": lambda _: {},
        "read_scores": lambda *_: {},
        "add_pairs": lambda *_: None,
        "data_facts": lambda *_: FACTS,
        "write_result": keep,
    }.items():
        monkeypatch.setattr(demo, name, fake)
    configuration = str(Path(record.__file__).parent.parent / "configs" / "demo.yml")
    monkeypatch.setattr(sys, "argv", f"demo.py --labels given --config {configuration} --seeds 0 --note said".split())
    demo.main()
    demo.main()
    (tmp_path / "runs").rename(tmp_path / "gone")
    demo.main()
    assert spent == [0.0, 7.0, 0.0]
    assert read_json(tmp_path / "benchmarks" / "results" / "demo-given.json")["note"] == "said"
    assert read_json(tmp_path / "benchmarks" / "results" / "demo-given.json")["fakes"] == [{"seed": 0, "steps": 175}]


def test_a_stage_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        read_options("table1", "", ["--size", "tiny", "--until", "clusters"])
    assert "invalid choice: 'clusters'" in capsys.readouterr().err
