"""The diffusion job at its smallest, slot by slot, each on a machine that has nothing but what the one before handed over."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from benchmarks import cifar10_outliers, experiment
from benchmarks.queue import OUTLIERS
from sdood_plugin.artifacts import read_json

SMALL = """--data.train.path demo --data.train.root null --data.train.limit 90 --data.image_size null --diffusion.size tiny
--diffusion.steps 3 --diffusion.batch_size 8 --diffusion.compile false --outliers.sampling_steps 2 --outliers.sources 20
--outliers.batch_size 10 --detector.backbone small_cnn --detector.epochs 1 --detector.optimizer adamw --detector.lr 0.002
--inspection.kernel_subsets 2 --device cpu --scoring.k_distance 2""".split()


def test_the_slots_of_the_queue_end_in_rates_losses_and_figures(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "results")
    for item in OUTLIERS:
        assert not item.done(tmp_path / "results"), item.name
        rows = cifar10_outliers.main([*shlex.split(item.command)[3:], *SMALL])
        shutil.rmtree(tmp_path / "runs")
        if item.file:
            assert rows == [] and item.done(tmp_path / "results"), item.name
    result = read_json(tmp_path / "results" / OUTLIERS[-1].result)
    assert result["rows"] == rows and result["data"]["train"] == 90 and "train-diffusion" in result["stage_seconds"]
    sets, levels = ([row for row in rows if row["part"] == part] for part in ("set", "noise level"))
    assert [(row["set"], row["mode"], row["count"]) for row in sets] == [("outliers", "other", 20), ("controls", "same", 20)]
    assert all({"flip_rate", "stay_rate", "fd", "kd", "source_accuracy"} <= row.keys() for row in sets)
    assert all(row.keys() >= OUTLIERS[-1].rows[0].keys() for row in sets)
    assert len(levels) == 10 and {"timestep", "noise", "loss"} <= levels[0].keys()
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"cifar10_outliers-gpu-triplets.png", "cifar10_outliers-gpu-noise-levels.png"}


@pytest.mark.parametrize("size", cifar10_outliers.SIZES)
def test_every_size_has_the_true_labels_and_controls(size):
    config = experiment.configuration(experiment.read_options("cifar10_outliers", "", ["--size", size]), cifar10_outliers.SIZES)
    assert config.clustering.method == "given" and config.outliers.controls and config.data.test is None or size == "tiny"
