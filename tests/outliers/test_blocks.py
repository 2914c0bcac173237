"""Which outliers are made together, and what each draws for itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sdood_plugin.outliers.blocks import (
    START_LEVELS,
    blocks,
    file_name,
    guidance_weights,
    identities,
    in_blocks,
    jobs,
    start_fractions,
)

from .making import CONFIG, RANGES


def test_jobs_are_spread_over_the_sources():
    assert jobs(3, dataclasses.replace(CONFIG, per_source=2)).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert jobs(10, dataclasses.replace(CONFIG, sources=5)).tolist() == [[0, 0], [2, 0], [4, 0], [6, 0], [8, 0]]
    assert len(jobs(4, dataclasses.replace(CONFIG, sources=9))) == 4
    names = {file_name(source, copy) for source in (0, 7, 999, 1000, 1_234_567) for copy in (0, 1)}
    assert len(names) == 10 and "images/0001/0001000_0.png" in names


@pytest.mark.parametrize("config", [CONFIG, RANGES], ids=["values", "ranges"])
def test_a_job_has_one_block_and_one_place_in_it(config):
    config = dataclasses.replace(config, per_source=3, sources=10)
    made = blocks(25, config, 5)
    every = torch.cat([block.jobs for block in made])
    assert sorted(every.tolist()) == sorted(jobs(25, config).tolist()) and max(len(block.jobs) for block in made) <= 4
    fewer = blocks(25, dataclasses.replace(config, per_source=2), 5)  # more copies leave the blocks of the first ones alone
    assert all(torch.equal(a.jobs, b.jobs) and a.start_fraction == b.start_fraction for a, b in zip(fewer, made, strict=False))
    for block in made:
        assert start_fractions(config, 5, identities(block.jobs)).unique().tolist() == [block.start_fraction]


def test_a_value_is_the_same_for_all():
    assert torch.equal(torch.cat([block.jobs for block in blocks(25, CONFIG, 5)]), jobs(25, CONFIG))
    assert guidance_weights(CONFIG, 5, torch.arange(9)) == 2.0
    assert start_fractions(CONFIG, 5, torch.arange(9)).tolist() == [0.4] * 9


def test_ranges_are_filled_evenly_and_each_image_draws_for_itself():
    identity = identities(jobs(4000, RANGES))
    starts, weights = start_fractions(RANGES, 5, identity), guidance_weights(RANGES, 5, identity)
    levels, counts = starts.unique(return_counts=True)
    torch.testing.assert_close(levels, torch.linspace(0.1, 0.5, START_LEVELS, dtype=torch.float64))
    assert counts.min() > 8000 / START_LEVELS * 0.85 and float(starts.max()) <= 0.5
    assert weights.min() >= -1 and weights.max() <= 3 and abs(float(weights.mean()) - 1) < 0.05
    assert abs(float(torch.corrcoef(torch.stack([starts, weights.double()]))[0, 1])) < 0.05
    few = torch.tensor([7, 3, 4000])
    assert torch.equal(start_fractions(RANGES, 5, identity[few]), starts[few])
    assert not torch.equal(start_fractions(RANGES, 6, identity), starts)


def test_any_jobs_can_be_grouped():
    todo = jobs(50, RANGES)[::7]
    parts = in_blocks(todo, RANGES, 5)
    assert [part.start_fraction for part in parts] == sorted(part.start_fraction for part in parts)
    assert sorted(torch.cat([part.jobs for part in parts]).tolist()) == sorted(todo.tolist())
