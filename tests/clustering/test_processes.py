"""Neighbours against a naive search, and two processes against one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdood_plugin.clustering.processes import mine_neighbours

from .two_processes import find


def naive_neighbours(features, k):
    """Every other image by distance, then position, in Python floats."""
    rows = features.double().tolist()
    return [
        sorted(
            (j for j in range(len(rows)) if j != i),
            key=lambda j: (sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)), j),
        )[:k]
        for i in range(len(rows))
    ]


@pytest.mark.parametrize("k", [1, 5, 29])
def test_neighbours_are_those_of_a_naive_search(generator, accelerator, k):
    features = torch.randn(30, 4, generator=generator)
    assert mine_neighbours(features, k, accelerator).tolist() == naive_neighbours(features, k)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_copies_are_neighbours_and_an_image_never_is_its_own(accelerator, k):
    features = torch.tensor([[0.0, 0], [1, 0], [3, 1]]).repeat(4, 1)
    assert mine_neighbours(features, k, accelerator).tolist() == naive_neighbours(features, k)


def test_two_processes_find_what_one_finds(tmp_path, accelerator):
    script, path = str(Path(__file__).with_name("two_processes.py")), tmp_path / "found.pt"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, str(path)]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = find(accelerator), torch.load(path, weights_only=True)
    assert (int(one["processes"]), int(two["processes"])) == (1, 2)
    assert torch.equal(one["neighbours"], two["neighbours"]) and one["neighbours"].shape == (41, 7)
    torch.testing.assert_close(one["features"], two["features"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one["gradient"], two["gradient"], rtol=1e-5, atol=1e-6)
