"""What a batch holds, for any step, split over any number of processes."""

from __future__ import annotations

import types

import pytest
import torch

from sdood_plugin.detector.batches import Batches, Labelled, Part, Passes, make_parts

CPU = torch.device("cpu")


def passes(total, count, part=0):
    return Passes(total, count, 3, part, CPU)


@pytest.mark.parametrize(("total", "count"), [(10, 3), (7, 7), (5, 12), (8, 1), (1, 4)])
def test_every_pass_over_the_rows_is_a_permutation(total, count):
    steps = 4 * total
    rows = torch.cat([passes(total, count).rows(step) for step in range(steps)])
    assert len(rows) == steps * count
    for epoch in range(len(rows) // total):
        assert sorted(rows[epoch * total : (epoch + 1) * total].tolist()) == list(range(total))
    if total > 4:
        assert not torch.equal(rows[:total], rows[total : 2 * total])
        other = torch.cat([passes(total, count, part=1).rows(step) for step in range(steps)])
        assert not torch.equal(rows, other)  # parts are shuffled apart from each other


def test_a_step_does_not_need_the_steps_before():
    one = passes(10, 3)
    forwards = [one.rows(step) for step in range(20)]
    assert all(torch.equal(passes(10, 3).rows(step), forwards[step]) for step in (19, 7, 0))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_processes_share_one_batch(processes):
    images = torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    pools = [Part(images[:20], torch.arange(20), 6, False), Part(images[20:], torch.arange(20, 30), 3, True)]

    def drawn(index, count):
        accelerator = types.SimpleNamespace(device=CPU, process_index=index, num_processes=count)
        return Batches(pools, 5, accelerator).draw(4)

    whole = drawn(0, 1)
    shares = [drawn(index, processes) for index in range(processes)]
    for values in (*shares, whole):
        assert torch.equal(values[0][:, 0, 0, 0].long(), values[1]) and torch.equal(values[2], values[1] >= 20)
    assert sorted(torch.cat([labels for _, labels, _ in shares]).tolist()) == sorted(whole[1].tolist())
    assert len(whole[1]) == 9 and int(whole[2].sum()) == 3


def test_parts_that_are_absent_empty_or_not_wanted_are_left_out():
    some = Labelled(torch.zeros(8, 3, 2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    none = Labelled(some.images[:0], some.labels[:0])
    assert [(part.per_batch, part.is_outlier) for part in make_parts(some, some, some, 4, (0.5, 1.0))] == [
        (4, False),
        (2, False),
        (4, True),
    ]
    for controls, outliers, ratios in ((None, None, (1, 1)), (none, none, (1, 1)), (some, some, (0, 0))):
        assert len(make_parts(some, controls, outliers, 4, ratios)) == 1
