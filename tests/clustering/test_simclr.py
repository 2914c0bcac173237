"""NT-Xent against its formula, and SimCLR's resume."""

from __future__ import annotations

import math

import pytest
import torch

from sdood_plugin.clustering.simclr import nt_xent, train_simclr
from sdood_plugin.config import ClusteringConfig

from ..resuming import assert_resumes


def naive_nt_xent(first, second, temperature):
    """SimCLR, equation 1: the mean of -log exp(s_ij / t) / sum over k != i of exp(s_ik / t), both directions."""
    views = first.tolist() + second.tolist()
    count = len(first)

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    total = 0.0
    for i in range(2 * count):
        partner = (i + count) % (2 * count)
        below = sum(math.exp(cosine(views[i], views[k]) / temperature) for k in range(2 * count) if k != i)
        total -= math.log(math.exp(cosine(views[i], views[partner]) / temperature) / below)
    return total / (2 * count)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_loss_equals_the_formula(generator, temperature, count):
    first, second = torch.randn(2, count, 5, generator=generator, dtype=torch.float64)
    assert float(nt_xent(first, second, temperature)) == pytest.approx(
        naive_nt_xent(first, second, temperature), rel=1e-5, abs=1e-6
    )


def test_loss_in_closed_form():
    # orthogonal images whose two views agree: one similarity of 1 among 2B - 2 of 0
    views = torch.eye(4)
    assert float(nt_xent(views, 3 * views, 0.5)) == pytest.approx(math.log(math.exp(2) + 6) - 2, rel=1e-5)


def test_a_killed_training_resumes_to_the_same_bits(tmp_path, accelerator, pictures):
    config = ClusteringConfig(clusters=3, pretext_steps=5, pretext_batch_size=8)

    def train(job):
        backbone, history = train_simclr(pictures.images, config, job)
        return backbone.state_dict(), history

    before = torch.get_rng_state()
    assert_resumes(train, tmp_path, accelerator, die_at=3)
    assert torch.equal(torch.get_rng_state(), before)
