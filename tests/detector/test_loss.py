"""The three-head loss against its formula; masked terms have no gradient at all."""

from __future__ import annotations

import math

import pytest
import torch

from sdood_plugin.detector.loss import three_head_loss
from sdood_plugin.detector.network import Heads


def cross_entropy(logits, target):
    return math.log(sum(math.exp(value) for value in logits)) - logits[target]


def naive(heads, labels, flags, weight):
    """METHOD section 4, image by image: L = CE(g_bin, I) + (1 - I) CE(g_in, y) + I lambda CE(g_out, y)."""
    total = 0.0
    for b in range(len(labels)):
        one, y = int(flags[b]), int(labels[b])
        total += cross_entropy(heads.binary[b].tolist(), one)
        total += (1 - one) * cross_entropy(heads.inside[b].tolist(), y)
        total += one * weight * cross_entropy(heads.outside[b].tolist(), y)
    return total / len(labels)


def make_heads(generator, count=9, classes=4):
    widths = (6, 2, classes, classes)
    return Heads(*(torch.randn(count, width, generator=generator, dtype=torch.float64).requires_grad_() for width in widths))


FLAGS = {
    "both": torch.arange(9) % 3 == 0,
    "no outliers": torch.zeros(9, dtype=torch.bool),
    "all outliers": torch.ones(9, dtype=torch.bool),
}


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("case", FLAGS)
def test_loss_equals_the_formula(generator, case, weight):
    heads, labels = make_heads(generator), torch.arange(9) % 4
    found = {name: value.detach() for name, value in three_head_loss(heads, labels, FLAGS[case], weight).items()}
    assert float(found["loss"]) == pytest.approx(naive(heads, labels, FLAGS[case], weight), rel=1e-5)
    assert float(found["loss"]) == pytest.approx(float(found["binary"] + found["inside"] + weight * found["outside"]), rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("case", FLAGS)
def test_masked_terms_have_exactly_no_gradient(generator, case, weight):
    heads, labels, flags = make_heads(generator), torch.arange(9) % 4, FLAGS[case]
    three_head_loss(heads, labels, flags, weight)["loss"].backward()
    assert (heads.inside.grad[flags] == 0).all()
    assert (heads.outside.grad[~flags] == 0).all()
    assert (heads.inside.grad[~flags] != 0).all()
    assert (heads.binary.grad != 0).all()
    assert (heads.outside.grad[flags] != 0).all() if weight else (heads.outside.grad == 0).all()


def test_sure_heads_have_no_loss():
    labels, flags = torch.tensor([0, 1]), torch.tensor([False, True])
    heads = Heads(torch.zeros(2, 3), 90 * torch.eye(2), 90 * torch.eye(2), 90 * torch.eye(2))
    assert float(three_head_loss(heads, labels, flags, 1.0)["loss"]) == pytest.approx(0, abs=1e-6)
    swapped = three_head_loss(heads, labels, ~flags, 1.0)  # class 1 of g_bin is outlier
    assert float(swapped["binary"]) == pytest.approx(90)
