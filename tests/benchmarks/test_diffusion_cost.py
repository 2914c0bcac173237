"""The cost of a training is that of its steps, not of what comes before them."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import diffusion_cost
from benchmarks.queue import QUEUE


def test_what_a_training_does_before_its_steps_are_warm_is_not_in_its_speed(monkeypatch):
    names, delays = diffusion_cost.train_diffusion.__globals__, iter([1.0, 0.0, 1.0])
    build = names["build_unet"]

    def slow(*words, **named):  # as a compilation is, and never twice alike
        time.sleep(next(delays))
        return build(*words, **named)

    monkeypatch.setitem(names, "build_unet", slow)
    row = diffusion_cost.training("tiny", 8, batch_size=2, steps=3, compiled=False)
    assert row["images_per_s"] > 2 * 3 / 1.0
    item = next(item for item in QUEUE if item.name == "speed: diffusion")
    assert all(row.keys() >= wanted.keys() for wanted in item.rows if wanted["part"] == "training")


def test_a_row_of_two_processes_is_of_two(tmp_path):
    with pytest.raises(AssertionError, match="1 processes, expected 2"):
        diffusion_cost.make_set(4, 2, tmp_path, number=2)
    if torch.cuda.device_count() == 1:
        pytest.skip("two processes need two GPUs, or a CPU alone")
    assert [row["processes"] for row in diffusion_cost.processes(4, 2)] == [1, 2]  # each of which has said how many it is
